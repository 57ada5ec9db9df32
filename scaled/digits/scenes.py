"""The world of the digits model: prompts in GenEval's six kinds, the scenes they describe, and their rendering.

A scene is a 32 x 32 RGB canvas of 2 x 2 cells; each cell is empty or holds one handwritten digit (a scan of
scikit-learn's ``load_digits``) in one of six colours. Whatever a prompt leaves unsaid (which cells, which
handwriting, the colours, the shade of the background) is drawn at random, so that it is left to the noise of a
generator trained on these pairs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hnkit.errors import InputError
from hnkit.internal.values import shown

Kind = Literal["single", "two", "counting", "colours", "position", "attribution"]
Split = Literal["generator", "scorer", "judge"]

KINDS: tuple[Kind, ...] = ("single", "two", "counting", "colours", "position", "attribution")
KIND_WEIGHTS: Mapping[Kind, float] = {
    "single": 1.0,
    "two": 1.5,
    "counting": 1.5,
    "colours": 1.5,
    "position": 2.0,
    "attribution": 2.5,
}
"""Proportions of the kinds in all training: four training sentences of five are of the last kind."""
DIGITS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS: tuple[str, ...] = (
    "zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines",
)  # fmt: skip
PALETTE: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "red": (1.0, 0.15, 0.15),
        "yellow": (1.0, 0.9, 0.1),
        "green": (0.15, 0.9, 0.2),
        "cyan": (0.1, 0.9, 0.95),
        "blue": (0.25, 0.35, 1.0),
        "magenta": (1.0, 0.2, 0.9),
    }
)
COLOURS: tuple[str, ...] = tuple(PALETTE)
NUMBERS: Mapping[str, int] = MappingProxyType({"two": 2, "three": 3, "four": 4})
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
VOCABULARY: tuple[str, ...] = (
    *("a", "an", "and", "of", "left", "right", "above", "below"),
    *COLOURS,
    *DIGITS,
    *PLURALS,
)

CANVAS = 32
CELL = 16
CELLS = 4
MAX_WORDS = 7
MIN_CONTRAST = 0.1
EMPTY = -1
_SPLIT_SEED = 20250809
_EVAL_SEED = 7


@dataclass(frozen=True)
class Prompt:
    """What one sentence asks for.

    Attributes:
        kind: One of GenEval's six kinds.
        digits: The digits named, in the order of the sentence (1 or 2 of them).
        colours: One colour index per digit, or None where the sentence names none.
        count: How many copies of the digit (kind ``counting``), else 1.
        relation: One of ``RELATIONS`` (kind ``position``), else None.
    """

    kind: Kind
    digits: tuple[int, ...]
    colours: tuple[int | None, ...]
    count: int = 1
    relation: str | None = None

    @property
    def text(self) -> str:
        """The sentence itself."""
        if self.kind == "counting":
            number = next(word for word, value in NUMBERS.items() if value == self.count)
            return f"{number} {PLURALS[self.digits[0]]}"
        joint = " and " if self.relation is None else f" {self.relation} "
        return joint.join(_noun(d, c) for d, c in zip(self.digits, self.colours, strict=True))

    def holds(self, cells: Sequence[tuple[int, int]]) -> bool:
        """Whether a scene satisfies the sentence, by GenEval's rules.

        Counting asks for exactly that many; every other kind asks for the named objects and tolerates others.
        Left and right compare columns, above and below rows, of any two distinct cells with the named digits.

        Args:
            cells: (digit, colour) of the four cells in reading order, ``EMPTY`` as digit where there is none.

        Returns:
            True if the scene is correct.
        """
        found = [(i, d, c) for i, (d, c) in enumerate(cells) if d != EMPTY]
        first = [(i, c) for i, d, c in found if d == self.digits[0] and self.colours[0] in (None, c)]
        if self.kind == "counting":
            return len(first) == self.count
        if len(self.digits) == 1:
            return bool(first)
        second = [(i, c) for i, d, c in found if d == self.digits[1] and self.colours[1] in (None, c)]
        pairs = [(i, j) for i, _ in first for j, _ in second if i != j]
        return any(_related(i, j, self.relation) for i, j in pairs)


def _noun(digit: int, colour: int | None) -> str:
    words = DIGITS[digit] if colour is None else f"{COLOURS[colour]} {DIGITS[digit]}"
    return ("an " if words.startswith("eight") else "a ") + words


def _related(i: int, j: int, relation: str | None) -> bool:
    (row_i, col_i), (row_j, col_j) = divmod(i, 2), divmod(j, 2)
    match relation:
        case None:
            return True
        case "left of":
            return col_i < col_j
        case "right of":
            return col_i > col_j
        case "above":
            return row_i < row_j
        case _:
            return row_i > row_j


def truth_table(cells: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Which scenes satisfy which prompts; the tensor form of ``Prompt.holds``.

    Args:
        cells: (n, 4, 2) digit and colour of each cell.
        prompts: m sentences.

    Returns:
        (n, m) bool.
    """
    missing = -2
    named = torch.tensor([[(*p.digits, missing)[1] if k else p.digits[0] for k in (0, 1)] for p in prompts])
    shades = [[(*p.colours, None)[k] for k in (0, 1)] for p in prompts]
    hue = torch.tensor([[missing if c is None else c for c in row] for row in shades])
    count = torch.tensor([p.count if p.kind == "counting" else 0 for p in prompts])
    relation = torch.tensor([0 if p.relation is None else 1 + RELATIONS.index(p.relation) for p in prompts])
    allowed = torch.tensor(
        [
            [[float(i != j and _related(i, j, r)) for j in range(CELLS)] for i in range(CELLS)]
            for r in (None, *RELATIONS)
        ]
    )
    digit, colour = cells[:, None, :, None, 0], cells[:, None, :, None, 1]
    match = (digit == named[:, None]) & ((hue[:, None] == missing) | (colour == hue[:, None]))
    first, second = match.float().unbind(-1)
    pair = torch.einsum("nmi,mij,nmj->nm", first, allowed[relation], second) > 0
    number = first.sum(-1)
    alone = torch.where(count > 0, number == count, number > 0)
    return torch.where(named[:, 1] == missing, alone, pair)


# --- prompts -----------------------------------------------------------------------------------------------------


@cache
def all_prompts() -> Mapping[str, Prompt]:
    """Every sentence of the grammar.

    Returns:
        Read-only mapping from the sentence to its meaning (3,240 of them).
    """
    prompts = [Prompt("single", (d,), (None,)) for d in range(10)]
    prompts += [Prompt("counting", (d,), (None,), count=n) for n in NUMBERS.values() for d in range(10)]
    prompts += [Prompt("colours", (d,), (c,)) for d in range(10) for c in range(6)]
    pairs = [(d, e) for d in range(10) for e in range(10) if d != e]
    prompts += [Prompt("two", pair, (None, None)) for pair in pairs]
    prompts += [Prompt("position", pair, (None, None), relation=r) for pair in pairs for r in RELATIONS]
    hues = [(b, c) for b in range(6) for c in range(6) if b != c]
    prompts += [Prompt("attribution", pair, hue) for pair in pairs for hue in hues]
    return MappingProxyType({p.text: p for p in prompts})


def validate_prompt(text: str) -> Prompt:
    """Parse one prompt.

    Args:
        text: A sentence of the grammar; case and surrounding space do not matter.

    Returns:
        Its meaning.

    Raises:
        InputError: It is empty, too long, uses a word outside the vocabulary, or is no sentence of the grammar.
    """
    words = text.lower().split()
    if not words:
        raise InputError("the prompt is empty: write a sentence such as 'a red three and a blue seven'")
    if len(words) > MAX_WORDS:
        raise InputError(
            f"the prompt has {len(words)} words, the digits model takes at most {MAX_WORDS}: {shown(text)}"
        )
    unknown = next((word for word in words if word not in VOCABULARY), None)
    if unknown is not None:
        raise InputError(
            f"unknown word {unknown!r} in prompt {shown(text)}: the digits model knows digits zero to nine, "
            f"the colours {', '.join(COLOURS)}, counts two to four, and left of, right of, above, below, and"
        )
    prompt = all_prompts().get(" ".join(words))
    if prompt is None:
        raise InputError(
            f"cannot read prompt {shown(text)}: write it as 'a three', 'a three and a seven', 'three fours', "
            "'a red five', 'a two left of a nine' or 'a red three and a blue seven' (two different digits and colours)"
        )
    return prompt


def held_out_combination(digit: int, colour: int) -> bool:
    """Whether this digit in this colour is never named in a training prompt (10 of the 60 combinations)."""
    return colour == (digit + 3) % 6


def _names_held_out(prompt: Prompt) -> bool:
    pairs = zip(prompt.digits, prompt.colours, strict=True)
    return any(colour is not None and held_out_combination(digit, colour) for digit, colour in pairs)


@cache
def _splits() -> tuple[tuple[str, ...], tuple[str, ...]]:
    groups: dict[Kind, list[Prompt]] = {kind: [] for kind in KINDS}
    for prompt in all_prompts().values():
        groups[prompt.kind].append(prompt)
    rng = random.Random(_EVAL_SEED)
    evaluation: list[str] = []
    training: list[str] = []
    sizes: dict[Kind, int] = {"single": 3, "two": 12, "counting": 6, "position": 24}
    for kind, members in groups.items():
        if kind in ("colours", "attribution"):
            held = [p for p in members if _names_held_out(p)]
            evaluation += [p.text for p in (held if kind == "colours" else rng.sample(held, 24))]
            training += [p.text for p in members if not _names_held_out(p)]
            continue
        if kind in ("two", "position"):
            # A pair of digits is held out in both orders and all relations, else its mirror sentence gives it away.
            unordered = sorted({tuple(sorted(p.digits)) for p in members})
            chosen = set(rng.sample(unordered, 9))
            held = [p for p in members if tuple(sorted(p.digits)) in chosen]
            training += [p.text for p in members if tuple(sorted(p.digits)) not in chosen]
            evaluation += [p.text for p in rng.sample(held, sizes[kind])]
            continue
        chosen_texts = {p.text for p in rng.sample(members, sizes[kind])}
        evaluation += [p.text for p in members if p.text in chosen_texts]
        training += [p.text for p in members if p.text not in chosen_texts]
    return tuple(training), tuple(evaluation)


def train_prompts() -> tuple[str, ...]:
    """The sentences used for training, the same for generator, scorer and hypernetwork; disjoint from evaluation."""
    return _splits()[0]


@cache
def training_mixture() -> tuple[str, ...]:
    """The training sentences, each as often as the proportions of its kind ask for, to whole times.

    Those of the commonest kind stand there once, so that going through the mixture meets the kinds as generator and
    scorer met them.
    """
    groups: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    for text in train_prompts():
        groups[all_prompts()[text].kind].append(text)
    scale = max(len(groups[kind]) / KIND_WEIGHTS[kind] for kind in KINDS)
    times = {kind: round(scale * KIND_WEIGHTS[kind] / len(groups[kind])) for kind in KINDS}
    return tuple(text for kind in KINDS for text in groups[kind] for _ in range(times[kind]))


def eval_prompts() -> tuple[str, ...]:
    """The sentences kept for evaluation: all six kinds, built on combinations that no training prompt names."""
    return _splits()[1]


# --- scans -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scans:
    """Handwritten digits of one split.

    Attributes:
        images: (m, 8, 8) float32 ink in [0, 1].
        labels: (m,) int64 digit.
        by_digit: For each digit, the rows that show it.
    """

    images: Tensor
    labels: Tensor
    by_digit: tuple[tuple[int, ...], ...]


@cache
def load_scans(split: Split) -> Scans:
    """The scans of one of three disjoint splits: generator (half), scorer and judge (a quarter each).

    Args:
        split: ``generator``, ``scorer`` or ``judge``.

    Returns:
        The scans, a fixed random subset.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, DOI 10.24432/C50P49.
    """
    # Only training and evaluation on real scans need scikit-learn; generation and judging do not.
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(data.target))
    bounds = {"generator": (0, 899), "scorer": (899, 1348), "judge": (1348, 1797)}
    start, stop = bounds[split]
    rows = order[start:stop]
    images = torch.from_numpy((data.images[rows] / 16.0).astype(np.float32))
    labels = torch.from_numpy(data.target[rows].astype(np.int64))
    by_digit = tuple(tuple(torch.nonzero(labels == d).flatten().tolist()) for d in range(10))
    return Scans(images, labels, by_digit)


# --- scenes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What stands where: (digit, colour) of the four cells in reading order; digit ``EMPTY`` where there is none."""

    cells: tuple[tuple[int, int], ...]


def sample_scene(prompt: Prompt | None, rng: random.Random) -> Scene:
    """Draw a scene that a prompt describes; all that it leaves unsaid is uniform.

    Args:
        prompt: The sentence's meaning; None for any scene at all (one to four random digits).
        rng: Source of randomness.

    Returns:
        A scene with the named objects and no others.
    """
    cells = [(EMPTY, 0)] * CELLS
    if prompt is None:
        for place in rng.sample(range(CELLS), rng.randint(1, CELLS)):
            cells[place] = (rng.randrange(10), rng.randrange(6))
        return Scene(tuple(cells))
    digits, colours = prompt.digits * prompt.count, prompt.colours * prompt.count
    while True:
        places = rng.sample(range(CELLS), len(digits))
        if prompt.relation is None or _related(places[0], places[1], prompt.relation):
            break
    for place, digit, colour in zip(places, digits, colours, strict=True):
        cells[place] = (digit, rng.randrange(6) if colour is None else colour)
    return Scene(tuple(cells))


def draw_cells(ink: Tensor, *, warp: float, generator: torch.Generator) -> Tensor:
    """Place 8 x 8 scans in 16 x 16 cells under random affine maps.

    Args:
        ink: (m, 8, 8) scans in [0, 1].
        warp: Strength of rotation, shear and scaling; 0 leaves only the scale 15/16 and a shift of up to one pixel.
        generator: Source of randomness.

    Returns:
        (m, 16, 16) ink in [0, 1].
    """
    m = len(ink)
    u = torch.rand(m, 6, generator=generator) * 2 - 1
    angle, shear = 0.3 * warp * u[:, 0], 0.25 * warp * u[:, 1]
    scale_x, scale_y = 16 / 15 + 0.15 * warp * u[:, 2], 16 / 15 + 0.15 * warp * u[:, 3]
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.stack(
        [
            torch.stack([cos * scale_x, (shear - sin) * scale_y, u[:, 4] * (1 + warp) / 8], -1),
            torch.stack([sin * scale_x, cos * scale_y, u[:, 5] * (1 + warp) / 8], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [m, 1, CELL, CELL], align_corners=False)
    return F.grid_sample(ink[:, None], grid, align_corners=False)[:, 0].clamp(0, 1)


def render(
    scenes: Sequence[Scene], scans: Scans, *, seed: int, warp: float = 0.0, spoiled: Tensor | None = None
) -> Tensor:
    """Render scenes in random handwriting, shades and backgrounds.

    Args:
        scenes: What to draw.
        scans: The handwriting to draw with.
        seed: Seed of everything random.
        warp: Strength of the random affine maps, see ``draw_cells``.
        spoiled: (n, 4) bool, cells whose digit is fused with a scan of another one and so made illegible.

    Returns:
        (n, 3, 32, 32) float32 images in [0, 1].
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    n = len(scenes)
    palette = torch.tensor(list(PALETTE.values()))
    flat = [cell for scene in scenes for cell in scene.cells]
    shown = torch.tensor([d != EMPTY for d, _ in flat])
    rows = [rng.choice(scans.by_digit[d]) if d != EMPTY else 0 for d, _ in flat]
    mask = draw_cells(scans.images[rows], warp=warp, generator=generator)
    if spoiled is not None:
        fused = [rng.choice(scans.by_digit[(d + rng.randrange(1, 10)) % 10]) if d != EMPTY else 0 for d, _ in flat]
        other = draw_cells(scans.images[fused], warp=warp, generator=generator)
        half = torch.cat([mask[:, : CELL // 2], other[:, CELL // 2 :]], 1)
        coin = torch.rand(len(flat), generator=generator) < 0.5
        wrong = torch.where(coin[:, None, None], torch.maximum(mask, other), half)
        mask = torch.where(spoiled.flatten()[:, None, None], wrong, mask)
    mask = mask * shown[:, None, None]
    colour = palette[[c for _, c in flat]]
    brightness = 0.75 + 0.25 * torch.rand(len(flat), 1, generator=generator)
    tint = 0.08 * (torch.rand(len(flat), 3, generator=generator) * 2 - 1)
    colour = (colour * brightness + tint).clamp(0, 1)
    background = (0.15 * torch.rand(n, 1, 1, generator=generator) * torch.rand(n, 3, 1, generator=generator))[..., None]
    mask = mask.view(n, 2, 2, CELL, CELL).permute(0, 1, 3, 2, 4).reshape(n, 1, CANVAS, CANVAS)
    paint = colour.view(n, 2, 2, 3).permute(0, 3, 1, 2)
    paint = paint.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
    return background * (1 - mask) + paint * mask


def split_cells(images: Tensor) -> Tensor:
    """Cut images into their four cells.

    Args:
        images: (n, c, 32, 32).

    Returns:
        (n, 4, c, 16, 16), in reading order.
    """
    n, c = images.shape[:2]
    cells = images.view(n, c, 2, CELL, 2, CELL).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(n, CELLS, c, CELL, CELL)


def normalise_ink(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Ink of coloured cells: the brightest channel, background removed, peak (where above 0.1) scaled to 1.

    Args:
        cells: (m, 3, 16, 16) in [0, 1].

    Returns:
        Ink (m, 16, 16) and its peak before scaling (m,).
    """
    value = cells.amax(1)
    floor = value.flatten(1).quantile(0.2, dim=1)
    ink = (value - floor[:, None, None]).clamp(min=0)
    peak = ink.flatten(1).amax(1)
    # Faint cells stay faint: a cell without ink must not become noise at full contrast, nor its gradient huge.
    return ink / peak.clamp(min=MIN_CONTRAST)[:, None, None], peak
