"""A network that repeats a block many times is counted on a few of them, and the count is carried on to its depth.

Of blocks that are alike each adds the same operations, and the same bytes to whatever lives; so every count is linear
in their number, but for peaks, which are the largest of several. They are noted block by block: at a fixed place from
one end of the network what lives is linear in the number of blocks, and between the ends, being linear in the place, it
is no larger than at the ends. So nothing is approximated but that blocks of one class and equal shapes are alike.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hnkit.training.plan.ledger import Ledger, Place, Work, peak_of

LEAST = 12
"""Blocks of a list that is counted on fewer of them."""
_SHORT, _ENDS = 5, 2
"""Blocks that are left of it, and how many of them at each end have a place of their own."""


@dataclass(frozen=True)
class Trace:
    """What a ledger held at the end of one pass.

    Attributes:
        begun: bytes that lived when each part began, in their order.
        peaks: the most bytes that lived at once, by stage and place in it.
        work: operations by stage.
        left: bytes that were left at the end.
    """

    begun: dict[str, int]
    peaks: dict[Place, int]
    work: dict[str, Work]
    left: int

    def peak(self, stage: str) -> int:
        """The most bytes that lived at once in a stage."""
        return peak_of(self.peaks, stage)


class Depth:
    """The lists of blocks of some modules that are long enough to be counted on fewer of them.

    Attributes:
        lists: the lists.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found = [inner for module in modules for inner in module.modules() if isinstance(inner, nn.ModuleList)]
        lists = list({id(blocks): blocks for blocks in found if len(blocks) >= LEAST and _alike(blocks)}.values())
        inside = {id(inner) for blocks in lists for block in blocks for inner in block.modules()}
        self.lists = [blocks for blocks in lists if id(blocks) not in inside]

    @property
    def pays(self) -> bool:
        """Whether all passes through short lists run clearly fewer blocks than one through the whole ones."""
        blocks = sum(sum(lengths) for lengths in self.passes)
        return 0 < blocks < 0.7 * sum(len(blocks) for blocks in self.lists)

    @property
    def passes(self) -> Iterator[list[int]]:
        """The lengths of the lists in each pass that `carried` needs."""
        yield [_SHORT] * len(self.lists)
        for shorter in range(len(self.lists)):
            yield [_SHORT - (place == shorter) for place in range(len(self.lists))]

    @contextlib.contextmanager
    def shortened(self, lengths: Sequence[int], ledger: Ledger) -> Iterator[None]:
        """Inside, the lists have so many blocks, and the ledger is told which of them runs, forward and back."""
        with contextlib.ExitStack() as stack:
            for number, (blocks, length) in enumerate(zip(self.lists, lengths, strict=True)):
                whole = vars(blocks)["_modules"]
                kept = [*blocks][: length - _ENDS] + [*blocks][-_ENDS:]
                stack.callback(vars(blocks).__setitem__, "_modules", whole)
                vars(blocks)["_modules"] = {str(place): block for place, block in enumerate(kept)}
                for place, block in enumerate(kept):
                    note = partial(ledger.mark, f"{number}:{_place(place, length)}")
                    before = block.register_forward_pre_hook(lambda *_, note=note: note())  # type: ignore[misc]
                    after = block.register_forward_hook(
                        lambda _, __, made, note=note: _on_the_way_back(made, note)  # type: ignore[misc]
                    )
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def carried(self, traces: Sequence[Trace]) -> Trace | None:
        """The trace of the whole lists, of those of `passes`; `None` where they do not show how to go on."""
        base = traces[0]
        further = [len(blocks) - _SHORT for blocks in self.lists]
        places = [{place for place in trace.peaks if not place[1].endswith(":middle")} for trace in traces]
        if any(found != places[0] for found in places) or any(t.begun.keys() != base.begun.keys() for t in traces):
            return None

        def linear(values: Sequence[int]) -> int:
            return values[0] + sum(more * (values[0] - less) for more, less in zip(further, values[1:], strict=True))

        work: dict[str, Work] = {}
        for stage in base.work:
            counts = [trace.work.get(stage, Work()).counts for trace in traces]
            grown = {key: linear([count[key] for count in counts]) for key in set().union(*counts)}
            if min(grown.values()) < 0:
                return None
            work[stage] = Work(Counter(grown))
        return Trace(
            {part: linear([trace.begun[part] for trace in traces]) for part in base.begun},
            {place: linear([trace.peaks[place] for trace in traces]) for place in places[0]},
            work,
            linear([trace.left for trace in traces]),
        )


def _place(number: int, length: int) -> str:
    """The place of a block of a short list: from the end that it is near to."""
    if number < _ENDS:
        return f"first+{number}"
    return f"last-{length - 1 - number}" if number >= length - _ENDS else "middle"


def _on_the_way_back(made: Any, note: partial[None]) -> None:
    """Note when the gradient of what a block has made arrives."""
    for output in made if isinstance(made, tuple | list) else (made,):
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: note())  # type: ignore[no-untyped-call]


def _alike(blocks: nn.ModuleList) -> bool:
    """Whether all but the first and the last few have one class and parameters of the same names, shapes and types."""

    def form(block: nn.Module) -> tuple[type, Mapping[str, Any]]:
        return type(block), {name: (p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()}

    first, *others = [form(block) for block in [*blocks][_ENDS:-_ENDS]]
    return all(other == first for other in others)
