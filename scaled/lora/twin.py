"""The twin: a generator's own network as the hypernetwork, sharing every base tensor and adding only LoRA weights.

The twin is a second module beside the generator, not the generator with an adapter switched on and off: switching
through `disable_adapters` sets `requires_grad = False` on the adapter and silently loses its gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hnkit.errors import InputError

ADAPTER = "hypernoise"


@dataclass(frozen=True)
class LoraSpec:
    """Which layers get a LoRA term, and of what size: `W x + (alpha / rank) B A x`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Full names of the linear and convolution layers, sorted."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank {self.rank} given: a LoRA rank is 1 or more")
        if not self.alpha > 0:
            raise InputError(f"lora_alpha {self.alpha} given: it is a number above 0")
        if not self.targets:
            raise InputError("no layers to adapt: the network has no linear or ungrouped convolution layer")


class ZeroLinear(nn.Linear):
    """A linear layer that keeps its weights and returns zeros, in float32: the base of the twin's last layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Zeros of shape `(*, out_features)`."""
        return input.new_zeros((*input.shape[:-1], self.out_features), dtype=torch.float32)


class ZeroConv2d(nn.Conv2d):
    """A convolution that keeps its weights and returns zeros, in float32: the base of the twin's last layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Zeros of the shape the convolution would return."""
        sides = [
            (input.shape[i - 2] + 2 * int(self.padding[i]) - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        ]
        return input.new_zeros((*input.shape[:-3], self.out_channels, *sides), dtype=torch.float32)


class _CastLinear(nn.Linear):
    """A linear layer that computes in the type of its input, whatever the type of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


class _CastConv2d(nn.Conv2d):
    """A convolution that computes in the type of its input, whatever the type of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(input, self.weight.to(input.dtype), None)
        return output


_ZERO_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: ZeroLinear, nn.Conv2d: ZeroConv2d}
_CAST_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _CastLinear, nn.Conv2d: _CastConv2d}


def lora_targets(network: nn.Module, chosen: Sequence[str] = (), last: str | None = None) -> tuple[str, ...]:
    """Names of the layers that get LoRA: every linear layer and every convolution that is not grouped.

    A depthwise convolution has one input channel per group; a low-rank term through it is not low-rank in any useful
    sense, and peft refuses ranks that the number of groups does not divide.

    Args:
        network: un-adapted, or with a LoRA of its own that is part of it.
        chosen: names or ends of names (`to_q`, `attn1.to_q`) of those that are wanted, as peft's `target_modules`;
            empty: all.
        last: a layer that is among them whatever is chosen.

    Raises:
        InputError: an entry of `chosen` is the end of no layer's name.
    """
    every = _all_targets(network)
    if not chosen:
        return every
    for end in chosen:
        if not any(_ends(name, end) for name in every):
            kinds = sorted({name.rpartition(".")[2] for name in every})
            raise InputError(
                f"backend.lora_layers: no layer of {type(network).__name__} ends in {end!r}; their last names are "
                f"{', '.join(kinds)}"
            )
    return tuple(name for name in every if name == last or any(_ends(name, end) for end in chosen))


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _all_targets(network: nn.Module) -> tuple[str, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = dict(network.named_modules())
    adapted = [f"{name}." for name, module in layers.items() if isinstance(module, BaseTunerLayer)]
    return tuple(
        sorted(
            name
            for name, module in layers.items()
            if not name.startswith(tuple(adapted))
            and _takes_lora(cast(nn.Module, getattr(module, "base_layer", module)))
        )
    )


def _takes_lora(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def share_weights(base: nn.Module) -> nn.Module:
    """A copy of `base` whose modules are new and whose parameters and buffers are the very same tensors."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, memo=shared)


def make_twin(
    base: nn.Module, spec: LoraSpec, *, zero_base: str | None, seed: int = 0, autocast: bool = False
) -> nn.Module:
    """The generator's network `base` with LoRA, sharing its tensors; with a zero-base last layer it is a map f = 0.

    LoRA's `B` starts at zero, so that the twin equals `base`, and with `zero_base` returns exactly 0 at the start.
    Only the last layer's `B` has a non-zero gradient in the first step.

    Args:
        base: the frozen network; it is not changed.
        spec: rank, alpha and target layers.
        zero_base: name of the last layer, whose frozen weight and bias are then left out; `None` keeps them.
        seed: the seed of LoRA's `A` (normal, standard deviation `1 / rank`); the global generators are left as they
            were.
        autocast: compute LoRA in the type of each layer's input, as the base does; its weights are float32 all the
            same. peft turns every input into float32, and autograd keeps that copy. The last layer's LoRA, which is
            all of the delta, stays in float32 where its base is left out.

    Returns:
        The twin. Its LoRA weights are float32 whatever the base's type, and are its only trainable parameters.

    Raises:
        InputError: a target layer does not exist in `base`, or `zero_base` is not among the targets.
    """
    import peft

    missing = sorted(set(spec.targets) - {name for name, _ in base.named_modules()})
    if missing:
        raise InputError(f"{type(base).__name__} has no layer {missing[0]!r}: the adapter is of another network")
    if zero_base is not None and zero_base not in spec.targets:
        raise InputError(f"the last layer {zero_base!r} has no LoRA: with a zero base the map would be 0 for ever")
    twin = share_weights(base)
    config = peft.LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets), init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]), _ungrouped(twin, spec.targets):
        peft.inject_adapter_in_model(config, twin, adapter_name=ADAPTER)
    for layer in twin.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_adapter([*(name for name in layer.active_adapters if name != ADAPTER), ADAPTER])
    for name in spec.targets:  # peft makes the parts of a convolution's LoRA of the base layer's own class
        for part in _parts(twin.get_submodule(name)):
            part.__class__ = next(kind for kind in _ZERO_CLASS if isinstance(part, kind))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in twin.named_parameters():
        mine = name.endswith(f".{ADAPTER}.weight")  # the base may have another LoRA, which is part of it
        parameter.requires_grad_(mine)
        if mine and ".lora_A." in name:
            start = torch.randn(parameter.shape, generator=generator) / spec.rank
            parameter.data = start.to(parameter.device)
        elif mine and ".lora_B." in name:
            parameter.data = torch.zeros(parameter.shape, device=parameter.device)
    if zero_base is not None:
        # After the injection: peft builds lora_A and lora_B of the base layer's class, and a LoRA that returned zeros
        # would pass every test of f = 0 and never learn.
        last = twin.get_submodule(f"{zero_base}.base_layer")
        last.__class__ = next(zero for kind, zero in _ZERO_CLASS.items() if isinstance(last, kind))
    if autocast:
        set_autocast(twin, spec, zero_base, True)
    return twin


def set_autocast(twin: nn.Module, spec: LoraSpec, zero_base: str | None, on: bool) -> None:
    """Whether LoRA computes in the type of each layer's input, but for that of a last layer without a base.

    It is set after the injection, which reads the classes of the layers.
    """
    for layer in (twin.get_submodule(name) for name in spec.targets if name != zero_base):
        layer.cast_input_dtype_enabled = not on  # type: ignore[assignment]
        for part in _parts(layer):
            plain = next(kind for kind in _CAST_CLASS if isinstance(part, kind))
            part.__class__ = _CAST_CLASS[plain] if on else plain


def _parts(layer: nn.Module) -> list[nn.Module]:
    """The A and B of every LoRA on a layer."""
    sides = (cast(nn.ModuleDict, side) for side in (layer.lora_A, layer.lora_B))
    return [part for side in sides for part in side.values()]


def grouped_targets(network: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """Those of the target layers of an un-adapted network that are grouped convolutions."""
    modules = dict(network.named_modules())
    return tuple(name for name in targets if getattr(modules.get(name), "groups", 1) > 1)


def lora_state(twin: nn.Module) -> dict[str, Tensor]:
    """The LoRA weights by layer: keys `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
    return {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in twin.named_parameters()
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
    }


def load_lora(twin: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy LoRA weights, by the keys of `lora_state`, into a twin that has exactly those layers."""
    state = lora_state(twin)
    with torch.no_grad():
        for key in state:
            state[key].copy_(weights[key])


@contextmanager
def _ungrouped(network: nn.Module, targets: Sequence[str]) -> Iterator[None]:
    """Inject dense LoRA convolutions into grouped ones too, as older peft did: it reads `groups` only then."""
    modules = dict(network.named_modules())
    grouped = {modules[name]: modules[name].groups for name in grouped_targets(network, targets)}
    for module in grouped:
        module.groups = 1
    try:
        yield
    finally:
        for module, groups in grouped.items():
            module.groups = groups
