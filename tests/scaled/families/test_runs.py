"""A whole run of every family by configuration alone: trained, interrupted, resumed to the bit, and said to fail."""

from __future__ import annotations

import io
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hnkit.config import resolve_config
from hnkit.errors import InputError
from hnkit.training.run import train
from hnkit.training.signals import StopSignals
from tests.scaled import tiny
from tests.scaled.families.conftest import settings
from tests.scaled.families.facts import FACTS

SHARE = ("ZImagePipeline", "PixArtAlphaPipeline")
"""Families whose runs are in the plain suite; those of the others run with `-m slow`."""


@pytest.fixture
def configured(folder, tmp_path):
    """`configured(name, **backend options)`: the configuration of two steps; embeddings are cached on disk."""
    (tmp_path / "prompts.txt").write_text("a tree\na boat\na red house on the hill\n")

    def make(name, **options):
        chosen = settings(name, folder(name), cache_dir=str(tmp_path / "embeddings"), **options)
        training = {
            "prompts": tmp_path / "prompts.txt", "steps": 2, "batch": 2, "optimizer": "adamw", "lr": 0.01, "warmup": 0,
            "checkpoint_every": 1, "measure_samples": 2, "validate_samples": 1, "measure_method": "second-order",
        }  # fmt: skip
        lines = [f"backend.{key}={tiny.text(value)}" for key, value in chosen.items()]
        lines += [f"train.{key}={value}" for key, value in training.items()]
        return resolve_config(backend="diffusers", overrides=lines, rewards=["redness=1.0"])

    return make


def quiet():
    return Console(file=io.StringIO())


def adapter(folder):
    (path,) = (folder / "adapter").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(
    "name", [name if name in SHARE else pytest.param(name, marks=pytest.mark.slow) for name in FACTS]
)
def test_an_interrupted_run_ends_with_the_same_adapter(name, configured, tmp_path, monkeypatch):
    config, asked = configured(name), []
    train(config, out=tmp_path / "whole", console=quiet())

    def stop(*_):
        asked.append(1)
        return signal.SIGTERM if len(asked) == 1 else 0

    monkeypatch.setattr(StopSignals, "agreed", stop)
    assert train(config, out=tmp_path / "parts", console=quiet()).step == 1
    assert train(config, resume=tmp_path / "parts", console=quiet()).finished
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert any(bool(value.any()) for key, value in whole.items() if "lora_B" in key)
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_images_of_a_size_that_the_network_cannot_paint(configured, tmp_path):
    """The self-check's images are small: one forward pass of f is of the run's size."""
    with pytest.raises(InputError) as caught:
        train(configured("ZImagePipeline", size=256, self_check=True), out=tmp_path / "run", console=quiet())
    assert "height 256" in str(caught.value)
    assert "give the backend.size that the model was made for" in str(caught.value)
    assert not (tmp_path / "run").exists()
