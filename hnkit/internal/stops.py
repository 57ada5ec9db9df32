"""Signals that end a command: raised where Python can see them, so that what is done is kept and the way on is said.

A process that SIGTERM, SIGHUP (the terminal is gone) or SIGUSR1 (what schedulers send ahead of their SIGKILL) ends by
itself says nothing of its folder. A training takes these signals, and SIGINT, in its own way while it runs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from hnkit.internal.workers import is_first

NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")
"""Each where the system has it; SIGINT is Python's KeyboardInterrupt."""
GRACE = 5.0
"""Seconds that the main thread gets to leave what it is at; schedulers follow with SIGKILL after 30."""
_ADVICE: list[str] = []


class Stopped(BaseException):
    """A signal has asked for the end; raised in the main thread."""

    everywhere = True

    def __init__(self, signum: int) -> None:
        super().__init__(stopped_words(signum))
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """As a shell shows a process that ended by that signal."""
        return 128 + self.signum


def stopped_words(signum: int) -> str:
    """What is said of a command that a signal has ended, with the way on where there is one."""
    return with_advice(f"stopped by {signal.Signals(signum).name}")


def with_advice(text: str) -> str:
    """A line on what has ended a command, with the way on where there is one."""
    return "; ".join([text, *_ADVICE[-1:]])


@contextlib.contextmanager
def advised(advice: str) -> Iterator[None]:
    """Inside, whatever a signal ends is said with this advice."""
    _ADVICE.append(advice)
    try:
        yield
    finally:
        _ADVICE.pop()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the signals of `NAMES` raise `Stopped`; one that the caller ignores (`nohup`) stays ignored.

    A main thread that does not leave within `GRACE` seconds, since it is inside a foreign function in which the
    interpreter runs no handlers, is ended from outside; what is on the disk is what a SIGKILL would have left.
    """
    numbers = [vars(signal)[name] for name in NAMES if name in vars(signal)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {
        signum: signal.signal(signum, _stop) for signum in numbers if signal.getsignal(signum) is not signal.SIG_IGN
    }
    arrivals, writer = socket.socketpair()
    writer.setblocking(False)
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(arrivals, frozenset(previous)), name="hnkit stops", daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        writer.close()  # which ends the watch
        watch.join()
        arrivals.close()


def _stop(signum: int, _: FrameType | None) -> None:
    raise Stopped(signum)


def _watch(arrivals: socket.socket, numbers: frozenset[int]) -> None:
    """Wait for a signal, which arrives here at once, and then for the end of the command."""
    while received := arrivals.recv(64):
        if not (asked := [number for number in received if number in numbers]):
            continue
        if _ends(arrivals):
            return
        if is_first():
            with contextlib.suppress(OSError, ValueError):
                print(f"hnkit: {stopped_words(asked[0])} (what was under way did not end)", file=sys.stderr, flush=True)
        os._exit(128 + asked[0])


def _ends(arrivals: socket.socket) -> bool:
    """Whether the command ends in time; more signals change nothing."""
    until = time.monotonic() + GRACE
    while (left := until - time.monotonic()) > 0:
        if select.select([arrivals], [], [], left)[0] and not arrivals.recv(64):
            return True
    return False
