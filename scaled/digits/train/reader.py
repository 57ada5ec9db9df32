"""Stages 5 and 6: classifiers of single cells, one for the judge and one (other data, other net) for legibility."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hnkit.scaled.digits.judge import ILLEGIBLE, DigitReader, Judge
from hnkit.scaled.digits.rewards import InkClassifier, smooth_ink
from hnkit.scaled.digits.scenes import (
    CELL,
    EMPTY,
    PALETTE,
    Scans,
    Split,
    draw_cells,
    load_scans,
    normalise_ink,
    render,
    sample_scene,
)
from hnkit.scaled.digits.train.common import Average, optimiser, record, steps_logged

InkOf = Callable[[Tensor], tuple[Tensor, Tensor]]


def _blur(ink: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    kernel = (kernel[:, None] * kernel / 256)[None, None]
    for _ in range(3):
        ink = F.conv2d(F.pad(ink[:, None], (2, 2, 2, 2), mode="replicate"), kernel)[:, 0]
    return ink


def training_cells(scans: Scans, ink_of: InkOf, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cells with digits, and with ink that is none: blends, halves, blurs, noise.

    Args:
        scans: Handwriting.
        ink_of: Extracts ink (m, 16, 16) and peak from cells (m, 3, 16, 16).
        n: Number of cells; a quarter of them are illegible.
        generator: Source of randomness.

    Returns:
        Normalised ink (n, 16, 16) and labels (n,).
    """
    rows = torch.randint(len(scans.labels), (n,), generator=generator)
    ink, labels = draw_cells(scans.images[rows], warp=1.0, generator=generator), scans.labels[rows].clone()
    bad = n // 4
    other = torch.randint(len(scans.labels), (bad,), generator=generator)
    second = draw_cells(scans.images[other], warp=1.0, generator=generator)
    kind = torch.randint(4, (bad,), generator=generator)
    blend = torch.maximum(ink[:bad], second) * (scans.labels[other] != labels[:bad])[:, None, None]
    half = ink[:bad].clone()
    half[:, CELL // 2 :] = second[:, : CELL // 2]
    noise = F.interpolate(torch.rand(bad, 1, 6, 6, generator=generator), CELL, mode="bilinear")[:, 0]
    choices = torch.stack([blend, half, _blur(ink[:bad]), noise.clamp(min=0.5) - 0.5])
    ink = torch.cat([choices[kind, torch.arange(bad)], ink[bad:]])
    labels[:bad] = ILLEGIBLE
    shade = torch.tensor(list(PALETTE.values()))[torch.randint(6, (n,), generator=generator)]
    background = 0.15 * torch.rand(n, 3, 1, 1, generator=generator)
    mask = ink[:, None]
    cells = background * (1 - mask) + mask * shade[:, :, None, None] * 0.9
    cells = cells + 0.04 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(cells.shape, generator=generator)
    return ink_of(cells.clamp(0, 1))[0], labels


def train_reader(
    build: Callable[[], nn.Module],
    ink_of: InkOf,
    split: Split,
    path: Path,
    *,
    seed: int,
    steps: int,
    label: str,
    batch: int = 128,
) -> nn.Module:
    """Train one classifier of cells and write its weights.

    Args:
        build: Makes the untrained network.
        ink_of: Extracts ink (m, 16, 16) and peak from cells (m, 3, 16, 16).
        split: The handwriting it learns from.
        path: The safetensors file to write.
        seed: Seed of weights and data.
        steps: Optimiser steps.
        label: Name in the log.
        batch: Cells a step.

    Returns:
        The averaged network.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network, scans = build().train(), load_scans(split)
    log: dict[str, Tensor | float] = {}
    adam, schedule = optimiser(list(network.parameters()), 2e-3, steps, decay=0.02)
    average = Average(network, 0.998)
    for _ in steps_logged(steps, 250, log, label):
        ink, labels = training_cells(scans, ink_of, batch, generator)
        logits = network(ink)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.02)
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        schedule.step()
        average.update(network)
        log.update(loss=loss.detach(), accuracy=(logits.argmax(1) == labels).float().mean())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in average.module.state_dict().items()}, path)
    return average.module


def scene_accuracy(judge: Judge, split: Split, *, n: int, seed: int) -> dict[str, float]:
    """How well the judge reads real scenes: share of objects with digit right, with colour right, and of scenes."""
    rng = random.Random(seed)
    scenes = [sample_scene(None, rng) for _ in range(n)]
    cells, illegible = judge.read(render(scenes, load_scans(split), seed=seed))
    truth = torch.tensor([scene.cells for scene in scenes])
    shown = truth[..., 0] != EMPTY
    digit, colour = cells[..., 0] == truth[..., 0], cells[..., 1] == truth[..., 1]
    return {
        "digit": float(digit[shown].float().mean()),
        "colour": float(colour[shown].float().mean()),
        "empty": float(digit[~shown].float().mean()),
        "called_illegible": float(illegible.sum() / shown.sum()),
        "scene": float((digit & (colour | ~shown)).all(1).float().mean()),
        "objects": int(shown.sum()),
    }


def train_judge(work: Path, *, seed: int, steps: int) -> None:
    """Train the judge's reader on its own handwriting and measure it on everybody else's."""
    start = time.monotonic()
    reader = train_reader(
        DigitReader, normalise_ink, "judge", work / "judge.safetensors", seed=seed, steps=steps, label="judge"
    )
    assert isinstance(reader, DigitReader)
    judge = Judge(reader)
    figures = {
        f"on_{split}_handwriting": scene_accuracy(judge, split, n=2000, seed=seed) for split in ("generator", "scorer")
    }
    record(work, "judge", {**figures, "steps": steps, "seconds": round(time.monotonic() - start, 1)})
    print(figures, flush=True)


def train_legibility(work: Path, *, seed: int, steps: int) -> None:
    """Train the classifier behind the legibility reward, on the scorer's handwriting."""
    start = time.monotonic()
    path = work / "legibility.safetensors"
    network = train_reader(InkClassifier, smooth_ink, "scorer", path, seed=seed, steps=steps, label="legibility").eval()
    ink, labels = training_cells(load_scans("generator"), smooth_ink, 4000, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        share = float((network(ink).argmax(1) == labels).float().mean())
    record(
        work,
        "legibility",
        {"accuracy_unseen_handwriting": share, "steps": steps, "seconds": round(time.monotonic() - start, 1)},
    )
