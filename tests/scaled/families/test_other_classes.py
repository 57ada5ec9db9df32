"""Classes that no record names: what runs on the defaults is right, and what cannot is refused in one line."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from hnkit import InputError
from hnkit.scaled.attach import attach
from hnkit.scaled.backends import DIFFUSERS
from hnkit.scaled.pipelines.calls import PipelineCall
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, steered
from tests.scaled.families import builders
from tests.scaled.families.conftest import settings

PROMPT = tiny.PROMPTS[:1]


def over(name, components):
    """A pipeline of the class `name` over the components of another one."""
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind).parameters
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    given = {key: value for key, value in (absent | components).items() if key in taken}
    return kind(**given, **({"requires_safety_checker": False} if "requires_safety_checker" in taken else {}))


@pytest.fixture
def load_other(tmp_path):
    """`load_other(name, other, **options)`: a backend of the class `name` over a tiny checkpoint of another one."""

    def make(name, other=tiny.sd_turbo, **options):
        folder = tiny.write(lambda: over(name, other().components), tmp_path / name)
        chosen = settings("StableDiffusionPipeline", folder, self_check=True) | options
        return DIFFUSERS.load(DIFFUSERS.options(**chosen))

    return make


@pytest.mark.parametrize(
    ("name", "other"),
    [("StableDiffusionPAGPipeline", tiny.sd_turbo), ("StableDiffusion3PAGPipeline", builders.sd3)],
)
def test_perturbed_attention_is_off_like_other_guidance(name, other, load_other, tmp_path):
    """It is on by default in its classes, and doubles the network's input; in a plain call f is what it was."""
    backend = load_other(name, other)
    perturb(backend)
    backend.save_adapter(tmp_path / "adapter")
    noise, condition = noise_for(backend, 1), backend.encode(PROMPT)
    call = {
        "prompt": PROMPT, "height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 0.0,
        "output_type": "pt", "return_dict": False,
    }  # fmt: skip

    def called(pipe, x, scale):
        pipe.set_progress_bar_config(disable=True)
        seeded = condition.generators("sampler", backend.options.seed)
        return pipe(latents=backend.pack(x), generator=seeded, pag_scale=scale, **call)[0]

    def plain():
        return diffusers.DiffusionPipeline.from_pretrained(backend.options.model_id)

    with torch.no_grad():
        moved = noise + backend.hypernetwork(noise, condition)
    torch.testing.assert_close(called(plain(), moved, 0.0), steered(backend, noise, condition, 2), atol=2e-5, rtol=0)
    found = called(attach(plain(), tmp_path / "adapter"), noise, 3.0)
    torch.testing.assert_close(found, called(plain(), moved, 3.0), atol=2e-5, rtol=0)
    assert not torch.allclose(found, called(plain(), noise, 3.0), atol=1e-4)


def test_a_panorama_is_one_window_or_refused(load_other):
    """Wider than its window, the class gives its network a part of the noise at a time."""
    load_other("StableDiffusionPanoramaPipeline")
    with pytest.raises(InputError, match=r"gives its network \d+ entries for 2560 of noise.* no hypernetwork can"):
        load_other("StableDiffusionPanoramaPipeline", width=160)


def test_a_class_without_images_as_tensors_is_refused(load_other):
    """Images and depths: the class knows no `output_type="pt"`."""
    with pytest.raises(InputError, match="no hypernetwork can be made of this class") as caught:
        load_other("StableDiffusionLDM3DPipeline")
    assert "\n" not in str(caught.value)


def test_a_video_is_refused(load, monkeypatch):
    """One frame is asked for; of a class that makes more all the same, none would stand for the others."""
    backend, run = load("WanPipeline"), PipelineCall.run
    monkeypatch.setattr(PipelineCall, "run", lambda *a, **k: (run(*a, **k)[0].expand(-1, 2, -1, -1, -1),))
    with pytest.raises(InputError, match="WanPipeline makes 2 frames where one is asked for"):
        backend.generate(noise_for(backend, 1), backend.encode(PROMPT))
