"""Cards by name: what each holds and how fast it computes.

The figures are those of NVIDIA's data sheets and whitepapers, which could not be opened where this was written. Figures
that are marked as seen were found in public tables that quote these documents (specification sheets of vendors and of
computing centres); the others are from memory. A tensor-core rate that is given with sparsity alone is halved.
"""

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
        source: the document that the figures are from, and which of them were seen quoted.
    """

    name: str
    title: str
    memory: float
    half: float
    single: float
    bandwidth: float
    source: str


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("rtx-3090", "GeForce RTX 3090", 24 * GIB, 71e12, 35.6e12, 936e9,
             "Ampere GA102 whitepaper; memory and single seen, half and bandwidth from memory"),
        Card("rtx-4090", "GeForce RTX 4090", 24 * GIB, 165.2e12, 82.6e12, 1008e9, "Ada whitepaper; all seen"),
        Card("a10", "A10", 24 * GIB, 125e12, 31.2e12, 600e9, "A10 data sheet; all seen but half, which is 4 single"),
        Card("l4", "L4", 24 * GIB, 121e12, 30.3e12, 300e9, "L4 data sheet; all seen, half with sparsity"),
        Card("a100-40gb", "A100 SXM 40 GB", 40 * GIB, 312e12, 19.5e12, 1555e9, "A100 data sheet; all seen"),
        Card("a6000", "RTX A6000", 48 * GIB, 154.8e12, 38.7e12, 768e9,
             "Ampere GA102 whitepaper; all seen but half, which is 4 single"),
        Card("l40s", "L40S", 48 * GIB, 362e12, 91.6e12, 864e9, "L40S data sheet; all seen"),
        Card("a100", "A100 SXM 80 GB", 80 * GIB, 312e12, 19.5e12, 2039e9, "A100 data sheet; all seen"),
        Card("h100", "H100 SXM 80 GB", 80 * GIB, 989.4e12, 66.9e12, 3350e9, "H100 whitepaper; all seen"),
        Card("h200", "H200 SXM 141 GB", 141e9, 989.4e12, 66.9e12, 4.8e12,
             "H200 data sheet; that it computes as the H100 seen, memory and bandwidth from memory"),
    )
}  # fmt: skip
"""Cards by name. Gigabytes of a card with a power-of-two size are 2^30 bytes, as its driver reports them."""

RESERVED = 1.5 * GIB
"""Bytes of a card that are kept free: the CUDA context, its libraries' workspaces, what the allocator cannot use."""
LAUNCH = 4e-6
"""Seconds that the smallest operation takes: the time in which a kernel is launched, an assumption too."""
SHARE = 0.4
"""Share of the roofline that a step is taken to reach: an assumption, not a measurement."""


def find_card(name: str) -> Card:
    """The card of this name, or of its maker's, in upper or lower case, with spaces or hyphens.

    Raises:
        InputError: it is not among the known ones.
    """
    for card in CARDS.values():
        if _plain(name) in (_plain(card.name), _plain(card.title)):
            return card
    raise InputError(f"unknown card {name!r}: accepted are {', '.join(CARDS)}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
