"""Distilled models of other families by name, and `diffusers` for any other: their models, sizes and guidance."""

from __future__ import annotations

import math
from dataclasses import make_dataclass
from typing import Any

from hnkit.scaled.pipelines.factory import PipelineFactory, Preset
from hnkit.scaled.pipelines.families.table import family_of
from hnkit.scaled.pipelines.options import PipelineOptions

_DEFAULT: Preset = {
    "train.optimizer": "adamw",
    "train.lr": 2e-5,
    "train.clip": 1.0,
    "train.batch": 8,
    "train.warmup": 100,
}
"""Rates of the paper's FLUX runs (arXiv 2508.09968, table 4); for these models nobody has published any."""


def _factory(name: str, summary: str, pipeline_class: str | None, **defaults: Any) -> PipelineFactory:
    """A backend by its options' defaults."""
    fields = [(key, type(value) if value is not None else float | None, value) for key, value in defaults.items()]
    options = make_dataclass(
        f"{name.title().replace('-', '').replace('.', '')}Options",
        fields,
        bases=(PipelineOptions,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": f"Options of the backend `{name}`.", "__module__": __name__},
    )
    family = family_of(pipeline_class) if pipeline_class else None
    return PipelineFactory(name=name, summary=summary, options=options, presets={"default": _DEFAULT}, family=family)


DIFFUSERS = _factory("diffusers", "any distilled text-to-image pipeline of diffusers", None, size=0, guidance=None)
"""Size and guidance are the pipeline's own; of a class that no record names, guidance is off."""

SDXL_TURBO = _factory(
    "sdxl-turbo",
    "SDXL-Turbo, 512 px, d = 16,384",
    "StableDiffusionXLPipeline",
    model_id="stabilityai/sdxl-turbo",
)
SDXL_LIGHTNING = _factory(
    "sdxl-lightning",
    "SDXL-Lightning, 1024 px, d = 65,536",
    "StableDiffusionXLPipeline",
    model_id="stabilityai/stable-diffusion-xl-base-1.0",
    size=1024,
    network_id="ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors",
    scheduler="EulerDiscreteScheduler",
    scheduler_config=("timestep_spacing=trailing",),
)
SD35_TURBO = _factory(
    "sd3.5-turbo",
    "SD3.5-Large-Turbo, 1024 px, d = 262,144",
    "StableDiffusion3Pipeline",
    model_id="stabilityai/stable-diffusion-3.5-large-turbo",
    size=1024,
)
Z_IMAGE_TURBO = _factory(
    "z-image-turbo",
    "Z-Image-Turbo, 1024 px, d = 262,144",
    "ZImagePipeline",
    model_id="Tongyi-MAI/Z-Image-Turbo",
    size=1024,
)
FLUX2_KLEIN = _factory(
    "flux2-klein",
    "FLUX.2-klein 4B, 1024 px, d = 524,288",
    "Flux2KleinPipeline",
    model_id="black-forest-labs/FLUX.2-klein-4B",
    size=1024,
    guidance=1.0,
)
QWEN_IMAGE = _factory(
    "qwen-image",
    "Qwen-Image-Lightning in 4 steps, 1024 px, d = 262,144",
    "QwenImagePipeline",
    model_id="Qwen/Qwen-Image",
    size=1024,
    guidance=1.0,
    lora="lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-4steps-V2.0.safetensors",
    # Of its model card: distilled at a shift of 3, whose logarithm dynamic shifting takes, and no terminal shift.
    scheduler_config=(f"base_shift={math.log(3)}", f"max_shift={math.log(3)}", "shift_terminal=null"),
)
PIXART = _factory(
    "pixart",
    "PixArt-alpha LCM, 1024 px, d = 65,536",
    "PixArtAlphaPipeline",
    model_id="PixArt-alpha/PixArt-LCM-XL-2-1024-MS",
    size=1024,
)
LCM = _factory(
    "lcm",
    "LCM Dreamshaper v7, 512 px, d = 16,384",
    "LatentConsistencyModelPipeline",
    model_id="SimianLuo/LCM_Dreamshaper_v7",
    guidance=8.5,
)

DISTILLED = (
    DIFFUSERS, SDXL_TURBO, SDXL_LIGHTNING, SD35_TURBO, Z_IMAGE_TURBO, FLUX2_KLEIN, QWEN_IMAGE, PIXART, LCM,
)  # fmt: skip
"""SANA-Sprint 1.6B is beside the paper's 0.6B, in sana.py."""
