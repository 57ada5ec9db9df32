"""One step, counted part by part: what each part saves for the backward pass, and what it needs while it runs.

The parts of a step follow each other: f, the generator, the decoder, the rewards, and back. Each is run by itself on
the tensors of a skeleton, with a gradient of the right shape from behind, and the peak of a whole step is put together:
while a part runs, what the parts before it have saved lives beside it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from hnkit.config import TrainConfig
from hnkit.errors import InputError
from hnkit.internal.values import reason_of
from hnkit.maps import Condition
from hnkit.rewards import RewardSum
from hnkit.training.optimize import build_optimizer
from hnkit.training.plan.depth import Depth, Trace
from hnkit.training.plan.ledger import Ledger, Work, counting
from hnkit.training.plan.skeleton import Skeleton

F, GENERATOR, DECODER, REWARDS = "f", "generator", "decoder", "rewards"
PARTS = (F, GENERATOR, DECODER, REWARDS)
"""The parts of a step in the order of the forward pass."""
_BACK = "back to "
_WITHOUT_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
"""What torch raises where a value is asked for, or a shape that depends on one."""


@dataclass(frozen=True)
class Part:
    """What one part of a step needs, in bytes beyond what lived before it began.

    Attributes:
        saved: what it leaves for the backward pass.
        forward: the most that lives while it runs forward.
        backward: the most that lives while it runs backward, `saved` and the gradients of trained weights included.
        forward_work: its operations forward.
        backward_work: its operations backward, those of recomputation included.
    """

    saved: int
    forward: int
    backward: int
    forward_work: Work
    backward_work: Work

    def rows(self, two: Part, count: int) -> Part:
        """The part at `count` rows, counted at one and at two: what a second row adds, every other one adds, too."""
        pairs = ((self.saved, two.saved), (self.forward, two.forward), (self.backward, two.backward))
        saved, forward, backward = (one + (count - 1) * (more - one) for one, more in pairs)
        return Part(saved, forward, backward, self.forward_work, self.backward_work)

    def scaled(self, factor: float, fixed: int = 0) -> Part:
        """The part at `factor` times the rows; `fixed` bytes of its backward pass do not grow."""
        grown = (round(factor * size) for size in (self.saved, self.forward, self.backward - fixed))
        saved, forward, backward = grown
        return Part(saved, forward, backward + fixed, self.forward_work, self.backward_work)


def count_hypernetwork(skeleton: Skeleton, rows: int) -> Part:
    """The forward and backward pass of f, the L2 term and the moved noise."""
    backend = skeleton.backend

    def run(noise: Tensor, condition: Condition) -> tuple[Tensor, ...]:
        delta = backend.hypernetwork(noise, condition)
        return noise + delta.to(noise.dtype), delta.float().flatten(1).square().sum(1) / 2

    return _count(skeleton, F, run, rows)[F]


def count_generator(skeleton: Skeleton, rows: int, steps: int) -> tuple[dict[str, Part], tuple[int, ...]]:
    """The generator and, where it is a part of its own, the decoder; and the shape of one output."""
    shape: tuple[int, ...] = ()

    def run(noise: Tensor, condition: Condition) -> Tensor:
        nonlocal shape
        images = skeleton.backend.generate(noise, condition, steps)
        shape = tuple(images.shape[1:])
        return images

    return _count(skeleton, GENERATOR, run, rows), shape


def count_rewards(skeleton: Skeleton, rewards: RewardSum, rows: int, size: Sequence[int]) -> Part:
    """The rewards of images of this shape, without rows."""
    prompts = _prompts(skeleton, rows)
    return _count(skeleton, REWARDS, lambda images, _: rewards(images, prompts), rows, size)[REWARDS]


@dataclass(frozen=True)
class Optimizer:
    """What the optimiser needs: bytes that stay, and bytes while it takes its step."""

    state: int
    working: int
    work: Work


def count_optimizer(parameters: Sequence[nn.Parameter], settings: TrainConfig) -> Optimizer:
    """One step of the configured optimiser on these parameters, by torch's implementation for cards."""
    size = sum(parameter.numel() for parameter in parameters)
    if settings.optimizer == "adamw8bit":  # two moments of a byte each, and a float32 scale for every 256 entries
        return Optimizer(2 * size + 2 * 4 * (size // 256), 0, Work())
    optimizer = build_optimizer(settings, parameters)
    for group in optimizer.param_groups:
        group["foreach"] = True
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with counting() as ledger:
        ledger.enter("step")
        optimizer.step()
        state = ledger.live
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return Optimizer(state, ledger.peak("step") - state, ledger.work["step"])


@contextlib.contextmanager
def followed(what: str) -> Iterator[None]:
    """Say in one line what the counter cannot follow."""
    try:
        yield
    except InputError as error:
        if not isinstance(error.__cause__, _WITHOUT_VALUES):
            raise
        raise InputError(f"no plan on tensors without values ({error}): measure a short run instead") from error
    except Exception as error:  # whatever a model or a reward does with its values, it has none here
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise InputError(
            f"no plan: {what} cannot be followed on tensors without values ({reason}); measure a short run instead"
        ) from error


def _prompts(skeleton: Skeleton, rows: int) -> list[str]:
    known = skeleton.backend.prompts() if skeleton.backend.prompts is not None else (["a prompt"], [])
    return known[0][:1] * rows


def _inputs(skeleton: Skeleton, rows: int, shape: Sequence[int]) -> tuple[Tensor, Condition]:
    with skeleton.mode:
        first = torch.zeros(rows, *shape, dtype=skeleton.backend.noise_dtype)
    return first, skeleton.backend.encode(_prompts(skeleton, rows))


def _count(
    skeleton: Skeleton, name: str, run: Callable[..., Any], rows: int, shape: Sequence[int] | None = None
) -> dict[str, Part]:
    """The parts of one pass, of which a network that repeats its blocks often runs a few of them."""
    trained = skeleton.backend.hypernetwork
    networks = {F: trained, GENERATOR: getattr(skeleton.backend, "network", None)}
    network = networks.get(name)
    depth = Depth([] if network is None else [network])
    if depth.pays:
        with torch.no_grad():  # what a first pass leaves in its modules for good would stand in one trace alone
            _traced(skeleton, name, run, rows, shape, depth, next(depth.passes))
        traces = [_traced(skeleton, name, run, rows, shape, depth, lengths) for lengths in depth.passes]
        if (carried := depth.carried(traces)) is not None:
            return _parts(carried)
    return _parts(_traced(skeleton, name, run, rows, shape))


def _traced(
    skeleton: Skeleton,
    name: str,
    run: Callable[..., Any],
    rows: int,
    shape: Sequence[int] | None,
    depth: Depth | None = None,
    lengths: Sequence[int] = (),
) -> Trace:
    """Run one part forward and backward, split at the decoder if it is inside."""
    backend = skeleton.backend
    first, condition = _inputs(skeleton, rows, backend.noise_shape if shape is None else shape)
    first.requires_grad_(name != F)
    begun: dict[str, int] = {}
    with counting() as ledger, followed(f"the part {name!r}"), _collected_after():

        def enter(part: str) -> None:
            begun.setdefault(part, ledger.live)
            ledger.enter(part)

        with depth.shortened(lengths, ledger) if depth is not None else contextlib.nullcontext():
            with _decoder(skeleton, enter, ledger):
                enter(name)
                outputs = run(first, condition)
            enter("end")
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            wanted = [output for output in outputs if output.requires_grad]
            last = next(reversed([part for part in begun if part != "end"]))
            if wanted:
                gradients = [torch.ones_like(output) for output in wanted]
                ledger.enter(_BACK + last)
                torch.autograd.backward(wanted, gradients)
                del gradients
            ledger.enter("over")
        for parameter in backend.hypernetwork.parameters():
            parameter.grad = None
        first.grad = None
        del outputs, wanted
    return Trace(begun, ledger.peaks, ledger.work, ledger.live)


@contextlib.contextmanager
def _collected_after() -> Iterator[None]:
    """Without collections of cycles, which free what a cycle holds at any moment; at the end, one of what is new.

    What was there before is frozen for so long: all that the libraries hold takes longer to look through than a trace.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    if not frozen:
        gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def _parts(trace: Trace) -> dict[str, Part]:
    """The parts of one pass; what its first one leaves in its modules for good, such as positions, is not saved."""
    parts = {}
    begun, kept = trace.begun, trace.left
    names = list(begun)
    for name, following in itertools.pairwise(names):
        back = _BACK + name
        parts[name] = Part(
            saved=begun[following] - begun[name] - kept,
            forward=trace.peak(name) - begun[name],
            backward=trace.peak(back) - begun[name],
            forward_work=trace.work.get(name, Work()),
            backward_work=trace.work.get(back, Work()),
        )
        kept = 0
    return parts


@contextlib.contextmanager
def _decoder(skeleton: Skeleton, enter: Callable[[str], None], ledger: Ledger) -> Iterator[None]:
    """Inside, the first call of the decoder begins its part, forward, and its end the generator's, backward."""
    if skeleton.decode is None:
        yield
        return
    owner, method = skeleton.decode
    decode = getattr(owner, method)

    def marked(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        enter(DECODER)
        if latents.requires_grad:
            latents.register_hook(lambda _: ledger.enter(_BACK + GENERATOR))  # type: ignore[no-untyped-call]
        return decode(latents, *arguments, **options)

    own = method in vars(owner)
    setattr(owner, method, marked)
    try:
        yield
    finally:
        if own:
            setattr(owner, method, decode)
        else:
            delattr(owner, method)
