"""Skeletons: backends and rewards whose tensors have shapes, types and no memory, for counting a step without a card.

A module is built on torch's device `meta`, where no entry exists, and its tensors are then replaced by fake ones on the
CPU, which go through every operation of a real step. Real tensors that meet them, a scheduler's few numbers, are taken
as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hnkit.backend import BackendBase

Loader = TypeVar("Loader", bound=Callable[..., Any])
Objective = Literal["hypernoise", "direct"]


@dataclass(frozen=True)
class Skeleton:
    """A backend to count on.

    Attributes:
        backend: whose hypernetwork and generator run on the tensors of `mode`.
        frozen: what lies frozen on the card, by name, in the order of a table.
        decode: object and name of the method that turns the generator's latents into images; `None` where `generate`
            is one part.
        mode: makes the tensors that the backend takes.
        encoders: bytes of text encoders that are on the card while prompts are encoded, before the first step.
        whole: bytes of the network's parts that each process has whole at once, beside its share of all of them, where
            several share it out; 0: they do not.
        switched: a context in which options of these names are on, where one skeleton serves them all; `None`: each
            choice of options has a skeleton of its own.
    """

    backend: BackendBase
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
    decode: tuple[Any, str] | None = None
    mode: AbstractContextManager[Any] = field(default_factory=nullcontext)
    encoders: int = 0
    whole: int = 0
    switched: Callable[[Iterable[str]], AbstractContextManager[None]] | None = None


@runtime_checkable
class HasSkeleton(Protocol):
    """A backend factory whose steps can be counted without weights.

    Attributes:
        savers: options that save memory: name -> the part of the step that each one changes.
    """

    savers: Mapping[str, str]

    def skeleton(self, options: Any, objective: Objective = "hypernoise") -> Skeleton:
        """The backend of these options without weights; `InputError` where its sizes are not known."""
        ...


def countable(skeleton: Callable[..., Any]) -> Callable[[Loader], Loader]:
    """Say of a reward's loader how the reward is built without weights: `skeleton(weight=..., model_id=...)`."""

    def mark(loader: Loader) -> Loader:
        loader.skeleton = skeleton  # type: ignore[attr-defined]
        return loader

    return mark


def without_weights(build: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    """What `build` makes, with parameters that have no entries, in the given type unless it says another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build()
    finally:
        torch.set_default_dtype(before)


def fake_mode() -> FakeTensorMode:
    """The mode of one skeleton's tensors; real tensors may meet them."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(mode: FakeTensorMode, modules: Iterable[nn.Module]) -> None:
    """Replace every tensor of the modules by a fake one on the CPU; what they share stays shared."""
    memo: dict[int, tuple[Tensor, Tensor]] = {}  # the first of each pair is kept alive, so that its id stays its own

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in memo:
            with mode:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = tensor, made
        return memo[id(tensor)][1]

    for module in (inner for outer in modules for inner in outer.modules()):
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for table in tables:
            for name, value in list(table.items()):
                if isinstance(value, Tensor):
                    table[name] = fake(value)
                elif isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
                    table[name] = type(value)(fake(part) for part in value)
