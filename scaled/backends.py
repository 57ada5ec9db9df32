"""The backends that hnkit finds by name: `sana`, `sd-turbo`, `flux`, and `digits`, a trained miniature that is bundled.

Presets hold the columns of tables 3 and 4 of arXiv 2508.09968 (and the reduction and warm-up of its published code).
`train.batch` counts the samples of one optimiser step: the paper's batch over all processes times its accumulation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hnkit.errors import InputError
from hnkit.scaled.digits.backend import DigitsBackend, DigitsOptions
from hnkit.scaled.lora.adapter import adapter_options
from hnkit.scaled.pipelines.backend import PipelineBackend
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.families.flux import FluxFamily, FluxOptions
from hnkit.scaled.pipelines.families.sana import SanaFamily, SanaOptions
from hnkit.scaled.pipelines.families.sd_turbo import SDTurboFamily, SDTurboOptions
from hnkit.scaled.pipelines.loading import find_model, load_pipeline
from hnkit.scaled.pipelines.options import PipelineOptions

Preset = Mapping[str, Any]

_PREFERENCES: Preset = {
    "rewards.hpsv2": 5.0,
    "rewards.imagereward": 1.0,
    "rewards.pickscore": 0.05,
    "rewards.clipscore": 0.01,
}
_PUBLISHED: Preset = {"train.reduction": "mean", "train.alpha": 1.0, "train.warmup": 100}
_EPOCHS, _PROMPTS = 25, 70_000


def _epochs(batch: int) -> int:
    return _EPOCHS * _PROMPTS // batch


_SANA: Preset = {
    **_PUBLISHED,
    **_PREFERENCES,
    "train.optimizer": "sgd",
    "train.lr": 1e-3,
    "train.clip": 1.0,
    "train.batch": 18 * 3,
    "train.accumulate": 3,
    "train.steps": _epochs(18 * 3),
    "backend.rank": 128,
    "backend.lora_alpha": 256.0,
    "backend.size": 1024,
    "backend.guidance": 4.5,
    "backend.vae_checkpointing": True,
}
_REDNESS: Preset = {
    **{key: value for key, value in _SANA.items() if not key.startswith("rewards.")},
    "rewards.redness": 1.0,
    "train.batch": 3,
    "train.accumulate": 1,
    "train.steps": 200 * 30 // 3,
}
_SD_TURBO: Preset = {
    **_PUBLISHED,
    **_PREFERENCES,
    "train.optimizer": "adamw",
    "train.lr": 1e-5,
    "train.clip": 1000.0,
    "train.batch": 18,
    "train.accumulate": 1,
    "train.steps": _epochs(18),
    "backend.rank": 256,
    "backend.lora_alpha": 256.0,
    "backend.size": 512,
}
_FLUX: Preset = {
    **_PUBLISHED,
    **_PREFERENCES,
    "train.optimizer": "adamw",
    "train.lr": 2e-5,
    "train.clip": 1.0,
    "train.batch": 7 * 4,
    "train.accumulate": 4,
    "train.steps": _epochs(7 * 4),
    "backend.rank": 128,
    "backend.lora_alpha": 640.0,
    "backend.size": 512,
    "backend.hypernetwork_checkpointing": True,
}
_DIGITS: Preset = {
    "train.optimizer": "adamw",
    "train.lr": 3e-4,
    "train.schedule": "linear",
    "train.warmup": 10,
    "train.clip": 1.0,
    "train.batch": 32,
    "train.steps": 600,
    "train.alpha": 0.1,
    "train.measure_samples": 32,
    "train.validate_samples": 158,
    "heldout.legibility": 1.0,
    "heldout.redness": 1.0,
}


@dataclass(frozen=True)
class PipelineFactory:
    """A backend that is known without being loaded; implements `hnkit.backend.BackendFactory`."""

    name: str
    summary: str
    options: type[Any]
    presets: Mapping[str, Preset]
    family: Family
    backend: type[PipelineBackend] = PipelineBackend

    def load(self, options: Any = None) -> PipelineBackend:
        """Load pipeline and twin.

        Raises:
            InputError: a package or the model is missing, damaged or of another class; the device cannot be used.
        """
        missing = _missing_packages()
        if missing:
            raise InputError(f"backend {self.name!r} needs {', '.join(missing)}: pip install 'hnkit[scaled]' adds it")
        chosen = self._resolved(self.options() if options is None else options)
        return self.backend(self.family, chosen, load_pipeline(self.family, chosen), name=self.name)

    def adapter_options(self, folder: Path) -> PipelineOptions:
        """The default options, at the rank, alpha, guidance and base model that the adapter in `folder` records."""
        recorded: dict[str, Any] = dict(adapter_options(folder))
        if issubclass(self.options, DigitsOptions):
            recorded.pop("model_id", None)  # the miniature is wherever the package is installed
        options: PipelineOptions = self.options(**recorded)
        return options

    def status(self) -> str:
        """Ready, or what is missing and how to get it; loads no weights."""
        missing = _missing_packages()
        if missing:
            return f"needs {', '.join(missing)}: pip install 'hnkit[scaled]'"
        try:
            folder = find_model(self._resolved(self.options()).model_id)
        except InputError as error:
            return str(error)
        return f"ready: {folder}"

    def _resolved(self, options: PipelineOptions) -> PipelineOptions:
        if isinstance(options, DigitsOptions):
            return dataclasses.replace(options, model_id=str(options.folder()))
        return options


def _missing_packages() -> list[str]:
    return [name for name in ("diffusers", "peft", "transformers") if find_spec(name) is None]


SANA = PipelineFactory(
    name="sana",
    summary="SANA-Sprint 0.6B, 1024 px, d = 32,768",
    options=SanaOptions,
    presets={
        "default": _SANA,
        "preference": _SANA,
        "preference-direct": {**_SANA, "train.objective": "direct"},
        "redness": _REDNESS,
        "redness-direct": {**_REDNESS, "train.objective": "direct", "train.lr": 1e-4},
    },
    family=SanaFamily(),
)
SD_TURBO = PipelineFactory(
    name="sd-turbo",
    summary="SD-Turbo, 512 px, d = 16,384",
    options=SDTurboOptions,
    presets={"default": _SD_TURBO, "preference": _SD_TURBO},
    family=SDTurboFamily(),
)
FLUX = PipelineFactory(
    name="flux",
    summary="FLUX.1-schnell, 512 px, d = 65,536",
    options=FluxOptions,
    presets={"default": _FLUX, "preference": _FLUX},
    family=FluxFamily(),
)
DIGITS = PipelineFactory(
    name="digits",
    summary="a trained miniature SANA-Sprint on handwritten digits, 32 px, d = 256; bundled",
    options=DigitsOptions,
    presets={"default": _DIGITS},
    family=SanaFamily(),
    backend=DigitsBackend,
)
