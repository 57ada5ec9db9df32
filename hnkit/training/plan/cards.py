"""Cards by name: what each holds and how fast it computes, from its maker's data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from hnkit.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One accelerator.

    Attributes:
        name: what it is called here.
        title: what its maker calls it.
        memory: bytes on it.
        half: dense bfloat16 operations per second, float32 sums.
        single: float32 operations per second outside the tensor cores, as torch multiplies float32 by default.
        bandwidth: bytes per second from and to its memory.
        source: where the figures stand.
    """

    name: str
    title: str
    memory: float
    half: float
    single: float
    bandwidth: float
    source: str


_AMPERE = "NVIDIA Ampere GA102 whitepaper"
_ADA = "NVIDIA Ada GPU architecture, appendix A"
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("rtx-3090", "GeForce RTX 3090", 24 * GIB, 71e12, 35.6e12, 936e9, f"{_AMPERE}, table 2"),
        Card("rtx-4090", "GeForce RTX 4090", 24 * GIB, 165.2e12, 82.6e12, 1008e9, f"{_ADA}, table 2"),
        Card("a10", "A10", 24 * GIB, 125e12, 31.2e12, 600e9, "NVIDIA A10 data sheet"),
        Card("l4", "L4", 24 * GIB, 121e12, 30.3e12, 300e9, "NVIDIA L4 data sheet, half of the figures with sparsity"),
        Card("a100-40gb", "A100 SXM 40 GB", 40 * GIB, 312e12, 19.5e12, 1555e9, "NVIDIA A100 data sheet"),
        Card("a6000", "RTX A6000", 48 * GIB, 154.8e12, 38.7e12, 768e9, f"{_AMPERE}, table 10"),
        Card("l40s", "L40S", 48 * GIB, 362e12, 91.6e12, 864e9, "NVIDIA L40S data sheet, without sparsity"),
        Card("a100", "A100 SXM 80 GB", 80 * GIB, 312e12, 19.5e12, 2039e9, "NVIDIA A100 data sheet"),
        Card("h100", "H100 SXM 80 GB", 80 * GIB, 989.4e12, 66.9e12, 3352e9, "NVIDIA H100 whitepaper, table 2"),
        Card("h200", "H200 SXM 141 GB", 141e9, 989.4e12, 66.9e12, 4.8e12, "NVIDIA H200 data sheet, without sparsity"),
    )
}
"""Cards by name. Gigabytes of a card with a power-of-two size are 2^30 bytes, as its driver reports them."""

RESERVED = 1.5 * GIB
"""Bytes of a card that are kept free: the CUDA context, its libraries' workspaces, what the allocator cannot use."""
LAUNCH = 4e-6
"""Seconds that the smallest operation takes: the time in which a kernel is launched, an assumption too."""
SHARE = 0.4
"""Share of the roofline that a step is taken to reach: an assumption, not a measurement."""


def find_card(name: str) -> Card:
    """The card of this name.

    Raises:
        InputError: it is not among the known ones.
    """
    if name not in CARDS:
        raise InputError(f"unknown card {name!r}: accepted are {', '.join(CARDS)}")
    return CARDS[name]
