"""Tiny checkpoints of the real classes, built once per session, and backends on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hnkit.backend import backend_factory
from hnkit.scaled.pipelines.backend import PipelineBackend
from tests.scaled import tiny

Make = Callable[..., PipelineBackend]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """`checkpoint(name, seed=0)`: folder of a tiny checkpoint of `sana`, `sd-turbo` or `flux`."""
    root = tmp_path_factory.mktemp("tiny")
    built: dict[str, Path] = {}

    def get(name: str, seed: int = 0) -> Path:
        key = f"{name}-{seed}"
        if key not in built:
            built[key] = tiny.build(name, root / key, seed)
        return built[key]

    return get


@pytest.fixture
def make_backend(checkpoint) -> Make:
    """`make_backend(name, **options)`: a fresh backend on a tiny checkpoint, float32 on the CPU, rank 4."""

    def make(name: str, *, seed: int = 0, **changes: Any) -> PipelineBackend:
        factory = backend_factory(name)
        options: dict[str, Any] = tiny.options(name, checkpoint(name, seed), **changes)
        return factory.load(factory.options(**options))

    return make


def perturb(backend: PipelineBackend, scale: float = 0.1, seed: int = 1) -> None:
    """Move the LoRA weights away from f = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backend.hypernetwork.named_parameters():
            if parameter.requires_grad and ".lora_B." in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def noise_for(backend: PipelineBackend, count: int = len(tiny.PROMPTS), seed: int = 3) -> torch.Tensor:
    return torch.randn(count, *backend.noise_shape, generator=torch.Generator().manual_seed(seed))


def steered(backend: PipelineBackend, noise: torch.Tensor, condition: Any, steps: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return backend.generate(noise + backend.hypernetwork(noise, condition), condition, steps)


def redness(images: torch.Tensor) -> torch.Tensor:
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))
