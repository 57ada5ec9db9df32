"""A pipeline backend that is known before it is loaded: its options, its presets, and what it still needs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hnkit.errors import InputError
from hnkit.scaled.lora.adapter import adapter_options
from hnkit.scaled.pipelines.backend import PipelineBackend
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.loading import find_model, load_pipeline
from hnkit.scaled.pipelines.memory import SAVERS
from hnkit.scaled.pipelines.options import RECORDED, PipelineOptions
from hnkit.training.plan.skeleton import Objective, Skeleton

Preset = Mapping[str, Any]
"""Named overrides of a run's configuration: keys `train.*`, `backend.*`, `rewards.*`, `heldout.*`."""

PREFERENCES: Preset = {
    "rewards.hpsv2": 5.0,
    "rewards.imagereward": 1.0,
    "rewards.pickscore": 0.05,
    "rewards.clipscore": 0.01,
}
"""The paper's ensemble of four rewards (arXiv 2508.09968, section 5)."""

PUBLISHED: Preset = {"train.reduction": "mean", "train.alpha": 1.0}
"""What all runs of the published code share: an L2 term that is a mean over the noise dimensions."""


def epochs(batch: int) -> int:
    """Optimiser steps of the paper's 25 epochs over its 70,000 training prompts."""
    return 25 * 70_000 // batch


@dataclass(frozen=True)
class PipelineFactory:
    """A backend that is known without being loaded; implements `hnkit.backend.BackendFactory`."""

    name: str
    summary: str
    options: type[Any]
    presets: Mapping[str, Preset]
    family: Family | None = None
    """The record of the class that models have to be of; `None`: any class, by the folder of the model."""
    backend: type[PipelineBackend] = PipelineBackend

    def load(self, options: Any = None) -> PipelineBackend:
        """Load pipeline and twin.

        Raises:
            InputError: a package or the model is missing, damaged or of another class; the device cannot be used.
        """
        self._require_packages()
        chosen = self._with_a_model(self.options() if options is None else options)
        pipe, family, chosen = load_pipeline(self.name, self.family, chosen)
        return self.backend(family, chosen, pipe, name=self.name)

    @property
    def savers(self) -> Mapping[str, str]:
        """Options that save memory, with the part of a step that each one changes."""
        return SAVERS

    def skeleton(self, options: Any, objective: Objective = "hypernoise") -> Skeleton:
        """The backend without weights, to count a step on; see `hnkit.training.plan`.

        Raises:
            InputError: a package is missing, no model is named, or its configuration is not known here.
        """
        self._require_packages()
        from hnkit.scaled.pipelines.skeleton import make_skeleton

        build = functools.partial(self.backend, name=self.name)
        return make_skeleton(self.name, self.family, self._with_a_model(options), build, objective)

    def adapter_options(self, folder: str | Path) -> PipelineOptions:
        """The default options, at what the adapter in `folder` records: rank, alpha, base model and conditioning."""
        options: PipelineOptions = self.options(**self.recorded(folder))
        return options

    def recorded(self, folder: str | Path) -> dict[str, Any]:
        """The options of this backend that the adapter in `folder` fixes, by name."""
        family = self.family or Family(pipeline_class="")
        recorded = adapter_options(folder, {"size": int, **RECORDED, **family.conditioning}, family.published)
        return {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}

    def located(self, options: PipelineOptions) -> PipelineOptions:
        """The options with the model named that they leave to the backend; here they are taken as they are."""
        return options

    def _with_a_model(self, options: PipelineOptions) -> PipelineOptions:
        chosen = self.located(options)
        if not chosen.model_id:
            raise InputError(
                f"backend {self.name!r}: name a model's folder or hub name by --model-id or --set backend.model_id="
            )
        return chosen

    def status(self) -> str:
        """Ready, or what is missing and how to get it; loads no weights."""
        missing = _missing_packages()
        if missing:
            return f"needs {', '.join(missing)}: pip install 'hnkit[scaled]'"
        options = self.located(self.options())
        if not options.model_id:
            return "ready for a model: name its folder or hub name with --set backend.model_id=MODEL"
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = find_model(options.model_id)
        except InputError as error:
            absent = isinstance(error.__cause__, LocalEntryNotFoundError)
            return f"not in the local cache: hf download {options.model_id}" if absent else str(error)
        return f"ready: {folder}"

    def _require_packages(self) -> None:
        missing = _missing_packages()
        if missing:
            raise InputError(f"backend {self.name!r} needs {', '.join(missing)}: pip install 'hnkit[scaled]' adds it")


def _missing_packages() -> list[str]:
    return [name for name in ("diffusers", "peft", "transformers") if find_spec(name) is None]
