"""Rewards on images: each a plain callable `(images, prompts) -> (n,)` with a name and a weight.

Every function that builds one is an entry point of the group `hnkit.rewards`: keyword options, among them `weight` and
`device`, give a reward. Those that need model libraries are in modules of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hnkit.backend import Reward
from hnkit.rewards import CallableReward

__all__ = ["Redness", "digits_clip", "legibility", "redness"]


@dataclass
class Redness:
    """`(R - (G + B) / 2) / 100` averaged over the pixels, the paper's illustrative reward (appendix B.1)."""

    weight: float = 1.0
    name: str = "redness"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:  # noqa: ARG002
        """Scores of `images` `(n, 3, H, W)` in [0, 1]: `(n,)` float32, between -0.01 and 0.01."""
        red, green, blue = images.float().mean(dim=(-2, -1)).unbind(-1)
        return (red - (green + blue) / 2) / 100


def redness(*, weight: float = 1.0) -> Reward:
    """The redness reward; it has no weights to load."""
    return Redness(weight)


def digits_clip(*, weight: float = 1.0, device: str = "cpu") -> Reward:
    """CLIPScore by the contrastive scorer that is bundled with the digits miniature."""
    from hnkit.scaled.digits import rewards

    return rewards.scorer(weight=weight, device=device)


def legibility(*, weight: float = 1.0, device: str = "cpu") -> Reward:
    """How clearly the miniature's digits can be read; see `hnkit.scaled.digits.rewards.Legibility`."""
    from hnkit.scaled.digits import rewards

    return CallableReward("legibility", weight, rewards.legibility(device=device))
