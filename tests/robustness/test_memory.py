"""A process that loads the same model again and again keeps nothing of it."""

from __future__ import annotations

import ctypes
import gc

import pytest

from hnkit.backend import backend_factory


class Mallinfo2(ctypes.Structure):
    """glibc's account of the heap; `uordblks` and `hblkhd` are the bytes in use."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


@pytest.fixture
def heap():
    """Bytes that malloc has given out and not got back: exact, unlike the resident memory."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("the C library has no mallinfo2")
    mallinfo2.restype = Mallinfo2

    def in_use() -> int:
        gc.collect()
        info = mallinfo2()
        return info.uordblks + info.hblkhd

    return in_use


def test_prompts_encoded_by_a_pipeline_are_freed_with_it(heap):
    """The tokenizer's own cache, which outlives it, took 1.3 kB a prompt."""
    factory = backend_factory("digits")
    prompts = factory.load(None).prompts()[0][:800]

    def once():
        factory.load(None).prepare(prompts)

    for _ in range(2):  # what is loaded and cached once
        once()
    before = heap()
    for _ in range(3):
        once()
    assert (heap() - before) / 3 < 0.1 * 1300 * len(prompts)
