"""The backends that hnkit finds by name: `sana`, `sd-turbo`, `flux`, and `digits`, a trained miniature that is bundled.

Each is described in one file, its `FACTORY`, and listed here once; `attach` knows a pipeline by the class that its
family names. Presets hold the columns of tables 3 and 4 of arXiv 2508.09968 and, for what the tables leave out, the
settings of its published code. `train.batch` counts the samples of one optimiser step: the paper's batch over all
processes times its accumulation.
"""

from __future__ import annotations

from typing import Any

from hnkit.errors import InputError
from hnkit.scaled.digits.backend import FACTORY as DIGITS
from hnkit.scaled.pipelines.factory import PipelineFactory
from hnkit.scaled.pipelines.families.flux import FACTORY as FLUX
from hnkit.scaled.pipelines.families.sana import FACTORY as SANA
from hnkit.scaled.pipelines.families.sd_turbo import FACTORY as SD_TURBO

__all__ = ["BACKENDS", "DIGITS", "FLUX", "SANA", "SD_TURBO", "PipelineFactory", "factory_for"]

BACKENDS: dict[str, PipelineFactory] = {factory.name: factory for factory in (SANA, SD_TURBO, FLUX, DIGITS)}
"""Every backend by its name; of two that share a pipeline class (`digits` is a small `sana`) the first is asked."""


def factory_for(pipe: Any) -> PipelineFactory:
    """The backend of a loaded diffusers pipeline, by its class.

    Raises:
        InputError: no backend is for that class; the message names those that there are.
    """
    found = type(pipe).__name__
    for factory in BACKENDS.values():
        if factory.family.pipeline_class == found:
            return factory
    known = ", ".join(dict.fromkeys(factory.family.pipeline_class for factory in BACKENDS.values()))
    raise InputError(f"a {found} was given: noise hypernetworks exist for {known}")
