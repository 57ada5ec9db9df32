"""The backends that hnkit finds by name.

They are the paper's `sana`, `sd-turbo` and `flux`; other distilled models, and `diffusers` for any pipeline; and
`digits`, a trained miniature that is bundled. Each is listed here once; `attach` knows a pipeline by its class. Presets
of the paper's models hold the columns of tables 3 and 4 of arXiv 2508.09968 and, for what the tables leave out, the
settings of its published code. `train.batch` counts the samples of one optimiser step: the paper's batch over all
processes times its accumulation.
"""

from __future__ import annotations

from typing import Any

from hnkit.errors import InputError
from hnkit.scaled.digits.backend import FACTORY as DIGITS
from hnkit.scaled.pipelines.factory import PipelineFactory
from hnkit.scaled.pipelines.families.distilled import DIFFUSERS, DISTILLED
from hnkit.scaled.pipelines.families.flux import FACTORY as FLUX
from hnkit.scaled.pipelines.families.sana import FACTORY as SANA
from hnkit.scaled.pipelines.families.sana import LARGE as SANA_LARGE
from hnkit.scaled.pipelines.families.sd_turbo import FACTORY as SD_TURBO

__all__ = [
    "BACKENDS",
    "DIFFUSERS",
    "DIGITS",
    "FLUX",
    "SANA",
    "SANA_LARGE",
    "SD_TURBO",
    "PipelineFactory",
    "factory_for",
]

BACKENDS: dict[str, PipelineFactory] = {
    factory.name: factory for factory in (SANA, SANA_LARGE, SD_TURBO, FLUX, *DISTILLED, DIGITS)
}
"""Every backend by its name; of several that share a pipeline class the first is asked."""


def factory_for(pipe: Any, trained_on: str | None = None) -> PipelineFactory:
    """The backend of a loaded diffusers pipeline, by its class.

    Args:
        pipe: the pipeline.
        trained_on: the class of the pipeline that an adapter was trained on, where it is known.

    Raises:
        InputError: it is no pipeline that encodes prompts.
    """
    found = type(pipe).__name__
    if not (hasattr(pipe, "encode_prompt") and hasattr(pipe, "components")):
        raise InputError(f"a {found} was given: noise hypernetworks are for text-to-image pipelines of diffusers")
    for factory in BACKENDS.values():
        if factory.family is not None and factory.family.pipeline_class == (trained_on or found):
            return factory
    return DIFFUSERS
