"""SD-Turbo: a UNet of the Stable Diffusion 2.1 family, one Euler step, no classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass

from hnkit.scaled.pipelines.factory import PREFERENCES, PUBLISHED, PipelineFactory, Preset, epochs
from hnkit.scaled.pipelines.families.table import STABLE_DIFFUSION
from hnkit.scaled.pipelines.options import PipelineOptions


@dataclass(frozen=True, kw_only=True)
class SDTurboOptions(PipelineOptions):
    """Options of the backend `sd-turbo`; the defaults are the paper's (arXiv 2508.09968, table 4)."""

    model_id: str = "stabilityai/sd-turbo"
    size: int = 512
    rank: int = 256


# AdamW's weight decay is the published code's (ExplainableML/HyperNoise at bbe3ab4, training/optim.py line 11). It has
# no script for this model: the warm-up is that of one process.
_PREFERENCE: Preset = {
    **PUBLISHED,
    **PREFERENCES,
    "train.optimizer": "adamw",
    "train.weight_decay": 1e-4,
    "train.lr": 1e-5,
    "train.clip": 1000.0,
    "train.batch": 18,
    "train.accumulate": 1,
    "train.steps": epochs(18),
    "train.warmup": 100,
    "backend.rank": 256,
    "backend.lora_alpha": 256.0,
    "backend.size": 512,
}

FACTORY = PipelineFactory(
    name="sd-turbo",
    summary="SD-Turbo, 512 px, d = 16,384",
    options=SDTurboOptions,
    presets={"default": _PREFERENCE, "preference": _PREFERENCE},
    family=STABLE_DIFFUSION,
)
