"""A watch over a run: says what hangs, and sees to it that a process that was asked to stop does.

A thread of its own, since what hangs may be a reward that waits for a network for ever, or a collective operation
whose other side is gone, inside a foreign function in which the interpreter runs no signal handlers.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from hnkit import rewards
from hnkit.training.signals import StopSignals
from hnkit.training.view import TrainView

PATIENCE = 120.0
"""Seconds that a step may take before it is said what it is at, or ten times the longest step so far."""
GRACE = 15.0
"""Seconds that a step gets after SIGTERM, SIGHUP or SIGUSR1; schedulers follow with SIGKILL after 30."""
LAST_GRACE = 5.0
"""Seconds that the main thread then gets to leave by itself."""
_TICK = 0.25


class Watch:
    """While entered, a thread watches what the main thread is doing.

    Args:
        view: where to say so.
        stop: the signals of this run.
    """

    def __init__(self, view: TrainView, stop: StopSignals) -> None:
        self.view, self.stop = view, stop
        self.save: Callable[[], None] = lambda: None
        self._main = threading.main_thread()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hnkit watch", daemon=True)
        self._what, self._since, self._said = "", time.monotonic(), 0
        self._longest: dict[str, float] = {}
        self._asked: list[tuple[float, int]] = []
        self._pushed, self._answered = 0.0, False

    def __enter__(self) -> Self:
        if self.stop.arrivals is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def doing(self, what: str) -> None:
        """Say what begins; what was going on before has ended."""
        now, kind = time.monotonic(), self._what.rstrip("0123456789")
        self._longest[kind] = max(self._longest.get(kind, 0.0), now - self._since)
        self._what, self._since, self._said = what, now, 0

    def end_process(self, code: int, reason: str) -> None:
        """Write a checkpoint from this thread, once the state is steady, and end the process, stuck as it is."""
        with self.stop.steady:
            if self._ended.is_set():
                return
            self.save()
            self.view.warn(reason)
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    continue
            os._exit(code)

    def _watch(self) -> None:
        assert self.stop.arrivals is not None
        while not self._ended.is_set():
            ready, _, _ = select.select([self.stop.arrivals], [], [], _TICK)
            if ready:
                numbers = [number for number in self.stop.arrivals.recv(64) if number in self.stop.numbers]
                if self._pushed and not self._answered and numbers:
                    self._answered = bool(numbers.pop())  # its own
                self._tell(numbers)
                self._asked += [(time.monotonic(), number) for number in numbers]
            self._look()

    def _tell(self, numbers: list[int]) -> None:
        for number in numbers:
            name = signal.Signals(number).name
            more = "stopping after what is under way; a second one stops at once" if not self._asked else "stopping now"
            self.view.warn(f"{name} received: {more}")

    def _look(self) -> None:
        now = time.monotonic()
        longest = self._longest.get(self._what.rstrip("0123456789"), 0.0)
        taken, patience = now - self._since, max(PATIENCE, 10 * longest) * 2**self._said
        if self._what and taken > patience:
            self._said += 1
            self.view.warn(f"{self._what} has taken {taken:.0f} s so far, {self.where()}")
        due = self._due()
        if due is None or now < due:
            return
        signum = self._asked[0][1]
        if not self._pushed:
            self._pushed = now
            self.view.warn(f"{self._what or 'what is under way'} does not end, {self.where()}: it is given up")
            push(self._main, signum)
        elif now > self._pushed + LAST_GRACE:
            self.end_process(128 + signum, "ended from outside the main thread, which did not answer; resume the run")

    def _due(self) -> float | None:
        """When the main thread has to leave what it is at; `None`: nobody has asked."""
        urgent = [at + GRACE for at, number in self._asked if number != signal.SIGINT]
        repeated = [at + LAST_GRACE for at, _ in self._asked[1:]]
        return min([*urgent, *repeated], default=None)

    def where(self) -> str:
        """What the main thread is at: the reward, where it is in one, and the innermost function."""
        frame: FrameType | None = sys._current_frames().get(self._main.ident or 0)
        if frame is None:
            return "the main thread is gone"
        code, line = frame.f_code, frame.f_lineno
        place = f"in {code.co_name} ({code.co_filename}:{line})"
        while frame is not None:
            if frame.f_code is rewards.score.__code__:
                reward: Any = frame.f_locals.get("reward")
                return f"in the reward {reward.name!r}, {place}"
            frame = frame.f_back
        return place


def push(thread: threading.Thread, signum: int) -> None:
    """Send a signal to a thread, so that a blocking call in it returns and its handler runs."""
    if "pthread_kill" in vars(signal) and thread.ident is not None:
        signal.pthread_kill(thread.ident, signum)
    else:
        signal.raise_signal(signum)
