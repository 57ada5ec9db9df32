"""The self-check at load: real faults of the libraries are refused in a line that says which check, and by how much."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from hnkit import InputError
from hnkit.scaled.pipelines.families import table
from hnkit.scaled.pipelines.layout import find_layout
from tests.scaled import tiny


def refused(load, name, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(name, self_check=True, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_blocks_that_are_recomputed_without_their_mask(load):
    """diffusers' Chroma passes no attention mask to its single blocks when their activations are recomputed."""
    message = refused(load, "ChromaPipeline", hypernetwork_checkpointing=True)
    assert "self-check 'gradient of f'" in message
    assert "with gradients on, the output is another" in message


def test_it_warns_of_nothing(load):
    """What a library warns of goes to the user's terminal, in the middle of a progress bar; most warn only once."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            load("SanaSprintPipeline", self_check=True)
    finally:
        torch.set_warn_always(False)


@pytest.mark.slow
def test_a_mixture_that_runs_without_gradients(load, monkeypatch):
    """diffusers' HiDream runs its experts under `no_grad` outside of training mode, which its record mends."""
    record = table.FAMILIES["HiDreamImagePipeline"]
    monkeypatch.setitem(table.FAMILIES, "HiDreamImagePipeline", dataclasses.replace(record, training=()))
    message = refused(load, "HiDreamImagePipeline")
    assert "LoRA layers run without gradients" in message
    found, layers = (int(word) for word in message.split(": ")[2].split(" LoRA")[0].split(" of "))
    assert 0 < found < layers


def test_a_wrong_gradient_is_refused(load, monkeypatch):
    """A factor of 0.9 on the gradient of f by its noise, and of the generator."""
    from hnkit.scaled.pipelines.backend import PipelineBackend
    from hnkit.scaled.pipelines.layout import Layout

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 0.9 * gradient

    pack, sample = Layout.pack, PipelineBackend.sample
    monkeypatch.setattr(Layout, "pack", lambda self, noise: Scaled.apply(pack(self, noise)))
    message = refused(load, "StableDiffusion3Pipeline")
    assert "self-check 'gradient of f'" in message
    assert "by its noise differs from a finite difference by" in message
    monkeypatch.setattr(Layout, "pack", pack)
    monkeypatch.setattr(PipelineBackend, "sample", lambda self, *a, **k: Scaled.apply(sample(self, *a, **k)))
    message = refused(load, "StableDiffusion3Pipeline")
    assert "self-check 'gradient of the generator'" in message


def test_rows_that_mix_are_refused(load, monkeypatch):
    from hnkit.scaled.pipelines.layout import Layout

    read = Layout.read
    monkeypatch.setattr(Layout, "read", lambda self, output: read(self, output) + read(self, output).mean(0))
    assert "self-check 'rows of f': StableDiffusion3Pipeline: a row alone differs" in refused(
        load, "StableDiffusion3Pipeline"
    )


def test_a_pipeline_that_ignores_latents(load):
    backend = load("StableDiffusion3Pipeline")
    call = backend.first_step._call(backend.any_condition, backend.options.sides, 0.0)

    class Deaf(type(call.pipe)):
        def prepare_latents(self, batch, channels, height, width, dtype, device, generator, latents=None):
            return randn_tensor((batch, channels, height // 2, width // 2), generator, device, dtype)

    call.pipe.__class__ = Deaf
    with pytest.raises(InputError, match=r"self-check 'layout': Deaf ignores latents="):
        find_layout(call)


def test_classifier_free_guidance_is_refused(load):
    with pytest.raises(InputError, match="without classifier-free guidance"):
        load("StableDiffusion3Pipeline", guidance=7.0)


def test_prompts_of_all_lengths_keep_their_rows(load):
    """Where a mask tells lengths apart rows are padded, else each length runs alone: a row is the same either way."""
    for name in ("QwenImagePipeline", "CogView4Pipeline", "ZImagePipeline"):
        backend = load(name)
        condition = backend.encode(tiny.PROMPTS)
        noise = torch.randn(4, *backend.noise_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            images = backend.generate(noise, condition)
            for i in (0, 3):
                alone = backend.generate(noise[i : i + 1], condition.select(torch.tensor([i])))
                torch.testing.assert_close(alone, images[i : i + 1], atol=2e-5, rtol=0)
