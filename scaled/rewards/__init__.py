"""Rewards on images: each a plain callable `(images, prompts) -> (n,)` with a name and a weight.

Every name below is an entry point of the group `hnkit.rewards`: a function of keyword options, among them `weight`
and `device`, that returns the reward. Model libraries are imported when a reward is built, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hnkit.backend import Reward

__all__ = ["Redness", "aesthetic", "clipscore", "hpsv2", "imagereward", "legibility", "pickscore", "redness"]


@dataclass(frozen=True)
class Redness:
    """`(R - (G + B) / 2) / 100` averaged over the pixels, the paper's illustrative reward (appendix B.1)."""

    weight: float = 1.0
    name: str = "redness"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:  # noqa: ARG002
        """Scores of `images` `(n, 3, H, W)` in [0, 1]: `(n,)` float32, between -0.01 and 0.01."""
        red, green, blue = images.float().mean(dim=(-2, -1)).unbind(-1)
        return (red - (green + blue) / 2) / 100


def redness(*, weight: float = 1.0, device: str = "cpu") -> Reward:  # noqa: ARG001
    """The redness reward; it has no weights to load."""
    return Redness(weight)


def clipscore(**options: Any) -> Reward:
    """CLIPScore; see `scaled.rewards.clip.clipscore`."""
    from scaled.rewards import clip

    return clip.clipscore(**options)


def pickscore(**options: Any) -> Reward:
    """PickScore; see `scaled.rewards.clip.pickscore`."""
    from scaled.rewards import clip

    return clip.pickscore(**options)


def hpsv2(**options: Any) -> Reward:
    """HPSv2.1; see `scaled.rewards.clip.hpsv2`."""
    from scaled.rewards import clip

    return clip.hpsv2(**options)


def imagereward(**options: Any) -> Reward:
    """ImageReward; see `scaled.rewards.blip.imagereward`."""
    from scaled.rewards import blip

    return blip.imagereward(**options)


def aesthetic(**options: Any) -> Reward:
    """An aesthetic-style linear head on CLIP; see `scaled.rewards.clip.aesthetic`."""
    from scaled.rewards import clip

    return clip.aesthetic(**options)


def legibility(**options: Any) -> Reward:
    """How clearly the miniature's digits can be read; see `scaled.digits.rewards`."""
    from scaled.digits import rewards

    return rewards.legibility(**options)
