"""A signal ends a command in one line, inside a foreign function too, and gives the caller's handlers back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from hnkit.cli.app import describe_error
from hnkit.internal.stops import Stopped, advised, stoppable

STUCK = """
import ctypes, os, signal, sys, threading
from hnkit.internal import stops
stops.GRACE = 0.3
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
with stops.stoppable(), stops.advised("go on with x"):
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
    lock(mutex), lock(mutex)  # the second never returns, and no signal handler of the interpreter can run
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_each_signal_is_raised_and_the_handlers_come_back(name):
    signum = getattr(signal, name)
    before = signal.getsignal(signum)

    def stuck() -> None:
        with stoppable(), advised("go on with x"):
            os.kill(os.getpid(), signum)
            time.sleep(60)

    with pytest.raises(Stopped) as stopped:
        stuck()
    assert describe_error(stopped.value) == (f"stopped by {name}; go on with x", 128 + signum)
    assert signal.getsignal(signum) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_the_caller_ignores_stays_ignored():
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_process_stuck_in_a_foreign_function_is_ended():
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGUSR1, "")
    assert done.stderr == "hnkit: stopped by SIGUSR1; go on with x (what was under way did not end)\n"
