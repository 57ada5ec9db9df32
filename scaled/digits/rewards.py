"""Rewards of the digits world: the bundled contrastive scorer and legibility.

Each is a plain callable from images (n, 3, 32, 32) in [0, 1] and n prompts to (n,) float32, differentiable in the
images. Neither shares data or architecture with the judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.scaled.digits.checkpoint import CANVAS, CLIP_FOLDER, LEGIBILITY_FILE, verified_folder
from hnkit.scaled.digits.scenes import CELL, CELLS, MIN_CONTRAST, split_cells
from hnkit.scaled.rewards.clip import ClipReward, clipscore
from hnkit.scaled.rewards.memory import OffCard

PRESENCE_THRESHOLD = 0.35
PRESENCE_WIDTH = 0.05
SOFTNESS = 0.05
NOT_A_DIGIT = 10


class InkClassifier(nn.Module):
    """Patch MLP over one cell's ink: ten digits and `NOT_A_DIGIT`."""

    def __init__(self) -> None:
        """Build the layers, untrained."""
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 4, stride=2, padding=1)
        self.mix = nn.Conv2d(32, 64, 4, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 16, 128)
        self.out = nn.Linear(128, NOT_A_DIGIT + 1)

    def forward(self, ink: Tensor) -> Tensor:
        """Logits (m, 11) of ink (m, 16, 16) with peak 1."""
        h = F.gelu(self.mix(F.gelu(self.stem(ink[:, None]))))
        h = F.dropout(h.flatten(1), 0.3, self.training)
        out: Tensor = self.out(F.gelu(self.hidden(h)))
        return out


def smooth_ink(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Ink of coloured cells as `normalise_ink` has it, but with smooth maxima, so that no gradient sits on one pixel.

    With S_t(v) = sum_i v_i e^(v_i/t) / sum_i e^(v_i/t), the smooth maximum (minimum for t < 0), and v the smooth
    maximum over channels: ink = (v - S_-t(v))_+ / max(S_t(v - S_-t(v)), 0.1), t = 0.05.

    Args:
        cells: (m, 3, 16, 16) in [0, 1].

    Returns:
        Ink (m, 16, 16) and its peak before scaling (m,).
    """
    value = ((cells / SOFTNESS).softmax(1) * cells).sum(1).flatten(1)
    floor = ((-value / SOFTNESS).softmax(1) * value).sum(1, keepdim=True)
    ink = (value - floor).clamp(min=0)
    peak = ((ink / SOFTNESS).softmax(1) * ink).sum(1)
    ink = ink / peak.clamp(min=MIN_CONTRAST)[:, None]
    return ink.view(-1, CELL, CELL), peak


def _check(images: Tensor, prompts: Sequence[str]) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, CANVAS, CANVAS):
        raise InputError(f"a digits reward takes images (n, 3, 32, 32) in [0, 1], not {tuple(images.shape)}")
    if len(prompts) != len(images):
        raise InputError(f"a digits reward takes one prompt per image: got {len(prompts)} for {len(images)} images")


class Legibility:
    """How surely each thing drawn is some digit.

    With w_c in [0, 1] the presence of ink in cell c and p_c the classifier's probability that the ink is a digit at
    all, times the probability of the likeliest digit given that:

        r = sum_c w_c p_c / (0.1 + sum_c w_c)    in [0, 1).
    """

    def __init__(self, classifier: InkClassifier) -> None:
        """Use a trained classifier.

        Args:
            classifier: Frozen here.
        """
        self.classifier = classifier.float().eval().requires_grad_(False)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images.

        Args:
            images: (n, 3, 32, 32) in [0, 1].
            prompts: n sentences; their number is checked, their content does not matter.

        Returns:
            (n,) float32.

        Raises:
            InputError: Wrong shapes.
        """
        _check(images, prompts)
        ink, peak = smooth_ink(split_cells(images.float()).reshape(-1, 3, CELL, CELL))
        likeliest: Tensor = self.classifier(ink).softmax(1)[:, :NOT_A_DIGIT].amax(1)
        weight = torch.sigmoid((peak - PRESENCE_THRESHOLD) / PRESENCE_WIDTH)
        score: Tensor = (weight * likeliest).view(-1, CELLS).sum(1) / (0.1 + weight.view(-1, CELLS).sum(1))
        return score


def legibility(folder: str | Path | None = None, *, device: str = "cpu") -> Legibility:
    """The bundled legibility reward.

    Args:
        folder: A verified model folder; by default the bundled one, verified here.
        device: Where it runs.

    Returns:
        The reward.

    Raises:
        InputError: A bundled file is missing or damaged.
    """
    folder = verified_folder() if folder is None else Path(folder)
    classifier = InkClassifier()
    classifier.load_state_dict(load_file(folder / LEGIBILITY_FILE))
    return Legibility(classifier.to(device))


def scorer(folder: str | Path | None = None, *, weight: float = 1.0, device: str = "cpu") -> ClipReward | OffCard:
    """The bundled contrastive scorer: CLIPScore by a small CLIP trained on scenes and sentences.

    Args:
        folder: A verified model folder; by default the bundled one, verified here.
        weight: Its weight in a sum of rewards.
        device: Where it runs.

    Returns:
        The reward `exp(logit_scale) cos(image, sentence)`.

    Raises:
        InputError: A bundled file is missing or damaged.
    """
    folder = verified_folder() if folder is None else Path(folder)
    reward = clipscore(weight=weight, model_id=str(folder / CLIP_FOLDER), device=device)
    reward.name = "digits-clip"
    return reward
