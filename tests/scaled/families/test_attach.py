"""Adapters in other pipelines over the same network: image to image, inpainting, ControlNet.

The expected image is the plain pipeline's, whose noise is moved by the backend that trained the adapter: where it is an
argument, it is given; elsewhere the library's own `randn_tensor` is exchanged for one that returns x + f(x).
"""

from __future__ import annotations

import inspect
import sys

import diffusers
import pytest
import torch

from hnkit import InputError
from hnkit.scaled.attach import attach
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, redness
from tests.scaled.families.facts import FACTS

PROMPT = tiny.PROMPTS[:1]


@pytest.fixture
def trained(load, tmp_path):
    """`trained(name, **options)`: a backend away from f = 0; its adapter is in `tmp_path / "adapter"`."""

    def make(name, **options):
        backend = load(name, **options)
        perturb(backend)
        backend.save_adapter(tmp_path / "adapter")
        return backend

    return make


def over(folder, kind, control=None):
    """A fresh pipeline of another class over the components in `folder`: a call leaves its marks on a scheduler."""
    text, taken = diffusers.DiffusionPipeline.from_pretrained(folder), inspect.signature(kind).parameters
    components = text.components
    if control is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            components |= {"controlnet": control(text)}
            for parameter in components["controlnet"].parameters():  # it starts at zero
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    pipe = kind(**{name: part for name, part in components.items() if name in taken})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def moved_by(backend, monkeypatch, kind):
    """Let the library draw x + f(x) in `prepare_latents` of this class."""
    module = sys.modules[inspect.unwrap(kind.prepare_latents).__module__]
    draw, condition = module.randn_tensor, backend.encode(PROMPT)

    def moved(*args, **kwargs):
        noise = draw(*args, **kwargs)
        with torch.no_grad():
            return noise + backend.hypernetwork(noise.float(), condition).to(noise.dtype)

    monkeypatch.setattr(module, "randn_tensor", moved)


def arguments(kind, backend, **more):
    """What calls share, as far as the class takes it; a list of prompts is a new one each time: Z-Image changes it."""
    height, width = backend.options.sides
    asked = {
        "prompt": list(PROMPT), "complex_human_instruction": None,
        "num_inference_steps": 2, "height": height, "width": width, "output_type": "pt",
        "guidance_scale": backend.options.guidance, "true_cfg_scale": 1.0, "use_resolution_binning": False, **more,
    }  # fmt: skip
    taken = inspect.signature(kind.__call__).parameters
    return {name: value for name, value in asked.items() if name in taken}


SHARE = ("StableDiffusionXLInpaintPipeline", "StableDiffusion3Img2ImgPipeline", "ZImageImg2ImgPipeline")
SHARE += ("StableDiffusion3ControlNetPipeline", "QwenImageControlNetPipeline")
"""Classes of which the test is in the plain suite; those of the others run with `-m slow`."""


def others(control):
    """Family and class, for the other classes with a ControlNet, or for those without."""
    pairs = [(name, other) for name, facts in FACTS.items() for other in facts.attached]
    return [
        pytest.param(name, other, marks=[pytest.mark.slow] * (other not in SHARE))
        for name, other in pairs
        if ("ControlNet" in other) == control
    ]


@pytest.mark.parametrize(("name", "other"), others(control=False))
def test_image_to_image(name, other, trained, folder, tmp_path, monkeypatch):
    backend, kind = trained(name), getattr(diffusers, other)
    side = backend.options.sides[0]
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))

    def called(pipe):
        asked = arguments(kind, backend, image=image, mask_image=torch.ones(1, 1, side, side), strength=0.9)
        return pipe(generator=torch.Generator().manual_seed(0), **asked).images

    base = called(over(folder(name), kind))
    found = called(attach(over(folder(name), kind), tmp_path / "adapter"))
    moved_by(backend, monkeypatch, kind)
    expected = called(over(folder(name), kind))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert not torch.allclose(found, base, atol=1e-4)


def _from_unet(pipe):
    return diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))


def _sd3(pipe):
    return diffusers.SD3ControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_extra_conditioning_channels=0
    )


def _flux(pipe):
    return diffusers.FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
    )


def _qwen(pipe):
    config = {name: value for name, value in pipe.transformer.config.items() if name in _QWEN} | {"num_layers": 1}
    return diffusers.QwenImageControlNetModel(**config)


_QWEN = tuple(inspect.signature(diffusers.QwenImageControlNetModel).parameters)


CONTROLS = {
    "StableDiffusionXLPipeline": _from_unet,
    "StableDiffusionPipeline": _from_unet,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "QwenImagePipeline": _qwen,
}


@pytest.mark.parametrize(("name", "other"), others(control=True))
def test_controlnet(name, other, trained, folder, tmp_path):
    backend, kind, control = trained(name), getattr(diffusers, other), CONTROLS[name]
    side = backend.options.sides[0]
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    noise, condition = noise_for(backend, 1), backend.encode(PROMPT)
    with torch.no_grad():
        moved = noise + backend.hypernetwork(noise, condition)

    def called(pipe, x):
        asked = arguments(kind, backend, image=picture, control_image=picture)
        if "control_image" in asked:
            asked.pop("image", None)
        torch.manual_seed(0)  # SD3's ControlNet samples the encoded picture without the generator
        return pipe(latents=backend.pack(x), generator=torch.Generator().manual_seed(0), **asked).images

    found = called(attach(over(folder(name), kind, control), tmp_path / "adapter"), noise)
    torch.testing.assert_close(found, called(over(folder(name), kind, control), moved), atol=2e-5, rtol=0)
    assert not torch.allclose(found, called(over(folder(name), kind, control), noise), atol=1e-4)


@pytest.mark.parametrize("name", ["ZImagePipeline", "Flux2KleinPipeline", "StableDiffusionXLPipeline"])
def test_called_again_offloaded_and_detached(name, trained, folder, tmp_path):
    """Batches of one and three, odd numbers of steps; what one call or attachment leaves behind reaches no other."""
    backend = trained(name)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name))
    pipe.set_progress_bar_config(disable=True)

    def called(pipe, count, steps):
        asked = arguments(type(backend.pipeline), backend, prompt=list(tiny.PROMPTS[:count]), num_inference_steps=steps)
        return pipe(generator=torch.Generator().manual_seed(0), **asked).images

    cases = [(1, 3), (3, 1), (1, 5)]
    plain = [called(pipe, *case) for case in cases]
    with_f = attach(pipe, tmp_path / "adapter")
    moved = [called(with_f, *case) for case in cases]
    assert not any(torch.allclose(one, other, atol=1e-4) for one, other in zip(plain, moved, strict=True))
    for again in (with_f, attach(with_f.detached(), tmp_path / "adapter")):
        assert all(torch.equal(called(again, *case), images) for case, images in zip(cases, moved, strict=True))
    assert all(torch.equal(called(with_f.detached(), *case), images) for case, images in zip(cases, plain, strict=True))
    with_f.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    for _ in range(2):
        assert torch.equal(called(with_f, *cases[1]), moved[1])


@pytest.mark.parametrize("name", ["QwenImagePipeline", "PixArtAlphaPipeline"])
def test_direct_fine_tuning(name, load):
    """The baseline: the same LoRA on the generator itself, with a gradient and no noise map."""
    backend = load(name)
    direct = backend.direct()
    noise, condition = noise_for(backend, 1), backend.encode(PROMPT)
    with torch.no_grad():
        base = backend.generate(noise, condition)
    torch.testing.assert_close(direct.generate(noise, condition), base, atol=2e-5, rtol=0)
    perturb(direct)
    images = direct.generate(noise + direct.hypernetwork(noise, condition), condition)
    assert not torch.allclose(images, base, atol=1e-4)
    redness(images).sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in direct.hypernetwork.parameters())
    with torch.no_grad():
        assert torch.equal(backend.generate(noise, condition), base)


def test_a_call_for_other_noise_is_refused(trained, folder, tmp_path):
    """Wan's adapters are trained on one frame; the class draws many by default."""
    backend = trained("WanPipeline")
    with_f = attach(diffusers.DiffusionPipeline.from_pretrained(folder("WanPipeline")), tmp_path / "adapter")
    with_f.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match=r"WanPipeline draws noise of shape \(1, 16, 2, .* and the adapter moves"):
        with_f(**arguments(diffusers.WanPipeline, backend, num_frames=5))


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "QwenImagePipeline"])
def test_latents_of_another_shape_and_a_second_adapter_are_refused(name, trained, folder, tmp_path):
    """As many entries in another shape would be moved as if they lay elsewhere."""
    backend = trained(name)
    with_f = attach(diffusers.DiffusionPipeline.from_pretrained(folder(name)), tmp_path / "adapter")
    with_f.set_progress_bar_config(disable=True)
    taken = backend.pack(noise_for(backend, 1)).shape
    for shape in ((1, 7, 3, 3), (1, 2, taken.numel() // 2), (1, taken.numel())):
        with pytest.raises(InputError, match=r"latents of shape .*: for this image they are \(n, "):
            with_f(latents=torch.zeros(shape), **arguments(type(backend.pipeline), backend))
    with pytest.raises(InputError, match=r"attached to this pipeline already: .* pipe\.detached\(\)"):
        attach(with_f, tmp_path / "adapter")


def test_adapters_of_other_networks_are_refused(trained, folder, tmp_path):
    trained("ZImagePipeline")
    for name in ("StableDiffusionXLPipeline", "QwenImagePipeline", "SanaPipeline"):
        with pytest.raises(InputError) as caught:
            attach(diffusers.DiffusionPipeline.from_pretrained(folder(name)), tmp_path / "adapter")
        assert "\n" not in str(caught.value)
        assert "ZImage" in str(caught.value)
