"""What distilled checkpoints need: a LoRA, another network, another scheduler, their own schedule, other sizes."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from hnkit import InputError
from hnkit.scaled.attach import attach
from hnkit.scaled.backends import DIFFUSERS
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.usage import attach_code
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, redness, steered
from tests.scaled.families.builders import unet
from tests.scaled.families.conftest import settings

SDXL = "StableDiffusionXLPipeline"
PROMPT = tiny.PROMPTS[:1]


def base_images(backend, steps=1, seed=3):
    with torch.no_grad():
        return backend.generate(noise_for(backend, 1, seed), backend.encode(PROMPT), steps)


@pytest.fixture
def lora(folder, tmp_path):
    """A LoRA for the tiny SDXL, as diffusers writes one, and the pipeline with it loaded."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(SDXL))
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    return tmp_path / "pytorch_lora_weights.safetensors"


def test_a_lora_is_loaded_and_fused(load, lora, folder, tmp_path):
    plain, with_lora = load(SDXL), load(SDXL, lora=str(lora), lora_scale=0.5)
    assert not torch.allclose(base_images(with_lora), base_images(plain), atol=1e-4)
    assert not any("lora" in name for name, _ in with_lora._base.named_parameters())
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(SDXL))
    pipe.load_lora_weights(str(lora.parent))
    pipe.fuse_lora(lora_scale=0.5)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        prompt=PROMPT, latents=noise_for(with_lora, 1), num_inference_steps=1, guidance_scale=0.0, height=16, width=16,
        output_type="pt", generator=with_lora.encode(PROMPT).generators("sampler", 0),
    ).images  # fmt: skip
    torch.testing.assert_close(base_images(with_lora), found, atol=1e-5, rtol=0)
    perturb(with_lora)
    with_lora.save_adapter(tmp_path / "adapter")
    recorded = DIFFUSERS.recorded(tmp_path / "adapter")
    assert (recorded["lora"], recorded["lora_scale"]) == (str(lora), 0.5)


def test_loras_of_others_are_refused(load, lora, tmp_path, caplog):
    with pytest.raises(InputError, match=r"backend\.lora .* does not fit UNet2DConditionModel"):
        load("StableDiffusionPipeline", lora=str(lora))
    assert "unsuccessful" not in caplog.text  # the library would say all of it first, in many lines
    with pytest.raises(InputError, match=r"backend\.lora .* of another network|backend\.lora .* does not fit"):
        load("StableDiffusion3Pipeline", lora=str(lora))
    with pytest.raises(InputError, match=r"backend\.lora.*is no safetensors file"):
        load(SDXL, lora=str(tmp_path / "nothing.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has 0 safetensors files"):
        load(SDXL, lora=str(tmp_path / "empty"))


def test_another_network(load, folder, tmp_path):
    other = diffusers.UNet2DConditionModel.from_config(dict(load(SDXL)._base.config))
    other.save_pretrained(tmp_path / "unet")
    save_file(other.state_dict(), tmp_path / "unet.safetensors")
    plain = base_images(load(SDXL))
    by_folder = base_images(load(SDXL, network_id=str(tmp_path / "unet")))
    assert not torch.allclose(by_folder, plain, atol=1e-4)
    assert torch.equal(base_images(load(SDXL, network_id=str(tmp_path / "unet.safetensors"))), by_folder)
    unet().save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match=r"backend\.network_id .* is another network"):
        load(SDXL, network_id=str(tmp_path / "small"))
    save_file(unet().state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(InputError, match=r"backend\.network_id .* does not fit UNet2DConditionModel"):
        load(SDXL, network_id=str(tmp_path / "small.safetensors"))


def test_scheduler_and_schedule(load):
    """f is given the first timestep of the schedule, and the sampler runs it; other numbers of steps are refused."""
    backend = load(SDXL, scheduler="LCMScheduler", scheduler_config=("timestep_spacing=leading",), timesteps=(399,))
    assert type(backend.pipeline.scheduler).__name__ == "LCMScheduler"
    seen = []
    backend._base.register_forward_pre_hook(lambda module, inputs, named: seen.append(inputs), with_kwargs=True)
    base_images(backend, 1)
    assert float(seen[-1][1]) == 399
    backend.hypernetwork.twin.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    backend.hypernetwork(noise_for(backend, 1), backend.encode(PROMPT))
    assert float(seen[-1][1]) == 399
    with pytest.raises(InputError, match=r"2 steps: backend\.timesteps is a schedule of 1"):
        base_images(backend, 2)
    flow = load("StableDiffusion3Pipeline", sigmas=(1.0, 0.6))
    assert base_images(flow, 2).shape == (1, 3, 16, 16)
    with pytest.raises(InputError, match="StableDiffusion3Pipeline takes no timesteps"):
        load("StableDiffusion3Pipeline", timesteps=(999,))
    with pytest.raises(InputError, match=r"timesteps \[399\]: EulerAncestralDiscreteScheduler takes none from outside"):
        load(SDXL, scheduler="EulerAncestralDiscreteScheduler", timesteps=(399,))
    with pytest.raises(InputError, match="diffusers has no scheduler of that name"):
        load(SDXL, scheduler="NoScheduler")
    with pytest.raises(InputError, match="LCMScheduler has no such setting"):
        load(SDXL, scheduler="LCMScheduler", scheduler_config=("colour=red",))
    with pytest.raises(InputError, match=r"write NAME=VALUE"):
        DIFFUSERS.options(scheduler_config=("spacing",))
    with pytest.raises(InputError, match="both given"):
        DIFFUSERS.options(timesteps=(1,), sigmas=(1.0,))


@pytest.mark.parametrize(
    ("name", "schedule", "said"),
    [
        ("ZImagePipeline", {"sigmas": (0.2, 0.9)}, "each is below the one before"),
        ("ZImagePipeline", {"sigmas": (1.0, 0.0)}, "a finite number, above 0"),
        ("ZImagePipeline", {"sigmas": (float("nan"),)}, "a finite number, above 0"),
        ("ZImagePipeline", {"sigmas": (20.0, 1.0)}, "FlowMatchEulerDiscreteScheduler are at most 1"),
        (SDXL, {"timesteps": (999, 999), "scheduler": "LCMScheduler"}, "each is below the one before"),
        (SDXL, {"timesteps": (-3,), "scheduler": "LCMScheduler"}, "a finite number, 0 or more"),
        (SDXL, {"timesteps": (1000,), "scheduler": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler are 0 to 999"),
    ],
)
def test_a_schedule_that_goes_from_no_noise_to_an_image_is_refused(name, schedule, said, load):
    """Samplers take most of these as they are, and make something of them."""
    with pytest.raises(InputError, match=said):
        load(name, **schedule)


def test_guidance_that_a_list_hides_is_refused(load):
    """Z-Image hands its rows over one by one, and twice as many of them under guidance."""
    backend = load("ZImagePipeline", guidance=4.0)
    noise, condition = noise_for(backend, 1), backend.encode(PROMPT)
    with pytest.raises(InputError, match=r"ZImagePipeline gives its network 2 rows for 1: .*set backend\.guidance"):
        backend.hypernetwork(noise, condition)


def test_what_is_no_folder_is_told_apart(folder):
    file = next((folder(SDXL) / "unet").glob("*.safetensors"))
    for model, said in ((file, "is a single file: store it as a folder once"), (file / "no", "there is no folder")):
        with pytest.raises(InputError, match=said):
            DIFFUSERS.load(DIFFUSERS.options(**settings(SDXL, model)))


def test_options_together(load, lora, folder, tmp_path):
    """A LoRA, another network, scheduler and schedule, sides, tiles: the card's code does what the backend does."""
    other = diffusers.UNet2DConditionModel.from_config(dict(load(SDXL)._base.config))
    save_file(other.state_dict(), tmp_path / "unet.safetensors")
    options = {
        "lora": str(lora), "lora_scale": 0.7, "network_id": str(tmp_path / "unet.safetensors"), "height": 32,
        "width": 16, "scheduler": "LCMScheduler", "scheduler_config": ("timestep_spacing=trailing",),
        "timesteps": (799, 499, 99), "vae_tiling": True, "vae_checkpointing": True, "self_check": True,
    }  # fmt: skip
    backend = load(SDXL, **options)
    perturb(backend)
    noise, condition = noise_for(backend, 3), backend.encode(tiny.PROMPTS[:3])
    images = steered(backend, noise, condition, 3)
    assert images.shape == (3, 3, 32, 16)
    alone = steered(backend, noise[:1], condition.select(torch.tensor([0])), 3)
    torch.testing.assert_close(alone, images[:1], atol=2e-5, rtol=0)
    backend.save_adapter(tmp_path / "adapter")
    again = load(SDXL, **DIFFUSERS.recorded(tmp_path / "adapter"), vae_tiling=True)
    again.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(steered(again, noise, condition, 3), images, atol=2e-5, rtol=0)
    code = backend.usage()
    asked = "pipe(output_type='pt', latents=latents, generator=generators, prompt="
    scope = {"adapter": tmp_path / "adapter", "prompt": PROMPT, "latents": backend.pack(noise[:1])}
    scope["generators"] = condition.generators("sampler", 0)[:1]
    code = code.replace("pipe = attach(", "pipe.vae.enable_tiling()\npipe = attach(")  # it changes images of this size
    exec(code.replace("pipe(prompt=", asked), scope)
    torch.testing.assert_close(scope["images"], alone, atol=2e-5, rtol=0)
    for lacking in ("lora", "network_id"):
        with pytest.raises(InputError, match=r"trained on other weights.*SHA-256"):
            load(SDXL, **options | {lacking: ""}).load_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"it was trained with backend\.network_id = .* and backend\.lora = "):
        attach(diffusers.DiffusionPipeline.from_pretrained(folder(SDXL)), tmp_path / "adapter")


def test_the_card_loads_what_was_trained_on(load, folder):
    """In its type, of its variant, with parts of the hub by their names there."""
    backend = load("StableDiffusion3Pipeline", dtype="bfloat16")
    assert f"from_pretrained({str(folder('StableDiffusion3Pipeline'))!r}, dtype=torch.bfloat16)" in backend.usage()
    options = dataclasses.replace(
        backend.options, lora="me/loras/a/b.safetensors", network_id="me/nets/c.safetensors", dtype="float16"
    )
    code = attach_code(backend.family, backend.pipeline, "transformer", options, "fp16")
    assert "dtype=torch.float16, variant='fp16')" in code
    assert "pipe.load_lora_weights('me/loras', weight_name='a/b.safetensors')" in code
    assert "pipe.transformer.load_state_dict(load_file(hf_hub_download('me/nets', 'c.safetensors')))" in code
    assert "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n" in code
    compile(code, "card", "exec")


def test_pickled_weights_are_not_read(load, tmp_path):
    """DMD2's networks are published as such."""
    for option in ("lora", "network_id"):
        with pytest.raises(
            InputError, match=rf"backend\.{option} .*unet\.bin': pickled weights are not read; store them"
        ):
            load(SDXL, **{option: str(tmp_path / "unet.bin")})


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "Flux2KleinPipeline", "QwenImagePipeline"])
def test_images_that_are_not_square(name, load, folder, tmp_path):
    backend = load(name, height=32, width=16)
    perturb(backend)
    noise, condition = noise_for(backend, 1), backend.encode(PROMPT)
    images = steered(backend, noise, condition)
    assert images.shape == (1, 3, 32, 16)
    backend.save_adapter(tmp_path / "adapter")
    assert DIFFUSERS.recorded(tmp_path / "adapter")["height"] == 32
    with_f = attach(diffusers.DiffusionPipeline.from_pretrained(folder(name)), tmp_path / "adapter")
    with_f.set_progress_bar_config(disable=True)
    found = with_f(
        prompt=PROMPT, latents=backend.pack(noise), height=32, width=16, num_inference_steps=1, output_type="pt",
        generator=condition.generators("sampler", 0),
        **({"true_cfg_scale": 1.0} if "Qwen" in name else {"guidance_scale": 0.0}),
    ).images  # fmt: skip
    torch.testing.assert_close(found, images, atol=2e-5, rtol=0)
    with pytest.raises(InputError, match=r"backend\.height 33"):
        load(name, height=33)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["QwenImagePipeline", "WanPipeline", "HunyuanImagePipeline"])
def test_recomputation_changes_no_gradient(name, load):
    """Decoders with a cache of features, and blocks that are given arguments by name."""

    def gradient(**options):
        backend = load(name, **options)
        perturb(backend)
        noise, condition = noise_for(backend, 2), backend.encode(tiny.PROMPTS[:2])
        redness(backend.generate(noise + backend.hypernetwork(noise, condition), condition)).sum().backward()
        return torch.cat([p.grad.flatten() for p in backend.hypernetwork.parameters() if p.grad is not None])

    found = gradient(
        vae_checkpointing=True, vae_slicing=True, hypernetwork_checkpointing=True, generator_checkpointing=True
    )
    torch.testing.assert_close(found, gradient(), rtol=1e-3, atol=1e-5)


def test_row_by_row_decoding_keeps_less(load):
    """What the library's own slicing does not: the activations of one row at a time."""

    def kept(**options):
        backend = load("ZImagePipeline", **options)
        noise, condition = noise_for(backend, 4).requires_grad_(), backend.encode(tiny.PROMPTS)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            images = backend.generate(noise, condition)
        (gradient,) = torch.autograd.grad(redness(images).sum(), noise)
        return sum(sizes), gradient

    plain, expected = kept()
    rowwise, found = kept(vae_slicing=True)
    assert rowwise < 0.8 * plain
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_lists_are_given_again_as_they_were():
    weight = torch.tensor(2.0, requires_grad=True)

    def module(x, cache, *, place):
        y = x * weight if cache[place[0]] is None else x * cache[place[0]]
        cache[place[0]] = torch.tensor(100.0)
        place[0] += 1
        return y.sin()

    value = memory._recomputed(module, torch.ones(1), [None], place=[0])
    value.sum().backward()
    assert torch.allclose(weight.grad, torch.cos(torch.tensor(2.0)))


def test_a_model_of_no_pipeline_and_a_missing_model_id(tmp_path):
    with pytest.raises(InputError, match=r"backend 'diffusers'.*backend\.model_id"):
        DIFFUSERS.load(DIFFUSERS.options())
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(InputError, match="holds a DDPMPipeline: noise hypernetworks are for text-to-image pipelines"):
        DIFFUSERS.load(DIFFUSERS.options(**settings(SDXL, tmp_path)))
    assert "ready for a model" in DIFFUSERS.status()


# --- attached ------------------------------------------------------------------------------------------------------


def trained(load, name, tmp_path):
    backend = load(name)
    perturb(backend)
    backend.save_adapter(tmp_path / "adapter")
    return backend


def test_a_pipeline_of_components(load, folder, tmp_path):
    trained(load, SDXL, tmp_path)
    text = diffusers.DiffusionPipeline.from_pretrained(folder(SDXL))
    made = diffusers.StableDiffusionXLPipeline(**text.components)  # of components: it has no `_name_or_path`
    with_f = attach(made, tmp_path / "adapter")
    call = {"prompt": PROMPT, "guidance_scale": 0.0, "output_type": "pt", "num_inference_steps": 2}
    side = {"height": 16, "width": 16}
    for pipe in (made, with_f, text):
        pipe.set_progress_bar_config(disable=True)
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    expected = attach(text, tmp_path / "adapter")(generator=seeded(), **call, **side).images
    assert torch.equal(with_f(generator=seeded(), **call, **side).images, expected)
    assert not torch.allclose(made(generator=seeded(), **call, **side).images, expected, atol=1e-4)
