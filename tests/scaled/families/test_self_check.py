"""The self-check at load: real faults of the libraries are refused in a line that says which check, and by how much."""

from __future__ import annotations

import dataclasses
import io
import logging
import warnings

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from hnkit import InputError
from hnkit.scaled.pipelines.calls import PipelineCall
from hnkit.scaled.pipelines.conditions import find_text_layout
from hnkit.scaled.pipelines.families import table
from hnkit.scaled.pipelines.layout import find_layout
from tests.scaled import tiny


def refused(load, name, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(name, self_check=True, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("option", "what"), [("hypernetwork", "f"), ("generator", "the generator")])
def test_blocks_that_are_recomputed_without_their_mask(option, what, dtype, load):
    """diffusers' Chroma passes no attention mask to its single blocks when their activations are recomputed."""
    message = refused(load, "ChromaPipeline", dtype=dtype, **{f"{option}_checkpointing": True})
    assert f"self-check 'recomputed blocks of {what}': ChromaPipeline: recomputation changes the output by a" in message
    assert f"set backend.{option}_checkpointing = false" in message


@pytest.mark.parametrize(("rank", "alpha"), [(4, 256.0), (64, 1.0)])
def test_rank_and_alpha_do_not_matter(rank, alpha, load):
    """f is moved, and its weights stepped, by as much as the LoRA's scale makes of it."""
    load("StableDiffusionXLPipeline", rank=rank, lora_alpha=alpha, dtype="bfloat16", self_check=True)


def test_it_warns_of_nothing(load):
    """What a library warns of goes to the user's terminal, in the middle of a progress bar; most warn only once."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            load("SanaSprintPipeline", self_check=True)
    finally:
        torch.set_warn_always(False)


def test_what_pipelines_say_at_every_call_is_said_once(load, monkeypatch):
    """Qwen-Image of a guidance scale that its network does not take; Bria of prompts that it cuts, and so on."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [handler])
    for name in ("QwenImagePipeline", "BriaPipeline"):
        backend = load(name)
        for _ in range(2):
            backend.generate(torch.zeros(1, *backend.noise_shape), backend.encode(["a " * 500]))
    lines = said.getvalue().splitlines()
    assert len(set(lines)) == len(lines)
    assert not any("guidance" in line for line in lines)
    assert any("truncated" in line for line in lines)


def test_a_mixture_that_runs_without_gradients(load, monkeypatch):
    """diffusers' HiDream runs its experts under `no_grad` outside of training mode, which its record mends."""
    record = table.FAMILIES["HiDreamImagePipeline"]
    monkeypatch.setitem(table.FAMILIES, "HiDreamImagePipeline", dataclasses.replace(record, training=()))
    message = refused(load, "HiDreamImagePipeline")
    assert "LoRA layers run without gradients" in message
    found, layers = (int(word) for word in message.split(": ")[2].split(" LoRA")[0].split(" of "))
    assert 0 < found < layers


@pytest.mark.parametrize(
    ("dtype", "of_f", "of_images"), [("float32", 0.9, 0.9), ("bfloat16", 0.8, 0.5), ("bfloat16", 1.25, 2.0)]
)
def test_a_wrong_gradient_is_refused(dtype, of_f, of_images, load, monkeypatch):
    """A factor on the gradient of f by its noise, and of the generator; half precision resolves less."""
    from hnkit.scaled.pipelines.backend import PipelineBackend
    from hnkit.scaled.pipelines.layout import Layout

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return ctx.factor * gradient, None

    pack, sample = Layout.pack, PipelineBackend.sample
    monkeypatch.setattr(Layout, "pack", lambda self, noise: Scaled.apply(pack(self, noise), of_f))
    message = refused(load, "StableDiffusion3Pipeline", dtype=dtype)
    assert "self-check 'gradient of f'" in message
    assert "by its noise differs from a finite difference by" in message
    monkeypatch.setattr(Layout, "pack", pack)
    monkeypatch.setattr(PipelineBackend, "sample", lambda self, *a, **k: Scaled.apply(sample(self, *a, **k), of_images))
    message = refused(load, "StableDiffusion3Pipeline", dtype=dtype)
    assert "self-check 'gradient of the generator'" in message


def test_rows_that_mix_are_refused(load, monkeypatch):
    from hnkit.scaled.pipelines.layout import Layout

    read = Layout.read
    monkeypatch.setattr(Layout, "read", lambda self, output: read(self, output) + read(self, output).mean(0))
    assert "self-check 'rows of f': StableDiffusion3Pipeline: a row alone differs" in refused(
        load, "StableDiffusion3Pipeline"
    )


def test_images_of_another_size_are_refused(load, monkeypatch):
    from hnkit.scaled.pipelines.backend import PipelineBackend

    sample = PipelineBackend.sample
    monkeypatch.setattr(PipelineBackend, "sample", lambda self, *a, **k: sample(self, *a, **k)[..., 2:, :])
    message = refused(load, "StableDiffusion3Pipeline")
    assert "self-check 'image size': StableDiffusion3Pipeline: 14 x 16 pixels where 16 x 16 are asked for" in message


def test_noise_that_is_drawn_in_the_call_itself_is_refused():
    """ERNIE-Image has no method that draws it."""
    with pytest.raises(InputError, match="object draws no noise in prepare_latents: it cannot be steered"):
        find_layout(PipelineCall(object(), "transformer", {}))


def test_texts_of_which_no_condition_can_be_made():
    """What depends on the prompts and cannot be told apart by rows would be one prompt's for all."""
    for made, said in (
        (lambda prompts: (torch.full((1, 3), float(len(prompts[-1]))),), r"a tensor \(1, 3\) for 2 prompts"),
        (lambda prompts: (object(),), "returns a object"),
        (lambda prompts: (len(prompts[-1]),), "returns a int"),
    ):
        with pytest.raises(
            InputError, match=f"self-check 'texts': encode_prompt returns .*{said.split('returns ')[-1]}"
        ):
            find_text_layout(lambda prompts, made=made: [made(prompts)])


def called(backend):
    """A call of the backend's pipeline, for `find_layout`."""
    return backend.first_step._call(backend.any_condition, backend.options.sides, 0.0)


def test_a_pipeline_that_ignores_latents(load):
    call = called(load("StableDiffusion3Pipeline"))

    class Deaf(type(call.pipe)):
        def prepare_latents(self, batch, channels, height, width, dtype, device, generator, latents=None):
            return randn_tensor((batch, channels, height // 2, width // 2), generator, device, dtype)

    call.pipe.__class__ = Deaf
    with pytest.raises(InputError, match=r"self-check 'layout': Deaf ignores latents="):
        find_layout(call)


def test_a_second_noise_is_refused(load):
    """In prepare_latents, or anywhere else before the network."""
    call = called(load("StableDiffusion3Pipeline"))
    kind = type(call.pipe)

    class Twice(kind):
        def prepare_latents(self, batch, channels, height, width, dtype, device, generator, latents=None):
            shape = (batch, channels, height // 2, width // 2)
            first = randn_tensor(shape, generator, device, dtype) if latents is None else latents
            return first + randn_tensor(shape, generator, device, dtype)

    class Elsewhere(kind):
        def prepare_latents(self, batch, channels, height, width, dtype, device, generator, latents=None):
            shape = (batch, channels, height // 2, width // 2)
            return (randn_tensor(shape, generator, device, dtype) if latents is None else latents) + torch.randn(shape)

    for other, said in (
        (Twice, "draws 2 noises: a hypernetwork moves one"),
        (Elsewhere, "draws a second noise outside of"),
    ):
        call.pipe.__class__ = other
        with pytest.raises(InputError, match=rf"self-check 'layout': {other.__name__} {said}"):
            find_layout(call)


def test_a_class_has_one_record():
    assert len(table.FAMILIES) == len(table._RECORDS)


@pytest.mark.parametrize(
    ("pipeline", "network", "words"),
    [
        ("CogView4Pipeline", "CogView4Transformer2DModel", "self-check 'last layer': the output of CogView4T"),
        # whose record names its last layer
        ("StableDiffusion3Pipeline", "SD3Transformer2DModel", "self-check 'f = 0'"),
    ],
)
def test_a_network_without_a_linear_last_layer(pipeline, network, words, load, monkeypatch):
    network = getattr(diffusers, network)
    forward = network.forward

    def squashed(*args, **kwargs):
        return (forward(*args, **kwargs)[0].cos(),)

    monkeypatch.setattr(network, "forward", squashed)
    with pytest.raises(InputError, match=words):
        load(pipeline, self_check=True)


def test_classifier_free_guidance_is_refused(load):
    with pytest.raises(InputError, match=r"classifier-free guidance, set backend\.guidance to a value without it"):
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
