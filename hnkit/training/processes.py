"""One process or many: who writes, how errors are shared, and sums over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor

from hnkit.errors import InputError

Result = TypeVar("Result")
_LONGEST_WAIT = timedelta(hours=12)  # the others wait while the main process measures


class Processes:
    """The processes of a run (one, or as many as torchrun started) and the device of this one, found by accelerate.

    Attributes:
        count: how many there are.
        index: of this one, from 0.
        device: where this one computes.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        state = PartialState(cpu=cpu, timeout=_LONGEST_WAIT)
        self.count: int = state.num_processes
        self.index: int = state.process_index
        self.device: torch.device = state.device

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.index == 0

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the main process and give its result to all; an `InputError` there is raised by all."""
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except InputError as error:
                outcome[1] = str(error)
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise InputError(outcome[1])
        result: Result = outcome[0]
        return result

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their sums over all processes, in place, with one flattened all-reduce."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        _unflatten(flat, tensors)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by the main process's, in place."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.broadcast(flat, src=0)
        _unflatten(flat, tensors)


@torch.no_grad()
def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
