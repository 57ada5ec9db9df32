"""How dark an image is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hnkit.backend import Reward
from hnkit.rewards import CallableReward


def darkness(*, weight: float = 1.0, power: float = 1.0) -> Reward:
    """One minus the mean brightness, raised to a power: a score in [0, 1], differentiable in the images."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (1 - images.float().mean((1, 2, 3))) ** power

    return CallableReward("darkness", weight, score)
