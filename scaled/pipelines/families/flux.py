"""FLUX.1-schnell: a rectified-flow transformer over 2 x 2 patches of the latent."""

from __future__ import annotations

from dataclasses import dataclass

from hnkit.scaled.pipelines.factory import PREFERENCES, PUBLISHED, PipelineFactory, Preset, epochs
from hnkit.scaled.pipelines.families.table import FLUX
from hnkit.scaled.pipelines.options import PipelineOptions


@dataclass(frozen=True, kw_only=True)
class FluxOptions(PipelineOptions):
    """Options of the backend `flux`; the defaults are the paper's (arXiv 2508.09968, table 4)."""

    model_id: str = "black-forest-labs/FLUX.1-schnell"
    size: int = 512
    lora_alpha: float = 640.0
    max_sequence_length: int = 512
    hypernetwork_checkpointing: bool = True


# The published script runs 7 processes and warms up over 100 steps times their number (ExplainableML/HyperNoise at
# bbe3ab4, scripts/flux_hypernoise.sh, training/optim.py lines 11 and 33).
_PREFERENCE: Preset = {
    **PUBLISHED,
    **PREFERENCES,
    "train.optimizer": "adamw",
    "train.weight_decay": 1e-4,
    "train.lr": 2e-5,
    "train.clip": 1.0,
    "train.batch": 7 * 4,
    "train.accumulate": 4,
    "train.steps": epochs(7 * 4),
    "train.warmup": 100 * 7,
    "backend.rank": 128,
    "backend.lora_alpha": 640.0,
    "backend.size": 512,
    "backend.hypernetwork_checkpointing": True,
}

FACTORY = PipelineFactory(
    name="flux",
    summary="FLUX.1-schnell, 512 px, d = 65,536",
    options=FluxOptions,
    presets={"default": _PREFERENCE, "preference": _PREFERENCE},
    family=FLUX,
)
