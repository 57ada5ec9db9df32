"""Adapters in plain diffusers code: every argument of the pipeline call, and the pipeline underneath left alone."""

from __future__ import annotations

import copy
import json
import pickle

import diffusers
import pytest
import torch

from hnkit import InputError, NoiseInjection
from hnkit.scaled.attach import SteeredPipeline, attach
from hnkit.scaled.lora.adapter import CONFIG
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
        common |= {
            "use_resolution_binning": False, "intermediate_timesteps": None, "complex_human_instruction": None,
        }  # fmt: skip
        if changes.get("num_inference_steps") == 2:
            common["intermediate_timesteps"] = 1.3
    return common | changes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


EMBEDDINGS = {
    "sana": (("prompt_embeds", "prompt_attention_mask"), {"complex_human_instruction": None}),
    "sd-turbo": (("prompt_embeds",), {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}),
    "flux": (("prompt_embeds", "pooled_prompt_embeds"), {"prompt_2": None}),
}
"""Names of the call's arguments for what `encode_prompt` returns, and how that is asked."""


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
    latents = backend.pack(noise)
    scale = {"guidance_scale": backend.options.guidance}
    found = with_f(PROMPTS, latents=latents, generator=seeded(), **arguments(name, **scale)).images
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert not torch.allclose(with_f(PROMPTS, generator=seeded(), **arguments(name)).images, plain, atol=1e-3)
    # The pipeline itself still makes its own images, and has nothing new on it.
    assert torch.equal(pipe(PROMPTS, generator=seeded(), **arguments(name)).images, plain)
    assert set(vars(pipe)) == set(attributes) | {k for k in vars(pipe) if k.startswith("_")}
    assert "encode_prompt" not in vars(pipe)
    assert "prepare_latents" not in vars(pipe)
    names, how = EMBEDDINGS[name]
    embeds = pipe.encode_prompt(PROMPTS, device=pipe.device, **how)
    again = with_f(
        latents=latents,
        generator=seeded(),
        **dict(zip(names, embeds, strict=False)),
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
    with pytest.raises(InputError, match="a dict was given: noise hypernetworks are for text-to-image pipelines"):
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
    code = backend.usage().replace("pipe(prompt=", "pipe(output_type='pt', latents=latents, prompt=")
    noise = noise_for(backend, 2)
    scope["latents"] = backend.pack(noise)
    exec(code, scope)
    expected = steered(backend, noise, backend.encode(PROMPTS))
    torch.testing.assert_close(scope["images"], expected, atol=2e-6, rtol=0)
    assert "direct()" in backend.direct().usage()


@pytest.fixture
def trained(checkpoint, make_backend, tmp_path):
    """`trained(name)`: a tiny pipeline with a trained adapter on it, and the adapter's folder."""

    def make(name, **options):
        backend = make_backend(name, **options)
        perturb(backend)
        backend.save_adapter(tmp_path / f"{name}-adapter")
        return attach(load(checkpoint, name), tmp_path / f"{name}-adapter"), tmp_path / f"{name}-adapter"

    return make


def images_of(pipe, name, **changes):
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, generator=seeded(), **arguments(name, **changes)).images


def assert_same(images, expected):
    """To rounding: sums over weights that were moved in memory may be taken in another order."""
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_result_is_a_pipeline_like_any_other(name, trained, checkpoint, tmp_path):
    with_f, _ = trained(name)
    plain_class = type(load(checkpoint, name))
    expected, plain = images_of(with_f, name), images_of(load(checkpoint, name), name)
    assert isinstance(with_f, plain_class)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert torch.equal(images_of(with_f.detached(), name), plain)
    assert type(with_f.detached()) is plain_class
    copies = {
        "copy": copy.copy(with_f),
        "deepcopy": copy.deepcopy(with_f),
        "pickle": pickle.loads(pickle.dumps(with_f)),
        "from_pipe": type(with_f).from_pipe(with_f),
    }
    with_f.save_pretrained(tmp_path / "saved")
    saved = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(saved) is plain_class
    copies["save_pretrained"] = attach(saved, tmp_path / "saved")
    for label, other in copies.items():
        assert isinstance(other, SteeredPipeline), label
        assert torch.equal(images_of(other, name), expected), label
    with pytest.raises(InputError, match="needs a steered pipeline"):
        type(with_f).from_pipe(load(checkpoint, name))


def test_what_is_set_on_the_result_is_what_runs(trained, checkpoint):
    with_f, _ = trained("sd-turbo")
    before, other = images_of(with_f, "sd-turbo", num_inference_steps=2), copy.copy(with_f)
    ancestral = diffusers.EulerAncestralDiscreteScheduler.from_config(with_f.scheduler.config)
    other.scheduler = ancestral
    changed = images_of(other, "sd-turbo", num_inference_steps=2)
    assert not torch.equal(changed, before)
    assert torch.equal(images_of(with_f, "sd-turbo", num_inference_steps=2), before)
    other.vae = load(checkpoint, "sd-turbo").vae
    other.vae.decoder.conv_out.weight.data.zero_()
    assert float(images_of(other, "sd-turbo").std(dim=(0, 2, 3)).max()) < 1e-6, "a decoder of zeros paints one colour"
    called = []
    with_f.unet = torch.compile(with_f.unet, backend=lambda graph, inputs: called.append(1) or graph.forward)
    torch.testing.assert_close(images_of(with_f, "sd-turbo", num_inference_steps=2), before)
    assert called


def test_a_compiled_network_stands_for_the_one_inside(trained, checkpoint):
    with_f, folder = trained("flux")
    pipe = load(checkpoint, "flux")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(images_of(attach(pipe, folder), "flux"), images_of(with_f, "flux"))


@pytest.mark.parametrize("name", FAMILIES)
def test_offloading_after_attaching(name, trained, monkeypatch):
    """The hypernetwork shares its weights with a network that is elsewhere: they are fetched before it runs."""
    from accelerate.hooks import CpuOffload

    with_f, _ = trained(name)
    expected = images_of(with_f, name)
    order = []
    fetch = CpuOffload.pre_forward
    monkeypatch.setattr(
        CpuOffload, "pre_forward", lambda self, module, *a, **k: order.append(module) or fetch(self, module, *a, **k)
    )
    with_f.hypernetwork.register_forward_pre_hook(lambda *_: order.append("f"))
    with_f.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        order.clear()
        assert_same(images_of(with_f, name), expected)
        assert getattr(with_f, with_f.family.network_of(with_f)) in order[: order.index("f")]
    with_f.remove_all_hooks()
    with_f.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert_same(images_of(with_f, name), expected)
    assert any(hasattr(module, "_diffusers_hook") for module in with_f.hypernetwork.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_sequential_offloading_after_attaching(name, trained, checkpoint, monkeypatch, tmp_path):
    """accelerate's own hooks, every weight on the meta device between its uses.

    On a device of type `cpu` accelerate leaves a plain tensor where it fetched a parameter and then fails on it, in the
    plain pipeline too; on an accelerator it leaves a parameter. Here it finds one, as it would there.
    """
    import accelerate.hooks

    place = accelerate.hooks.set_module_tensor_to_device

    def placed(module, tensor_name, device, *rest, **options):
        held = module._parameters.get(tensor_name)
        if held is not None and not isinstance(held, torch.nn.Parameter):
            module._parameters[tensor_name] = torch.nn.Parameter(held, requires_grad=False)
        return place(module, tensor_name, device, *rest, **options)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", placed)
    with_f, folder = trained(name)
    expected, plain = images_of(with_f, name), images_of(load(checkpoint, name), name)
    library = load(checkpoint, name)
    library.enable_sequential_cpu_offload(device="cpu")
    assert_same(images_of(library, name), plain)  # the library's own pipeline runs so
    with_f.enable_model_cpu_offload(device="cpu")
    with_f.enable_sequential_cpu_offload(device="cpu")
    twin = with_f.hypernetwork.twin
    for _ in range(2):
        assert all(parameter.is_meta for parameter in twin.parameters())
        assert_same(images_of(with_f, name), expected)
    assert_same(images_of(copy.copy(with_f), name), expected)
    with pytest.raises(InputError, match="remove_all_hooks"):
        with_f.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with_f.remove_all_hooks()
    assert not any(parameter.is_meta for parameter in twin.parameters())
    assert not any(hasattr(module, "_hf_hook") for module in twin.modules())
    assert_same(images_of(with_f, name), expected)
    with pytest.raises(InputError, match="attach the adapter first"):
        attach(library, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_group_offloading_by_blocks_after_attaching(name, trained):
    with_f, _ = trained(name)
    expected = images_of(with_f, name)
    with_f.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    for _ in range(2):
        assert torch.equal(images_of(with_f, name), expected)
    assert any(hasattr(module, "_diffusers_hook") for module in with_f.hypernetwork.modules())


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_is_for_weights_that_are_not_shared(storage, trained, checkpoint):
    """Before attaching and after it, in 8 bits and in 16; on the decoder, which f does not share, it is the user's."""
    with_f, folder = trained("sd-turbo")
    casting = {"storage_dtype": storage, "compute_dtype": torch.float32}
    pipe = load(checkpoint, "sd-turbo")
    pipe.unet.enable_layerwise_casting(**casting)
    with pytest.raises(InputError, match="layerwise casting is not for weights that are shared"):
        attach(pipe, folder)
    expected = images_of(with_f, "sd-turbo")
    with_f.vae.enable_layerwise_casting(**casting)
    assert 0 < float((images_of(with_f, "sd-turbo") - expected).abs().max()) < 0.2
    with_f.unet.enable_layerwise_casting(**casting)
    with pytest.raises(InputError, match="take layerwise casting or quantisation off"):
        images_of(with_f, "sd-turbo")


def test_what_comes_before_attaching_and_cannot(trained, checkpoint):
    import peft

    _, folder = trained("sana")
    pipe = load(checkpoint, "sana")
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(InputError, match="attach the adapter first, then enable offloading"):
        attach(pipe, folder)
    pipe = load(checkpoint, "sana")
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(InputError, match="attach the adapter first, then enable offloading"):
        attach(pipe, folder)
    pipe = load(checkpoint, "sana")
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(InputError, match="hooks group_offloading"):
        attach(pipe, folder)
    pipe = load(checkpoint, "sana")
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(InputError, match="layerwise casting is not for weights that are shared"):
        attach(pipe, folder)
    with_f = attach(load(checkpoint, "sana"), folder)
    before = images_of(with_f, "sana")
    with_f.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False))
    assert not torch.equal(images_of(with_f, "sana"), before), "another LoRA is loaded into the result"
    with pytest.raises(InputError, match="carries another LoRA"):
        attach(with_f.detached(), folder)
    with_f = attach(load(checkpoint, "sana"), folder)
    with_f.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(InputError, match="stored in 8 bits"):
        images_of(with_f, "sana")


def test_prompts_reach_f_as_they_did_in_training(trained, checkpoint):
    """An adapter that records nothing was trained without SANA's instruction; what a call says wins."""

    with_f, folder = trained("sana", instruction=True, max_sequence_length=200)
    document = json.loads((folder / CONFIG).read_text())
    assert document["hnkit"]["conditioning"] == {
        "size": 32, "instruction": True, "max_sequence_length": 200,
    }  # fmt: skip
    call = {key: value for key, value in arguments("sana").items() if key != "complex_human_instruction"}
    default = with_f(PROMPTS, generator=seeded(), **call)
    without = images_of(with_f, "sana")
    assert not torch.equal(default.images, without)
    del document["hnkit"]
    (folder / CONFIG).write_text(json.dumps(document))
    published = attach(load(checkpoint, "sana"), folder)
    published.set_progress_bar_config(disable=True)
    assert torch.equal(published(PROMPTS, generator=seeded(), max_sequence_length=200, **call).images, without)
    said = published(PROMPTS, generator=seeded(), complex_human_instruction=["Say more:"], **call).images
    assert not torch.equal(said, without)


def test_a_run_folder_is_taken_where_its_adapter_is(trained, checkpoint, tmp_path):
    with_f, folder = trained("sana")
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "adapter")
    again = attach(load(checkpoint, "sana"), tmp_path / "run")
    assert torch.equal(images_of(again, "sana"), images_of(with_f, "sana"))


# --- injected noise ---------------------------------------------------------------------------------------------


def injecting(name, make_backend, folder, injection):
    """A trained adapter that was trained with injected noise."""
    backend = make_backend(name)
    perturb(backend)
    backend.injection = injection
    backend.save_adapter(folder)
    return backend


@pytest.mark.parametrize("name", FAMILIES)
def test_injected_noise_in_a_plain_pipeline(name, checkpoint, make_backend, tmp_path):
    """The moved noise is a (x + f(x)) + b eps with an eps that is normal, the call's own, and takes no draw from it."""
    injection = NoiseInjection(0.36, 5.0)
    backend = injecting(name, make_backend, tmp_path / "trained", injection)
    with_f = attach(load(checkpoint, name), tmp_path / "trained")
    given, moved = [], []
    with_f.hypernetwork.register_forward_hook(lambda module, inputs, output: given.append((inputs[0], output)))
    move = with_f._move
    with_f._move = lambda *inputs: moved.append(move(*inputs)) or moved[-1]
    scale = {"guidance_scale": backend.options.guidance}

    def images(generator, prompts=PROMPTS, **changes):
        return with_f(prompts, generator=generator, **arguments(name, **scale, **changes)).images

    used, plain = seeded(), seeded()
    first = images(used)
    x, delta = given[-1]
    noise = moved[-1]
    delta = delta * (5.0 / delta.flatten(1).norm(dim=1).clamp(min=5.0))[:, None, None, None]
    eps = (noise - 0.8 * (x + delta)) / 0.6
    # mean 0, variance 1 and no correlation with x, each by a z-test at 1e-6 (|z| < 4.9), and two rows that differ
    count = eps.numel()
    assert abs(float(eps.mean())) < 4.9 / count**0.5
    assert abs(float(eps.square().mean()) - 1) < 4.9 * (2 / count) ** 0.5
    assert abs(float((eps * x).mean())) < 4.9 / count**0.5
    assert not torch.allclose(eps[0], eps[1], atol=0.1)
    assert torch.equal(images(seeded()), first)
    assert not torch.allclose(images(seeded(1)), first, atol=1e-3)
    load(checkpoint, name)(PROMPTS, generator=plain, **arguments(name, **scale))
    assert torch.equal(used.get_state(), plain.get_state())
    # one generator an image: the image does not depend on its batch
    both = images([seeded(1), seeded(2)])
    torch.testing.assert_close(images([seeded(2)], PROMPTS[1:]), both[1:], atol=2e-6, rtol=0)
    # one generator in one state, many latents: each has fresh noise of its own
    latents = backend.pack(noise_for(backend, 2))
    kept = seeded()
    images(kept, latents=latents)
    drawn = moved[-1]
    images(kept, latents=latents + 1)
    offset = moved[-1] - drawn
    assert float(offset.std()) > 0.3
    # and what is saved and copied is deployed alike
    with_f.save_pretrained(tmp_path / "saved")
    again = attach(load(checkpoint, name), tmp_path / "saved")
    assert again._adapter.injection == injection
    torch.testing.assert_close(
        again(PROMPTS, generator=seeded(), **arguments(name, **scale)).images, first, atol=2e-6, rtol=0
    )


def test_without_a_generator_injected_noise_is_the_global_one_s(checkpoint, make_backend, tmp_path):
    injecting("sd-turbo", make_backend, tmp_path / "trained", NoiseInjection(0.5))
    with_f = attach(load(checkpoint, "sd-turbo"), tmp_path / "trained")
    images = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        images += [with_f(PROMPTS, **arguments("sd-turbo")).images, with_f(PROMPTS, **arguments("sd-turbo")).images]
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[3])
    assert not torch.allclose(images[0], images[1], atol=1e-3)
    assert not torch.allclose(images[0], images[4], atol=1e-3)
