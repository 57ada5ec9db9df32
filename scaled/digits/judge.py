"""An independent judge in the manner of GenEval: find digits, classify them, read colours, check the sentence.

The judge looks at one 16 x 16 cell at a time with a small convolutional network trained on handwriting that neither the
generator nor any reward has seen. It is never trained on, never differentiated and never used for selection.

Source: D. Ghosh, H. Hajishirzi, L. Schmidt, GenEval, arXiv:2310.11513 (the six tasks and their rules).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hnkit.scaled.digits.scenes import (
    CELL,
    CELLS,
    EMPTY,
    KINDS,
    PALETTE,
    Kind,
    normalise_ink,
    split_cells,
    validate_prompt,
)

ILLEGIBLE = 10
MIN_PEAK = 0.35
MAX_COLOUR_DISTANCE = 0.45
UNCLEAR = -1


class DigitReader(nn.Module):
    """Convolutional classifier of one cell's ink into the ten digits and `ILLEGIBLE`."""

    def __init__(self) -> None:
        """Build the layers, untrained."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 5, padding=2)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4, 96)
        self.out = nn.Linear(96, 11)

    def forward(self, ink: Tensor) -> Tensor:
        """Logits.

        Args:
            ink: (m, 16, 16), peak 1.

        Returns:
            (m, 11).
        """
        h = F.max_pool2d(F.relu(self.conv1(ink[:, None])), 2)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)
        h = F.max_pool2d(F.relu(self.conv3(h)), 2)
        h = F.dropout(h.flatten(1), 0.3, self.training)
        out: Tensor = self.out(F.relu(self.hidden(h)))
        return out


def read_colour(cells: Tensor, ink: Tensor) -> Tensor:
    """Index into the palette of the ink's mean colour, or `UNCLEAR`.

    Args:
        cells: (m, 3, 16, 16) in [0, 1].
        ink: (m, 16, 16) from `normalise_ink`.

    Returns:
        (m,) int64.
    """
    weight = ink.square()[:, None]
    mean = (cells * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-6)
    mean = mean / mean.amax(1, keepdim=True).clamp(min=1e-6)
    palette = torch.tensor(list(PALETTE.values()))
    distance = torch.cdist(mean.cpu(), palette / palette.amax(1, keepdim=True))
    nearest = distance.argmin(1)
    return torch.where(distance.amin(1) < MAX_COLOUR_DISTANCE, nearest, UNCLEAR)


@dataclass(frozen=True)
class Verdict:
    """The judge's opinion of a batch.

    Attributes:
        correct: (n,) 1.0 where the image shows what its prompt asks for, else 0.0.
        cells: (n, 4, 2) digit (`EMPTY` where there is none or it is illegible) and colour of each cell.
        illegible: (n,) number of cells with ink that is no digit.
        kinds: Kind of each prompt.
    """

    correct: Tensor
    cells: Tensor
    illegible: Tensor
    kinds: tuple[Kind, ...]

    def by_kind(self) -> dict[Kind, float]:
        """Share of correct images per kind present."""
        return {
            kind: float(self.correct[[k == kind for k in self.kinds]].mean()) for kind in KINDS if kind in self.kinds
        }

    @property
    def score(self) -> float:
        """GenEval's overall score: the mean over the kinds present of their share of correct images."""
        shares = self.by_kind().values()
        return sum(shares) / len(shares)


class Judge:
    """Reads scenes and checks them against their prompts."""

    def __init__(self, reader: DigitReader) -> None:
        """Use a trained reader.

        Args:
            reader: The classifier of cells.
        """
        self.reader = reader.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path) -> Judge:
        """Read the weights.

        Args:
            path: A safetensors file.

        Returns:
            The judge.
        """
        reader = DigitReader()
        reader.load_state_dict(load_file(path))
        return cls(reader)

    @torch.no_grad()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Find the digits of each image.

        Args:
            images: (n, 3, 32, 32) in [0, 1].

        Returns:
            cells (n, 4, 2) and the number of illegible cells (n,), as in `Verdict`.
        """
        cells = split_cells(images.detach().float().cpu().clamp(0, 1)).reshape(-1, 3, CELL, CELL)
        ink, peak = normalise_ink(cells)
        digit = self.reader(ink).argmax(1)
        inked = peak > MIN_PEAK
        legible = inked & (digit != ILLEGIBLE)
        found = torch.stack([torch.where(legible, digit, EMPTY), read_colour(cells, ink)], -1)
        return found.view(-1, CELLS, 2), (inked & ~legible).view(-1, CELLS).sum(1)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Verdict:
        """Judge images.

        Args:
            images: (n, 3, 32, 32) in [0, 1].
            prompts: Their n sentences.

        Returns:
            The verdict.

        Raises:
            InputError: A prompt is no sentence of the grammar.
        """
        parsed = [validate_prompt(text) for text in prompts]
        cells, illegible = self.read(images)
        correct = [p.holds([(d, c) for d, c in row]) for p, row in zip(parsed, cells.tolist(), strict=True)]
        return Verdict(torch.tensor(correct, dtype=torch.float32), cells, illegible, tuple(p.kind for p in parsed))
