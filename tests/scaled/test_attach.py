"""Adapters in plain diffusers code: every argument of the pipeline call, and the pipeline underneath left alone."""

from __future__ import annotations

import diffusers
import pytest
import torch

from hnkit import InputError
from hnkit.scaled.attach import SteeredPipeline, attach
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, steered

PROMPTS = tiny.PROMPTS[:2]
FAMILIES = ["sana", "sd-turbo", "flux"]


def load(checkpoint, name):
    pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(name, **changes):
    side = tiny.SIZES[name]
    common = {"height": side, "width": side, "output_type": "pt", "num_inference_steps": 1}
    if name == "sana":
        common |= {"use_resolution_binning": False, "intermediate_timesteps": None}
        if changes.get("num_inference_steps") == 2:
            common["intermediate_timesteps"] = 1.3
    return common | changes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


CALLS = {
    "one prompt": (PROMPTS[0], {}),
    "steps": (PROMPTS, {"num_inference_steps": 2}),
    "many steps": (PROMPTS, {"num_inference_steps": 4}),
    "images per prompt": (PROMPTS, {"num_images_per_prompt": 2}),
    "numpy": (PROMPTS, {"output_type": "np"}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_adapter_is_the_plain_pipeline(name, checkpoint, make_backend, tmp_path):
    make_backend(name).save_adapter(tmp_path / "zero")
    pipe = load(checkpoint, name)
    with_f = attach(pipe, tmp_path / "zero")
    for label, (prompt, changes) in CALLS.items():
        plain = pipe(prompt, generator=seeded(), **arguments(name, **changes)).images
        found = with_f(prompt, generator=seeded(), **arguments(name, **changes)).images
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(plain)), label
    each = pipe(PROMPTS, generator=[seeded(1), seeded(2)], **arguments(name)).images
    assert torch.equal(with_f(PROMPTS, generator=[seeded(1), seeded(2)], **arguments(name)).images, each)


@pytest.mark.parametrize("name", FAMILIES)
def test_trained_adapter_is_the_backends_images(name, checkpoint, make_backend, tmp_path):
    backend = make_backend(name)
    perturb(backend)
    backend.save_adapter(tmp_path / "trained")
    noise, condition = noise_for(backend, 2), backend.encode(PROMPTS)
    expected = steered(backend, noise, condition)
    pipe = load(checkpoint, name)
    attributes = dict(vars(pipe))
    plain = pipe(PROMPTS, generator=seeded(), **arguments(name)).images
    with_f = attach(pipe, str(tmp_path / "trained"))
    assert isinstance(with_f, SteeredPipeline)
    assert with_f.vae is pipe.vae
    latents = backend.family.pack(backend.pipeline, noise)
    scale = {"guidance_scale": backend.options.guidance}
    found = with_f(PROMPTS, latents=latents, generator=seeded(), **arguments(name, **scale)).images
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert not torch.allclose(with_f(PROMPTS, generator=seeded(), **arguments(name)).images, plain, atol=1e-3)
    # The pipeline itself still makes its own images, and has nothing new on it.
    assert torch.equal(pipe(PROMPTS, generator=seeded(), **arguments(name)).images, plain)
    assert set(vars(pipe)) == set(attributes) | {k for k in vars(pipe) if k.startswith("_")}
    assert "encode_prompt" not in vars(pipe)
    assert "prepare_latents" not in vars(pipe)
    embeds = pipe.encode_prompt(PROMPTS, **backend.family.encode_arguments(backend.options), device=pipe.device)
    again = with_f(
        latents=latents,
        generator=seeded(),
        **backend.family.embeddings(embeds),
        **arguments(name, **scale),
    ).images
    torch.testing.assert_close(again, expected, atol=2e-6, rtol=0)


def test_negative_prompts_do_not_reach_f(checkpoint, make_backend, tmp_path):
    for name, extra in (("sd-turbo", {"guidance_scale": 2.0}), ("flux", {"true_cfg_scale": 2.0})):
        backend = make_backend(name)
        perturb(backend)
        backend.save_adapter(tmp_path / name)
        with_f = attach(load(checkpoint, name), tmp_path / name)
        given: list[torch.Tensor] = []
        with_f.hypernetwork.register_forward_hook(lambda module, inputs, output, to=given: to.append(output))
        for negative in ("blurry", "a different one"):
            with_f(PROMPTS, negative_prompt=[negative] * 2, generator=seeded(), **arguments(name, **extra))
        assert torch.equal(given[0], given[1])
        assert given[0].shape[0] == 2


def test_refusals(checkpoint, make_backend, tmp_path):
    make_backend("sana").save_adapter(tmp_path / "sana")
    with pytest.raises(InputError, match="SanaTransformer2DModel"):
        attach(load(checkpoint, "flux"), tmp_path / "sana")
    with pytest.raises(InputError, match="a dict was given: noise hypernetworks exist for SanaSprintPipeline"):
        attach({}, tmp_path / "sana")
    with pytest.raises(InputError, match="no adapter at"):
        attach(load(checkpoint, "sana"), tmp_path / "nowhere")
    hooked = load(checkpoint, "sana")
    hooked._all_hooks = [object()]
    with pytest.raises(InputError, match="offloading hooks"):
        attach(hooked, tmp_path / "sana")
    direct = make_backend("sana").direct()
    direct.save_adapter(tmp_path / "direct")
    with pytest.raises(InputError, match="objective 'direct'"):
        attach(load(checkpoint, "sana"), tmp_path / "direct")


def test_moving(checkpoint, make_backend, tmp_path):
    make_backend("sana").save_adapter(tmp_path / "a")
    with_f = attach(load(checkpoint, "sana"), tmp_path / "a")
    assert with_f.to("cpu") is with_f


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_cards_code_runs(name, make_backend, tmp_path):
    backend = make_backend(name)
    perturb(backend)
    backend.save_adapter(tmp_path / "a")
    scope = {"adapter": tmp_path / "a", "prompt": PROMPTS}
    code = backend.usage().replace("pipe(prompt, ", "pipe(prompt, output_type='pt', latents=latents, ")
    noise = noise_for(backend, 2)
    scope["latents"] = backend.family.pack(backend.pipeline, noise)
    exec(code, scope)
    expected = steered(backend, noise, backend.encode(PROMPTS))
    torch.testing.assert_close(scope["images"], expected, atol=2e-6, rtol=0)
    assert "direct()" in backend.direct().usage()
