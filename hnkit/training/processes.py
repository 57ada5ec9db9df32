"""One process or many: who writes, how errors are shared, and sums over all of them."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor, nn

from hnkit.backend import backend_factory
from hnkit.errors import InputError
from hnkit.internal.stops import with_advice
from hnkit.internal.versions import installation
from hnkit.internal.workers import ALONE, Workers
from hnkit.maps import Condition

Result = TypeVar("Result")
_LONGEST_WAIT = timedelta(hours=12)  # the others wait while the main process measures
_SILENCE = timedelta(seconds=45)  # within which every living process is heard of
_BEAT = 2.0  # seconds


class Processes:
    """The processes of a run (one, or as many as torchrun started) and the device of this one, found by accelerate.

    Attributes:
        count: how many there are.
        index: the number of this one, from 0.
        device: where this one computes.
    """

    def __init__(self, device: str = "cpu") -> None:
        """Find the other processes.

        Args:
            device: that the backend was asked to compute on; without an accelerator it is the CPU whatever it says.

        Raises:
            InputError: torchrun has started several processes and they cannot work together on that device.
        """
        state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if state.num_processes != started:
            raise InputError(
                f"{started} processes were started and found {state.num_processes - 1} others on device {device!r}: "
                "start one, or use backend.device = cpu or cuda"
            )
        if state.num_processes > 1:
            atexit.unregister(_leave)
            atexit.register(_leave)
        self.count: int = state.num_processes
        self.index: int = state.process_index
        self.device: torch.device = state.device

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.index == 0

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the main process, once all have come here, and give its result to all.

        An `InputError` there is raised by all.
        """
        if self.count == 1:
            return work()
        torch.distributed.barrier()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except InputError as error:
                outcome[1] = str(error)
            except Exception:
                outcome[1] = "the main process has ended with an error of its own"
                torch.distributed.broadcast_object_list(outcome, src=0)
                raise
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise said_once(outcome[1])
        result: Result = outcome[0]
        return result

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, on all of them."""
        if self.count == 1:
            return [value]
        everyone: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Refuse processes that were started with different settings, or run other code or other versions.

        Args:
            facts: name -> value, as this process has them.

        Raises:
            InputError: on all processes; the message names the first fact that differs.
        """
        if self.count == 1:
            return
        everyone = self.gather({**facts, **installation()})
        for index, theirs in enumerate(everyone):
            for name in dict.fromkeys([*everyone[0], *theirs]):
                first, other = everyone[0].get(name, "nothing"), theirs.get(name, "nothing")
                if first != other:
                    raise said_once(
                        f"process {index} has {name} = {other} where process 0 has {first}: start all processes with "
                        "the same settings and the same versions"
                    )

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


class _Evaluating(Processes):
    """Processes of a command that trains nothing, where one that has gone is one line that says the way on."""

    def on_main(self, work: Callable[[], Result]) -> Result:
        with _noticed():
            return super().on_main(work)

    def gather(self, value: Any) -> list[Any]:
        with _noticed():
            return super().gather(value)


@contextlib.contextmanager
def _noticed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not connection_lost(error):
            raise
        raise InputError(with_advice("another process has gone")) from error


def connection_lost(error: RuntimeError) -> bool:
    """Whether a collective operation failed because its other side is gone; gloo has no exception of its own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


class SameEverywhere(nn.Module):
    """A hypernetwork whose values and products are the main process's in all processes, to the last bit.

    An adaptive method decides by them how often it runs the network. Where processes run one network together they have
    to decide alike, and the kernels of a card do not always round alike.
    """

    def __init__(self, hypernetwork: nn.Module, processes: Processes) -> None:
        super().__init__()
        self.hypernetwork, self.processes = hypernetwork, processes

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        """The delta of every row."""
        x: Tensor = _FromMain.apply(noise, self.processes)  # type: ignore[no-untyped-call]
        delta: Tensor = _FromMain.apply(self.hypernetwork(x, condition), self.processes)  # type: ignore[no-untyped-call]
        return delta


class _FromMain(torch.autograd.Function):
    """The identity, whose value, derivative and gradient are those of the main process."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return _from_main(value, processes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _FromMain.apply(grads[0], ctx.processes), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _from_main(tangents[0], ctx.processes)


def _from_main(value: Tensor, processes: Processes) -> Tensor:
    same = value.detach().clone(memory_format=torch.contiguous_format)
    processes.broadcast([same])
    return same


def _given(overrides: Sequence[str], key: str) -> str | None:
    """What the last of the user's `table.key=value` says of a key, without quotes; `None` where none does."""
    pairs = (override.partition("=")[::2] for override in overrides)
    said = [text.strip(" \"'") for name, text in pairs if name.strip() == key]
    return said[-1] if said else None


def evaluation_workers(backend: str | None, overrides: Sequence[str], settings: Mapping[str, Any]) -> Workers:
    """The processes of a command that trains nothing: those of torchrun, else this one alone.

    Args:
        backend: name of the backend, whose option `device` says where they compute; `None`: where there is a card.
        overrides: the user's `table.key=value`, among them perhaps that option.
        settings: what all of them must have been given alike, by name.

    Raises:
        InputError: they cannot work together, or were given different settings or versions.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    default = "auto" if backend is None else vars(backend_factory(backend).options()).get("device", "cpu")
    if _given(overrides, "backend.shard") == "true":
        raise said_once("backend.shard: only hnkit train shares a network out over processes: leave it out here")
    processes = _Evaluating(_given(overrides, "backend.device") or str(default))
    facts = {name: repr(value) for name, value in settings.items()}
    processes.require_same({"--backend": repr(backend), "--set": repr(tuple(overrides)), **facts})
    return processes


def said_once(message: str) -> InputError:
    """Bad input that all processes know of: one of them says it."""
    error = InputError(message)
    error.everywhere = True
    return error


def _leave() -> None:
    """End what torch runs beside Python for the exchange; at the interpreter's end it can abort the process instead."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Heartbeat:
    """While entered, a thread of each process exchanges a word with the others, whatever the main threads are at.

    A process that was stopped or killed is so noticed within a minute, while the others may wait for hours for one
    that measures.

    Args:
        processes: the processes of the run.
        lost: a function that is called in that thread, once, with what happened.
    """

    def __init__(self, processes: Processes, lost: Callable[[str], None]) -> None:
        self._processes, self._lost = processes, lost
        self._leaving, self._abandoned = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="hnkit heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._processes.count > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=_SILENCE)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._abandoned = kind is not None
        self._leaving.set()
        if self._thread.is_alive() and not self._abandoned:
            self._thread.join()

    def _beat(self) -> None:
        while not self._abandoned:
            leaving = torch.tensor(float(self._leaving.is_set()))
            try:
                torch.distributed.all_reduce(leaving, op=torch.distributed.ReduceOp.MAX, group=self._group)
            except RuntimeError as error:
                if not self._leaving.is_set():
                    silent = "timed out" in str(error).lower()  # gloo has no exception of its own
                    what = f"has not been heard of for {_SILENCE.seconds} s" if silent else "has gone"
                    self._lost(f"another process {what}")
                return
            if bool(leaving):
                return
            self._leaving.wait(_BEAT)


@torch.no_grad()
def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
