"""Tiny checkpoints of every family, built once per session, and backends on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from hnkit.scaled.backends import DIFFUSERS
from hnkit.scaled.pipelines.backend import PipelineBackend
from tests.scaled import tiny
from tests.scaled.families.builders import BUILDERS

Folder = Callable[[str], Path]
Load = Callable[..., PipelineBackend]


@pytest.fixture(scope="session", autouse=True)
def small_images_of_hidream():
    """The class makes images of 128 latent pixels, whatever it is asked for: here 16, or its tests take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        own = property(lambda _: 16, lambda *_: None)
        patch.setattr(diffusers.HiDreamImagePipeline, "default_sample_size", own, raising=False)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Folder:
    """`folder(pipeline_class)`: a tiny checkpoint of that class."""
    root, built = tmp_path_factory.mktemp("families"), {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = tiny.write(BUILDERS[name][0], root / name)
        return built[name]

    return get


def settings(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Backend options for a tiny checkpoint of a class: float32 on the CPU, rank 4, no self-check."""
    small = {"size": BUILDERS[name][1], "dtype": "float32", "device": "cpu", "rank": 4, "lora_alpha": 8.0}
    return {"model_id": str(folder), "cache_dir": "", "self_check": False, **small, **changes}


@pytest.fixture
def load(folder) -> Load:
    """`load(pipeline_class, **options)`: a backend on the tiny checkpoint of that class."""

    def make(name: str, **changes: Any) -> PipelineBackend:
        return DIFFUSERS.load(DIFFUSERS.options(**settings(name, folder(name), **changes)))

    return make
