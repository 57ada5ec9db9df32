"""The ledger: which tensors live while a step is computed, and what its operations cost, on real or on fake tensors.

Below autograd every operation passes `torch`'s dispatcher. The ledger notes each new storage when it is made and when
it is freed, under the part of the step that made it, and counts operations and bytes moved. On fake tensors nothing is
computed and nothing is allocated, and the account is the same.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hnkit.training.plan.cards import LAUNCH, Card

aten = torch.ops.aten
Place = tuple[str, str]
"""A stage, and a place in it."""


@dataclass(frozen=True, order=True)
class Operation:
    """What one operation costs.

    Attributes:
        flops: floating-point operations of a matrix product, convolution or attention; 0 for all others.
        moved: bytes read and written.
        half: whether its inputs are 16-bit numbers.
    """

    flops: int
    moved: int
    half: bool

    def seconds(self, card: Card, rows: int = 1) -> float:
        """The least time on a card for so many times the rows: the longest of computing, moving and launching."""
        rate = card.half if self.half else card.single
        return max(rows * self.flops / rate, rows * self.moved / card.bandwidth, LAUNCH)


@dataclass
class Work:
    """How often each operation was done."""

    counts: Counter[Operation] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        """Floating-point operations in all."""
        return sum(count * operation.flops for operation, count in self.counts.items())

    def seconds(self, card: Card, rows: int = 1) -> float:
        """The roofline of the card: the least time of every operation, one after the other."""
        return sum(count * operation.seconds(card, rows) for operation, count in self.counts.items())

    def __add__(self, other: Work) -> Work:
        return Work(self.counts + other.counts)


def peak_of(peaks: Mapping[Place, int], stage: str) -> int:
    """The largest of the peaks that were noted in a stage, wherever in it."""
    return max(size for (found, _), size in peaks.items() if found == stage)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Account of the storages that are made while it is entered.

    Attributes:
        live: bytes made since it was entered that live now.
        work: operations by stage.
        stage: the name that operations are noted under; set by `enter`.
        place: where in the stage, for peaks; set by `mark`.
        peaks: the most bytes that lived at once, by stage and place.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.work: dict[str, Work] = {}
        self.stage = self.place = ""
        self.peaks: dict[Place, int] = {}
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    def enter(self, stage: str) -> None:
        """Note what follows under `stage`."""
        self.stage, self.place = stage, ""
        self._high()

    def mark(self, place: str) -> None:
        """Note peaks under a place in the present stage."""
        self.place = place
        self._high()

    def peak(self, stage: str) -> int:
        """The most bytes that lived at once in a stage."""
        return peak_of(self.peaks, stage)

    def _high(self) -> None:
        key = self.stage, self.place
        self.peaks[key] = max(self.peaks.get(key, 0), self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        inputs = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        outputs = _tensors((made,))
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in given]
        for tensor in new:
            self._note(tensor.untyped_storage())
        if new or func._schema.is_mutable:  # a view moves nothing
            self._count(func, inputs, outputs, args, kwargs, made)
        return made

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:  # two outputs may share one
            self._sizes[key] = weakref.ref(storage, lambda _: self._free(key)), storage.nbytes()
            self.live += storage.nbytes()
            self._high()

    def _free(self, key: int) -> None:
        _, size = self._sizes.pop(key)
        self.live -= size

    def _count(self, func: Any, inputs: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any, made: Any) -> None:
        moved = sum(_bytes(tensor) for tensor in (*inputs, *outputs))
        largest = max(inputs or outputs, key=_bytes)
        operation = Operation(_flops(func, args, kwargs, made), moved, largest.dtype.itemsize <= 2)
        self.work.setdefault(self.stage, Work()).counts[operation] += 1


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments or results, and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _bytes(tensor: Tensor) -> int:
    """Bytes that reading a tensor moves: an expanded one is read once."""
    sides = [side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sides) * tensor.itemsize


def _flops(func: Any, args: Any, kwargs: Any, made: Any) -> int:
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # type: ignore[no-untyped-call]
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))  # type: ignore[no-untyped-call]
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=made))


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({(storage := tensor.untyped_storage())._cdata: storage.nbytes() for tensor in tensors}.values())


@contextmanager
def counting() -> Iterator[Ledger]:
    """A ledger that notes what happens inside."""
    ledger = Ledger()
    with ledger:
        yield ledger
