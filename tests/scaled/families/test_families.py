"""Every family on a tiny checkpoint of its real class: what `FACTS` says of it is what is run here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache

import diffusers
import pytest
import torch

from hnkit.scaled.attach import attach
from hnkit.scaled.backends import BACKENDS, DIFFUSERS
from hnkit.scaled.lora.twin import load_lora, lora_state
from hnkit.scaled.pipelines.embeddings import EmbeddingCache
from hnkit.scaled.pipelines.families.table import FAMILIES
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, redness, steered
from tests.scaled.families.builders import BUILDERS
from tests.scaled.families.conftest import settings
from tests.scaled.families.facts import FACTS, SETTINGS

PROMPTS = tiny.PROMPTS[:2]
EACH = list(FACTS)
SHARE = ("ZImagePipeline", "Flux2KleinPipeline", "QwenImagePipeline", "StableDiffusionXLPipeline")
"""Families whose longer checks are in the plain suite; those of the others run with `-m slow`."""
LONGER = [name if name in SHARE else pytest.param(name, marks=pytest.mark.slow) for name in FACTS]


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> Callable:
    """`backend(name)`: one backend per family, at f = 0 whatever the test before did to it."""
    root = tmp_path_factory.mktemp("shared")

    @cache
    def made(name):
        model = tiny.write(BUILDERS[name][0], root / name)
        backend = DIFFUSERS.load(DIFFUSERS.options(**settings(name, model)))
        return backend, {key: value.detach().clone() for key, value in lora_state(backend._twin).items()}

    def get(name):
        found, start = made(name)
        load_lora(found._twin, start)
        return found

    return get


def plain(backend, prompts, noise, steps=1):
    """The diffusers pipeline as a user calls it, text encoders and all."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(backend.options.model_id)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)  # torch takes other kernels, which round otherwise, for weights to train
    height, width = backend.options.sides
    arguments = {"height": height, "width": width, "num_inference_steps": steps, "output_type": "pt"}
    kind = type(pipe).__name__
    arguments |= {
        "HunyuanImagePipeline": {"distilled_guidance_scale": 3.25},
        "QwenImagePipeline": {"true_cfg_scale": 1.0},
        "SanaSprintPipeline": {"complex_human_instruction": None, "guidance_scale": 4.5},
        "LatentConsistencyModelPipeline": {"guidance_scale": 8.5},
        "WanPipeline": {"num_frames": 1, "guidance_scale": 0.0},
        "SanaPipeline": {"complex_human_instruction": None, "guidance_scale": 0.0},
    }.get(kind, {"guidance_scale": 0.0})
    if kind.startswith(("Sana", "PixArt", "HunyuanDiT")):
        arguments["use_resolution_binning"] = False
    if kind == "SanaSprintPipeline" and steps != 2:
        arguments["intermediate_timesteps"] = None
    generators = backend.encode(prompts).generators("sampler", backend.options.seed)
    images = pipe(
        prompt=list(prompts), latents=backend.pack(noise), generator=generators, **arguments, return_dict=False
    )[0]
    return images[:, 0] if images.ndim == 5 else images


@pytest.mark.parametrize("name", EACH)
def test_starts_as_the_plain_pipeline(name, backend):
    backend, facts = backend(name), FACTS[name]
    prompts = PROMPTS[:1]  # in a batch, text encoders round otherwise
    noise, condition = noise_for(backend, 1), backend.encode(prompts)
    with torch.no_grad():
        delta = backend.hypernetwork(noise, condition)
    assert delta.dtype == torch.float32
    assert torch.equal(delta, torch.zeros_like(noise))
    for steps in facts.steps:
        images = steered(backend, noise, condition, steps)
        expected = plain(backend, prompts, noise, steps)
        if facts.exact:
            assert torch.equal(images, expected), (steps, float((images - expected).abs().max()))
        else:
            torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", LONGER)
def test_prompts_beyond_every_length(name, backend):
    """Cut as the plain pipeline cuts them; beside a short one, a row is what it is alone. At three steps."""
    backend, tolerance = backend(name), 2e-5 if FACTS[name].exact else 1e-3
    prompts = ["a fox, " * 400, "a"]
    noise, condition = noise_for(backend, 2), backend.encode(prompts)
    with torch.no_grad():
        images = backend.generate(noise, condition, 3)
        alone = [backend.generate(noise[i : i + 1], condition.select(torch.tensor([i])), 3) for i in (0, 1)]
    torch.testing.assert_close(torch.cat(alone), images, atol=tolerance, rtol=0)
    torch.testing.assert_close(alone[0], plain(backend, prompts[:1], noise[:1], 3), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_the_noise_is_what_the_pipeline_draws(name, backend):
    """The same generator gives the same image with `latents=` packed as it was found, and without."""
    backend = backend(name)
    layout = backend.first_step.layout(backend.options.sides, backend.any_condition)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, *backend.noise_shape, generator=generator, dtype=layout.dtype)
    assert torch.equal(layout.unpack(layout.pack(noise)), noise)
    drawn = []
    prepare = type(backend.pipeline).prepare_latents
    pipe = backend.first_step._call(backend.any_condition.select(torch.tensor([0])), backend.options.sides, 0.0)

    def noted(*args, **kwargs):
        drawn.append(prepare(pipe.pipe, *args, **kwargs))
        return drawn[-1]

    for extra in ({"generator": torch.Generator().manual_seed(5)}, {"latents": layout.pack(noise)}):
        pipe.pipe.prepare_latents = noted
        pipe.first(lambda *_, **__: None, **extra)
    first, second = (entry[0] if isinstance(entry, tuple) else entry for entry in drawn)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", EACH)
def test_gradients_agree_with_finite_differences(name, backend):
    backend = backend(name)
    perturb(backend)
    noise, condition = noise_for(backend, 2), backend.encode(PROMPTS)
    parameters = [p for p in backend.hypernetwork.parameters() if p.requires_grad]

    def f(x):
        delta = backend.hypernetwork(x, condition)
        return (delta.double() * torch.linspace(-1, 2, delta.numel()).view_as(delta)).sum()

    def generator(x):
        return (backend.generate(x, condition).double() * torch.tensor([1.0, -0.5, 0.3]).view(1, 3, 1, 1)).sum()

    for what, value in (("f", f), ("generator", generator)):
        x = noise.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(x), x)
        slope = float(gradient.norm())
        assert slope > 0
        errors = []
        for h in (1e-1, 3e-2, 1e-2):
            with torch.no_grad():
                step = h * gradient / slope
                errors.append(abs(float(value(noise + step) - value(noise - step)) / (2 * h) - slope) / slope)
        assert min(errors) < 0.02, (what, errors)
    gradients = torch.autograd.grad(f(noise), parameters, allow_unused=True)
    reached = [g for g in gradients if g is not None and bool(g.any())]
    assert len(reached) > len(parameters) / 2
    slope = math.sqrt(sum(float(g.double().square().sum()) for g in reached))
    start, errors = [p.detach().clone() for p in parameters], []
    for h in (3e-2, 1e-2, 3e-3):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, value, g in zip(parameters, start, gradients, strict=True):
                    parameter.copy_(value if g is None else value + sign * h * g / slope)
                ends.append(float(f(noise)))
        errors.append(abs((ends[0] - ends[1]) / (2 * h) - slope) / slope)
    assert min(errors) < 0.02, errors


@pytest.mark.parametrize("name", EACH)
def test_training_raises_the_reward_and_comes_back_from_disk(name, backend, tmp_path):
    backend = backend(name)
    noise, condition = noise_for(backend, 2), backend.encode(PROMPTS)
    base = steered(backend, noise, condition)
    parameters = [p for p in backend.hypernetwork.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        (-redness(backend.generate(noise + backend.hypernetwork(noise, condition), condition)).mean()).backward()
        optimizer.step()
    optimizer.zero_grad()
    images = steered(backend, noise, condition)
    assert redness(images).mean() > redness(base).mean() + 1e-3
    with torch.no_grad():
        assert torch.equal(backend.generate(noise, condition), base), "the base is left alone"
    backend.save_adapter(tmp_path / "adapter")
    trained = {key: value.detach().clone() for key, value in lora_state(backend._twin).items()}
    perturb(backend)
    assert not torch.equal(steered(backend, noise, condition), images)
    backend.load_adapter(tmp_path / "adapter")
    assert all(torch.equal(value, trained[key]) for key, value in lora_state(backend._twin).items())
    assert torch.equal(steered(backend, noise, condition), images)
    # in plain diffusers code, by the arguments of its model card
    pipe = diffusers.DiffusionPipeline.from_pretrained(backend.options.model_id)
    with_f = attach(pipe, tmp_path / "adapter")
    with_f.set_progress_bar_config(disable=True)
    scope = {"adapter": tmp_path / "adapter", "prompt": PROMPTS[0], "latents": backend.pack(noise[:1])}
    code = backend.usage().replace("pipe(prompt=", "pipe(output_type='pt', latents=latents, return_dict=False, prompt=")
    exec(code.replace(").images", ")[0]"), scope)
    alone = condition.select(torch.tensor([0]))
    found = scope["images"][:, 0] if scope["images"].ndim == 5 else scope["images"]
    generated = steered(backend, noise[:1], alone)
    tolerance = 2e-5 if FACTS[name].exact else 1e-3
    torch.testing.assert_close(found, generated, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_embeddings_come_back_from_disk(name, backend, tmp_path):
    """The cache of embeddings holds every kind of what `encode_prompt` returns: lists, masks, lengths."""
    backend = backend(name)
    cache = EmbeddingCache(backend._encode_now, tmp_path)
    cache.store(PROMPTS)

    def refuse(_):
        raise AssertionError("encoded again")

    read = EmbeddingCache(refuse, tmp_path).rows(PROMPTS)
    expected = EmbeddingCache(backend._encode_now, None).rows(PROMPTS)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LONGER)
def test_the_self_check_passes(name, dtype, load):
    load(name, dtype=dtype, self_check=True)


@pytest.mark.parametrize("name", list(FACTS))
def test_what_the_table_says_of_a_class_is_what_it_takes(name):
    kind, facts = getattr(diffusers, name), FACTS[name]
    assert facts.lora == hasattr(kind, "load_lora_weights")
    parameters = inspect.signature(kind.__call__).parameters
    taken = [word for word in ("timesteps", "sigmas") if word in parameters]
    assert facts.schedule == {2: "both", 0: "neither"}.get(len(taken), "".join(taken))


def test_every_record_and_every_name_has_its_facts():
    assert set(FACTS) == set(BUILDERS)
    assert set(FAMILIES) <= set(FACTS)
    named = {factory.family.pipeline_class for factory in BACKENDS.values() if factory.family is not None}
    assert named <= set(FACTS)
    said = " ".join(facts.models for facts in FACTS.values())
    assert all(f"`{name}`" in said for name in BACKENDS if name not in ("digits", "diffusers"))


def test_what_the_table_says_of_a_model_is_its_default():
    for setting in SETTINGS:
        if setting.backend:
            options = BACKENDS[setting.backend].options()
            assert (options.model_id, options.guidance) == (setting.hub, setting.guidance)
            assert all(part in setting.options for part in (options.lora, options.network_id, options.scheduler))
    assert set(BACKENDS) - {"digits", "diffusers"} == {setting.backend for setting in SETTINGS} - {""}
