"""What every test starts from."""

from __future__ import annotations

import gc
import signal

# A shell starts background commands with SIGINT ignored, and nohup ignores SIGHUP; the tests send both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """What the imports have left is there to stay: no collection of cycles needs to look through it again."""
    gc.collect()
    gc.freeze()
