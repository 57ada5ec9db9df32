"""What the training stages share: prompt sampling, exponential moving averages, progress lines, the AE."""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from hnkit.internal.files import write_json
from hnkit.scaled.digits.scenes import KIND_WEIGHTS, KINDS, Kind, Prompt, all_prompts, train_prompts

Network = TypeVar("Network", bound=nn.Module)


class PromptSampler:
    """Training prompts at random, kinds in fixed proportions."""

    def __init__(self, seed: int, weights: Mapping[Kind, float] = KIND_WEIGHTS) -> None:
        """Group the training sentences by kind.

        Args:
            seed: Seed of the draws.
            weights: Proportions of the kinds.
        """
        self.rng = random.Random(seed)
        prompts = [all_prompts()[text] for text in train_prompts()]
        self._groups = [[p for p in prompts if p.kind == kind] for kind in KINDS]
        self._weights = [weights[kind] for kind in KINDS]

    def __call__(self, n: int) -> list[Prompt]:
        """Draw n prompts."""
        return [self.rng.choice(group) for group in self.rng.choices(self._groups, self._weights, k=n)]


class Average(Generic[Network]):
    """Exponential moving average of a module's parameters, with warm-up."""

    def __init__(self, module: Network, decay: float) -> None:
        """Copy the module.

        Args:
            module: What is trained.
            decay: Weight of the past at each update, once warm.
        """
        self.module: Network = copy.deepcopy(module)
        self.module.requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the current parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), [p.detach() for p in module.parameters()], 1 - decay)


def cosine(step: int, steps: int, *, warmup: int = 200, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def optimiser(
    parameters: Sequence[nn.Parameter], lr: float, steps: int, decay: float = 0.01
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW under the cosine schedule."""
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=decay, foreach=True)
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: cosine(step, steps))


def steps_logged(steps: int, every: int, log: Mapping[str, Tensor | float], label: str) -> Iterator[int]:
    """Count steps and print the running figures in `log` now and then."""
    start = time.monotonic()
    for step in range(steps):
        yield step
        if (step + 1) % every == 0 or step + 1 == steps:
            figures = "  ".join(f"{k} {float(v):.4f}" for k, v in log.items())
            print(f"{label} {step + 1}/{steps}  {figures}  {time.monotonic() - start:.0f} s", flush=True)


def record(work: Path, key: str, figures: Mapping[str, Any]) -> None:
    """Merge measured figures into ``figures.json`` of the work folder."""
    path = work / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[key] = dict(figures)
    write_json(path, known)


def recorded(work: Path, key: str) -> dict[str, Any]:
    """Figures that `record` wrote under a key."""
    figures: dict[str, Any] = json.loads((work / "figures.json").read_text())[key]
    return figures


def load_autoencoder(work: Path) -> AutoencoderDC:
    """The trained autoencoder of the work folder, frozen."""
    vae: AutoencoderDC = AutoencoderDC.from_pretrained(work / "vae", local_files_only=True)
    return vae.requires_grad_(False).eval()
