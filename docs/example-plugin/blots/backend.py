"""A generator of blots, one step from noise to image, with a small trainable network on its noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hnkit import InputError
from hnkit.backend import BackendBase
from hnkit.maps import Condition

COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 1.0, 0.1), "blue": (0.1, 0.1, 1.0)}
WEIGHTS = "adapter.safetensors"


@dataclass(frozen=True)
class BlotsOptions:
    """What the table `[backend]` may hold.

    Attributes:
        width: channels of the hypernetwork's hidden layer.
        seed: seed of its initial weights; the last layer starts at zero.
    """

    width: int = 16
    seed: int = 0


class Hypernetwork(nn.Module):
    """f: two convolutions, the second zero at the start, with the prompt's colour as further channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1 + 3, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        """The delta `(n, 1, 8, 8)` of the noise."""
        colour = condition.tensors["colour"].to(noise)[:, :, None, None].expand(-1, -1, *noise.shape[2:])
        return self.last(F.silu(self.first(torch.cat([noise, colour], dim=1))))


class Blots(BackendBase):
    """Noise `(1, 8, 8)` to an image `(3, 32, 32)`: the noise, smoothed and enlarged, is the ink."""

    name = "blots"
    noise_shape = (1, 8, 8)
    max_steps = 1

    def __init__(self, options: BlotsOptions) -> None:
        torch.manual_seed(options.seed)
        self.hypernetwork = Hypernetwork(options.width)

    def prompts(self) -> tuple[list[str], list[str]]:
        """Training prompts, and held-out ones."""
        return ["a red blot", "a green blot"], ["a blue blot"]

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The colour that each prompt names."""
        found = [[rgb for name, rgb in COLOURS.items() if name in prompt] for prompt in prompts]
        for prompt, rgb in zip(prompts, found, strict=True):
            if len(rgb) != 1:
                raise InputError(f"prompt {prompt!r}: it names one of {', '.join(COLOURS)}")
        return Condition(tuple(prompts), {"colour": torch.tensor([rgb[0] for rgb in found])})

    def generate(self, noise: Tensor, condition: Condition, steps: int = 1) -> Tensor:
        """Images in [0, 1], differentiable in the noise."""
        ink = torch.sigmoid(F.interpolate(noise, scale_factor=4, mode="bilinear"))
        return ink * condition.tensors["colour"].to(noise)[:, :, None, None]

    def save_adapter(self, folder: str | Path) -> None:
        """Write the trained weights."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.hypernetwork.state_dict(), Path(folder) / WEIGHTS)

    def load_adapter(self, folder: str | Path) -> None:
        """Read what `save_adapter` wrote; anything missing or unknown is an error."""
        path = Path(folder) / WEIGHTS
        if not path.is_file():
            raise InputError(f"{folder} has no {WEIGHTS}: name the folder of an adapter of this backend")
        try:
            self.hypernetwork.load_state_dict(load_file(path))
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path} is of another network: give --set backend.width=N as in its run") from error


class Factory:
    """How hnkit finds the backend, its options and presets before anything is loaded."""

    name = "blots"
    summary = "coloured blots, 32 px: an example of a backend"
    options = BlotsOptions
    presets: Mapping[str, Mapping[str, Any]] = {"default": {"train.steps": 200, "train.batch": 32, "train.alpha": 0.01}}

    def load(self, options: BlotsOptions) -> Blots:
        """Build the backend."""
        return Blots(options)

    def status(self) -> str:
        """One line for `hnkit backends`."""
        return "ready"


FACTORY = Factory()
