"""Seeds as pure functions of (seed, purpose, position): every draw of hnkit comes from one."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from hnkit.errors import InputError


def derived_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed: the first bits of SHA-256 of seed, purpose and position."""
    text = "/".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator that depends on seed, purpose and position alone."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *position))


def image_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of image number `index` of a prompt: all that is drawn for it comes from `generator_for(this, purpose)`.

    So an image is the same whatever is made beside it, before it, or by another process. The prompt comes last, so
    that no text can pass for another number.
    """
    return derived_seed(seed, f"image/{index}/{prompt}")


def forked(generator: torch.Generator, purpose: str) -> torch.Generator:
    """A CPU generator that depends on the state of another and on the purpose alone; the other is left as it is."""
    digest = hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()
    return generator_for(0, f"{purpose}/{digest}")


def seed_global(seed: int, purpose: str, *position: int) -> None:
    """Seed every global generator, for models and rewards that draw from one behind our back."""
    value = derived_seed(seed, purpose, *position)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - the global generator is the one meant


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Give the caller every global generator back as it was, whatever has been drawn or seeded inside."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        # a device that is not in use yet has no state to give back, and asking for it would take it into use
        used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if used else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def check_generator(generator: object) -> None:
    """Raise `InputError` unless it is a `torch.Generator` or `None`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator {generator!r} is no torch.Generator: give torch.Generator().manual_seed(seed)")
