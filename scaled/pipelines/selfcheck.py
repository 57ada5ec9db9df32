"""What must hold before anything is trained on a pipeline: its noise's layout, f = 0, rows, and every gradient.

Libraries drop gradients silently: in blocks that are recomputed without their mask, in mixtures of experts that run
under `no_grad` outside of training mode. A model that fails here is refused in one line that says which check, and by
how much. All of it runs on two small images, with the options of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.maps import Condition
from hnkit.scaled.lora.twin import ADAPTER
from hnkit.scaled.pipelines.hypernetwork import FirstStep
from hnkit.scaled.pipelines.layout import stacked

_SIDES = 4
"""The checks' images have at most this many of the units of which an image side is a multiple."""
_STEPS = (0.1, 0.03, 0.01)
_STEPS_OF_HALF = (1.0, 0.5, 0.25, 0.125)
"""Of noise that a network takes in half precision: a shorter step is lost in its rounding."""
_LOST = (0.01, 0.02)
"""Such steps: what the output changes by is its rounding."""
_SLOPE = {torch.float32: 0.03, torch.bfloat16: 0.1, torch.float16: 0.05}
_SLOPE_OF_IMAGES = {torch.float32: 0.03, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Beyond the differences' own disagreement. In bfloat16 right gradients of f come within 0.03, and of images, which a
decoder rounds once more, within 0.26; of f, one that is a fifth too long or too short is at least 0.13 off."""
_EQUAL = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_ROWS = {torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 2e-2}
"""Of the same function by other kernels: with gradients on, and in a batch of another size."""
_SAME = {torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.float16: 5e-4}
"""Of the same function by the same kernels: equal on a CPU, up to the order of sums on a card."""
_MOVE = 0.1
"""By how much a weight of the network is moved where its input has norm 1, whatever the LoRA's rank and alpha."""
_CANDIDATES = 8
_ANYWAY = "backend.self_check = false loads it all the same"


def find_last_layer(network: nn.Module, first_step: FirstStep, condition: Condition) -> str:
    """The layer that f's base leaves out: the last linear or convolution to run whose zeroing zeroes the output.

    Raises:
        InputError: there is none.
    """
    size = small_size(first_step)
    layout = first_step.layout(size, condition)
    device = next(network.parameters()).device
    noise = torch.randn(1, *layout.shape, generator=torch.Generator().manual_seed(0)).to(device)
    one = condition.select(torch.zeros(1, dtype=torch.long))
    ran: list[str] = []

    def run() -> Tensor:
        with torch.no_grad():
            return stacked(first_step.raw(network, noise, one, first_step.options.guidance, size))

    layers = {name: layer for name, layer in network.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)}
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))  # type: ignore[misc]
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for name in list(dict.fromkeys(reversed(ran)))[:_CANDIDATES]:
        hook = layers[name].register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        try:
            if not bool(run().any()):
                return name
        finally:
            hook.remove()
    raise InputError(
        f"self-check 'last layer': the output of {type(network).__name__} does not end in a linear layer or a "
        "convolution: no hypernetwork that starts at f = 0 can be made of it"
    )


def small_size(first_step: FirstStep) -> tuple[int, int]:
    """Height and width of the images that the checks are made on."""
    if first_step.family.own_size:
        sides: tuple[int, int] = first_step.options.sides
        return sides
    most = _SIDES * first_step.family.side_multiple(first_step.pipe)
    height, width = first_step.options.sides
    return min(height, most), min(width, most)


def check(backend: Any) -> None:
    """Refuse a `PipelineBackend` whose hypernetwork does not start at 0, mixes rows, or has a wrong gradient.

    Raises:
        InputError: a check fails: which, by how much, and what to do.
    """
    Checks(backend).run()


class Checks:
    """The checks of one loaded backend, in order."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.size = small_size(backend.first_step)
        self.condition = backend.any_condition
        self.dtype = next(p.dtype for p in backend.hypernetwork.parameters() if not p.requires_grad)
        shape = backend.first_step.layout(self.size, self.condition).shape
        noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(backend.device)
        self.trained = [p for p in backend.hypernetwork.parameters() if p.requires_grad]

    def run(self) -> None:
        """All of them; the LoRA weights are as they were afterwards."""
        with torch.no_grad():
            self._at_full_size()
            start = self._f(self.noise)
        if bool(start.any()):
            self._fail("f = 0", f"f starts at values up to {float(start.abs().max()):.2g}")
        with self._moved():
            self._every_layer_learns()
            self._rows("f", self._f)
            self._recomputed("f", self.backend.hypernetwork, lambda: self._f(self.noise), self.trained)
            self._gradient("f", self._f, [self.noise], "its noise")
            self._gradient("f", lambda: self._f(self.noise), self.trained, "its weights")
        self._rows("the generator", self._images)
        self._paints()
        noise = self.noise.clone().requires_grad_()
        self._recomputed("the generator", self.backend.network, lambda: self._images(noise), [noise])
        self._gradient("the generator", self._images, [self.noise], "its noise")

    def _f(self, noise: Tensor, rows: Sequence[int] = (0, 1)) -> Tensor:
        condition = self.condition.select(torch.tensor(rows))
        delta: Tensor = self.backend.hypernetwork(noise, condition, self.size)
        return delta

    def _at_full_size(self) -> None:
        """Some networks have positions for images up to a size, which the small images of the checks do not reach."""
        one = self.condition.select(torch.tensor([0]))
        self.backend.hypernetwork(torch.zeros(1, *self.backend.noise_shape, device=self.backend.device), one)

    def _paints(self) -> None:
        with torch.no_grad():
            found = tuple(self._images(self.noise).shape[-2:])
        if found != tuple(self.size):
            reason = f"{found[0]} x {found[1]} pixels where {self.size[0]} x {self.size[1]} are asked for"
            self._fail("image size", reason, "no hypernetwork can be made of it at this backend.size")

    def _images(self, noise: Tensor, rows: Sequence[int] = (0, 1)) -> Tensor:
        condition = self.condition.select(torch.tensor(rows))
        images: Tensor = self.backend.sample(noise, condition, self.backend.options.schedule or 1, size=self.size)
        return images

    def _every_layer_learns(self) -> None:
        """A layer that runs under `no_grad` inside f gets no gradient, and nothing says so."""
        layers = {name: layer for name, layer in self.backend.hypernetwork.named_modules() if hasattr(layer, "lora_A")}
        dead: set[str] = set()
        hooks = [
            layer.register_forward_hook(
                lambda _, __, output, name=name: None if output.requires_grad else dead.add(name)  # type: ignore[misc]
            )
            for name, layer in layers.items()
        ]
        try:
            self._f(self.noise)
        finally:
            for hook in hooks:
                hook.remove()
        if dead:
            name = min(dead).removeprefix("twin.").removesuffix(f".{ADAPTER}")
            self._fail("gradient of f", f"{len(dead)} of {len(layers)} LoRA layers run without gradients ({name})")

    def _rows(self, what: str, function: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            both = function(self.noise)
            worst = max(_difference(function(self.noise[i : i + 1], (i,)), both[i : i + 1]) for i in range(2))
        if not worst <= _ROWS[self.dtype]:
            self._fail(f"rows of {what}", f"a row alone differs from the same row in a batch by a relative {worst:.1g}")

    def _gradient(self, what: str, function: Callable[..., Tensor], inputs: list[Tensor], of: str) -> None:
        """Autograd against central differences along its gradient, for a random functional of the output."""
        slope, difference, unsure = self._slopes(function, inputs, what)
        error = max(0.0, abs(slope - difference) - unsure) / max(abs(slope), 1e-30)
        if not error <= (_SLOPE if what == "f" else _SLOPE_OF_IMAGES)[self.dtype]:
            reason = f"the gradient by {of} differs from a finite difference by {100 * error:.0f} %"
            self._fail(f"gradient of {what}", reason)

    def _slopes(self, function: Callable[..., Tensor], inputs: list[Tensor], what: str) -> tuple[float, float, float]:
        """The slope along the gradient by autograd, by differences, and how far those can be off.

        They are off by curvature, in which two steps disagree, and in half precision by the rounding of the output.
        """
        by_noise = inputs == [self.noise]
        at = [self.noise.clone().requires_grad_()] if by_noise else inputs

        def output() -> Tensor:
            return (function(at[0]) if by_noise else function()).double()

        def value(found: Tensor) -> Tensor:
            weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            return (found * weights.to(found.device)).sum()

        with_gradients = output()
        total = value(with_gradients)
        if not total.requires_grad:
            self._fail(f"gradient of {what}", "the output carries no gradient")
        with torch.no_grad():
            apart = _difference(with_gradients, output())
        if not apart <= _EQUAL[self.dtype]:
            reason = f"with gradients on, the output is another one, by a relative {apart:.1g}"
            self._fail(f"gradient of {what}", reason)
        gradients = [
            torch.zeros_like(x) if g is None else g
            for x, g in zip(at, torch.autograd.grad(total, at, allow_unused=True), strict=True)
        ]
        norm = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
        if not 0 < norm < float("inf"):
            self._fail(f"gradient of {what}", f"the gradient has norm {norm:.2g}")

        def ends(step: float) -> float:
            """The value at a step along the gradient, less that at a step back."""
            found = []
            for sign in (1, -1):
                with torch.no_grad(), _shifted(at, gradients, sign * step / norm):
                    found.append(float(value(output())))
            return found[0] - found[1]

        half = self.dtype != torch.float32 and by_noise
        spec = self.backend.lora
        unit = 1.0 if by_noise else 2 * spec.rank / spec.alpha  # LoRA's scale lengthens a step of its weights
        steps = [unit * step for step in (_STEPS_OF_HALF if half else _STEPS)]
        rounding = max(abs(ends(step) - 2 * step * norm) for step in _LOST) if half else 0.0
        differences = [ends(step) / (2 * step) for step in steps]
        unsure = [
            abs(a - b) + rounding / step
            for (a, b), step in zip(itertools.pairwise(differences), steps[1:], strict=True)
        ]
        best = min(range(len(unsure)), key=unsure.__getitem__)
        return norm, differences[best + 1], unsure[best]

    def _recomputed(self, what: str, network: nn.Module, function: Callable[[], Tensor], of: list[Tensor]) -> None:
        """Output and gradients with recomputed blocks, against those without: the arithmetic is the same."""
        name = "hypernetwork_checkpointing" if what == "f" else "generator_checkpointing"
        if not getattr(self.backend.options, name):
            return

        def measured() -> list[Tensor]:
            output = function()
            weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
            gradients = torch.autograd.grad((output * weights).sum(), of, allow_unused=True)
            return [output.detach(), torch.cat([g.flatten() for g in gradients if g is not None])]

        found = measured()
        with _without_recomputation(network):
            plain = measured()
        off = [_difference(one, other) for one, other in zip(found, plain, strict=True)]
        if not (off[0] <= _SAME[self.dtype] and off[1] <= 10 * _SAME[self.dtype]):
            reason = f"recomputation changes the output by a relative {off[0]:.1g}, its gradients by {off[1]:.1g}"
            self._fail(f"recomputed blocks of {what}", reason, f"set backend.{name} = false")

    @contextmanager
    def _moved(self) -> Iterator[None]:
        """LoRA away from f = 0, where every wrong answer would agree: as far as its rank and alpha are of any size."""
        spec = self.backend.lora
        size = _MOVE / (spec.alpha / spec.rank * spec.rank**0.5)
        moved = [
            p for name, p in self.backend.hypernetwork.named_parameters() if ".lora_B." in name and p.requires_grad
        ]
        start = [p.detach().clone() for p in moved]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in moved:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.device))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(moved, start, strict=True):
                    parameter.copy_(value)

    def _fail(self, name: str, reason: str, cure: str = _ANYWAY) -> None:
        raise InputError(f"self-check {name!r}: {type(self.backend.pipeline).__name__}: {reason}: {cure}")


@contextmanager
def _shifted(tensors: Sequence[Tensor], directions: Sequence[Tensor], step: float) -> Iterator[None]:
    start = [tensor.detach().clone() for tensor in tensors]
    for tensor, direction in zip(tensors, directions, strict=True):
        tensor.data.add_(direction, alpha=step)
    try:
        yield
    finally:
        for tensor, value in zip(tensors, start, strict=True):
            tensor.data.copy_(value)


@contextmanager
def _without_recomputation(network: nn.Module) -> Iterator[None]:
    on: list[Any] = [m for m in network.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True


def _difference(one: Tensor, other: Tensor) -> float:
    scale = float(other.double().norm())
    return float((one.double() - other.double()).norm()) / max(scale, 1e-30)
