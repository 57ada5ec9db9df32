"""A tiny image backend for tests of the trainer: prompts, a judge, a direct twin, float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.maps import Condition


class Scale(nn.Module):
    """`f(x | c) = w * x + b` per channel, weighted by the length of the prompt; zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        return (self.weight * noise + self.bias) * condition.tensors["length"][:, None, None, None]


class Brightness:
    """Mean of the image; `fault` may replace or break the scores of one call; the rehearsal is call 0."""

    name = "brightness"
    weight = 2.0

    def __init__(self) -> None:
        self.calls = -1
        self.fault: Callable[[int, Tensor], Tensor] = lambda _, scores: scores

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(images) == len(prompts)
        self.calls += 1
        return self.fault(self.calls, images.mean((1, 2, 3)))


class FakeBackend:
    def __init__(self, options: Options) -> None:
        self.name = "fake"
        self.noise_shape = (3, 4, 4)
        self.hypernetwork = Scale()
        self.default_reward = Brightness()
        self.options = options
        self.tuned: nn.Parameter | None = None
        self.prepared: list[str] = []
        self.seen: list[tuple[str, ...]] = []

    def prompts(self) -> tuple[list[str], list[str]]:
        return [f"prompt {'x' * k}" for k in range(self.options.prompts)], ["held out", "held out too"]

    def prepare(self, prompts: Sequence[str]) -> None:
        self.prepared = list(prompts)

    def encode(self, prompts: Sequence[str]) -> Condition:
        self.seen.append(tuple(prompts))
        return Condition(tuple(prompts), {"length": torch.tensor([len(prompt) / 10 for prompt in prompts])})

    def generate(self, noise: Tensor, condition: Condition, steps: int = 1) -> Tensor:
        for step in range(1, steps):  # a sampler of several steps adds noise on the way
            draws = [torch.randn(noise.shape[1:], generator=own) for own in condition.generators("sampler", step)]
            noise = noise + 0.5 * torch.stack(draws)
        images = torch.sigmoid(noise)
        return images * self.tuned.exp() if self.tuned is not None else images

    def judge(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.amax((1, 2, 3))

    def direct(self) -> FakeBackend:
        twin = FakeBackend(self.options)
        twin.hypernetwork = nn.Module()
        twin.tuned = twin.hypernetwork.tuned = nn.Parameter(torch.zeros(()))
        return twin

    def save_adapter(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(self.hypernetwork.state_dict(), folder / "adapter.safetensors")

    def load_adapter(self, folder: Path) -> None:
        try:
            self.hypernetwork.load_state_dict(load_file(folder / "adapter.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(f"{folder} holds no adapter: {error}") from error


@dataclass(frozen=True)
class Options:
    prompts: int = 5
    device: str = "cpu"


@dataclass
class FakeFactory:
    name: str = "fake"
    summary: str = "for tests"
    options: type = Options
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    loaded: list[FakeBackend] = field(default_factory=list)
    prepare_backend: Callable[[FakeBackend], None] = lambda _: None

    def load(self, options: Options) -> FakeBackend:
        self.loaded.append(FakeBackend(options))
        self.prepare_backend(self.loaded[-1])
        return self.loaded[-1]
