"""Signals that end a run: noted while a step is taken, acted on at once elsewhere, and never in the middle of a write.

SIGTERM, SIGINT, SIGHUP (the terminal is gone) and SIGUSR1 (what schedulers send ahead of their SIGKILL) all ask for the
same: a checkpoint, and the end. The first lets the present step finish; a second one gives the step up.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

import torch

from hnkit.internal.stops import Stopped
from hnkit.training.processes import Processes

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGBREAK")
"""Each where the system has it."""


class StopSignals:
    """While entered, the signals of `NAMES` ask for a stop; one that the caller ignores (`nohup`) stays ignored.

    Attributes:
        received: the first signal, or 0.
        count: how many there were.
        steady: held while what a checkpoint holds is being changed or written.
        arrivals: a socket on which the number of each signal arrives at once, even while the interpreter is inside a
            foreign function and cannot run its handlers; `None` outside the main thread.
    """

    def __init__(self) -> None:
        self.received = self.count = 0
        self.steady = threading.RLock()
        self.arrivals: socket.socket | None = None
        self._deferred = self._masked = 0
        self._previous: dict[int, Any] = {}
        self._writer: socket.socket | None = None
        self._previous_fd = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.arrivals, self._writer = socket.socketpair()
            self.arrivals.setblocking(False)
            self._writer.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for name in NAMES:
                signum = vars(signal).get(name)
                if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if self.arrivals is not None and self._writer is not None:
            signal.set_wakeup_fd(self._previous_fd)
            self._writer.close()
            self.arrivals.close()

    @property
    def numbers(self) -> frozenset[int]:
        """The signals that are taken."""
        return frozenset(self._previous)

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.received = self.received or signum
        self.count += 1
        if not self._masked and (not self._deferred or self.count > 1):
            raise Stopped(self.received)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal is noted and no more; a second one raises."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def over(self) -> None:
        """The run has ended, one way or the other: from here on no signal raises."""
        self._masked += 1

    @contextlib.contextmanager
    def masked(self) -> Iterator[None]:
        """Inside, no signal raises; for the moments in which the state of the run changes or is written."""
        self._masked += 1
        try:
            with self.steady:
                yield
        finally:
            self._masked -= 1

    def agreed(self, processes: Processes, device: torch.device) -> int:
        """The signal that any of the processes has received, the same answer on all; 0 for none."""
        if processes.count == 1:
            return self.received
        seen = torch.tensor(float(self.received), device=device)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        return int(seen)
