"""SANA-Sprint: a linear-attention transformer, a deep-compression decoder, a consistency scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hnkit.errors import InputError
from hnkit.scaled.pipelines.factory import PREFERENCES, PUBLISHED, PipelineFactory, Preset, epochs
from hnkit.scaled.pipelines.families.table import SANA_SPRINT
from hnkit.scaled.pipelines.options import PipelineOptions


@dataclass(frozen=True, kw_only=True)
class SanaOptions(PipelineOptions):
    """Options of the backend `sana`; the defaults are the paper's (arXiv 2508.09968, table 4)."""

    model_id: str = "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers"
    size: int = 1024
    guidance: float = 4.5
    max_sequence_length: int = 300
    instruction: bool = False
    """Put the pipeline's own enhancement instruction before each prompt, as a plain call of it does. The paper's code
    encodes prompts without it, for hypernetwork and generator."""
    intermediate_timestep: float = 1.3
    """Middle timestep of the two-step sampler, between 0 and pi/2; 0: none, as in the paper's inference script. 1.3 is
    the pipeline's own default, so that two steps here are two steps of a plain call."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.intermediate_timestep < math.pi / 2:
            raise InputError(
                f"backend.intermediate_timestep {self.intermediate_timestep:g}: it lies between 0 and pi/2, 0 for none"
            )


# The scripts of the published code (ExplainableML/HyperNoise at bbe3ab4, scripts/*.sh and training/optim.py) give SGD a
# momentum of 0.9 without Nesterov, and count the warm-up in 100 steps times the number of processes: 6, or 1. They
# have no bound on each sample's gradient (train.reward_clip), which the miniature's recipe has: docs/earning.md says
# when it is worth setting here.
_SHARED: Preset = {
    **PUBLISHED,
    "train.optimizer": "sgd",
    "train.momentum": 0.9,
    "train.lr": 1e-3,
    "train.clip": 1.0,
    "backend.rank": 128,
    "backend.lora_alpha": 256.0,
    "backend.size": 1024,
    "backend.guidance": 4.5,
    "backend.instruction": False,
    "backend.vae_checkpointing": True,
}
_PREFERENCE: Preset = {
    **_SHARED,
    **PREFERENCES,
    "train.batch": 18 * 3,
    "train.accumulate": 3,
    "train.steps": epochs(18 * 3),
    "train.warmup": 100 * 6,
}
_REDNESS: Preset = {
    **_SHARED,
    "rewards.redness": 1.0,
    "train.batch": 3,
    "train.accumulate": 1,
    "train.steps": 200 * 30 // 3,
    "train.warmup": 100,
    "train.validation_share": 0.0,  # the paper trains on all of its 30 prompts
}

FACTORY = PipelineFactory(
    name="sana",
    summary="SANA-Sprint 0.6B, 1024 px, d = 32,768",
    options=SanaOptions,
    presets={
        "default": _PREFERENCE,
        "preference": _PREFERENCE,
        "preference-direct": {**_PREFERENCE, "train.objective": "direct"},
        "redness": _REDNESS,
        "redness-direct": {**_REDNESS, "train.objective": "direct", "train.lr": 1e-4},
    },
    family=SANA_SPRINT,
)


@dataclass(frozen=True, kw_only=True)
class SanaLargeOptions(SanaOptions):
    """Options of the backend `sana-1.6b`: those of `sana`, for the larger model."""

    model_id: str = "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"


LARGE = PipelineFactory(
    name="sana-1.6b",
    summary="SANA-Sprint 1.6B, 1024 px, d = 32,768",
    options=SanaLargeOptions,
    presets={"default": _PREFERENCE, "preference": _PREFERENCE},
    family=SANA_SPRINT,
)
