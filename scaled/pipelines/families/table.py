"""The families that are known by the class that `model_index.json` names, where something about one is special.

A class that is not here runs on the defaults of `Family`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hnkit.scaled.pipelines.families.family import Family


def _sana_call(options: Any, steps: int) -> Mapping[str, Any]:
    """A middle timestep is for two steps only; prompts come with the enhancement instruction or without."""
    from diffusers import SanaSprintPipeline

    middle = getattr(options, "intermediate_timestep", 1.3)
    default = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    return {
        "intermediate_timesteps": (middle or None) if steps == 2 else None,
        "complex_human_instruction": default if getattr(options, "instruction", False) else None,
    }


SANA_SPRINT = Family(
    pipeline_class="SanaSprintPipeline",
    guidance_scale=4.5,
    multiple=32,
    varying=_sana_call,
    text_arguments=("complex_human_instruction",),
    # The scheduler's pi / 2 is 1.5708, from which the pipeline makes 1.0000037; adapters are trained at 1 by the
    # published code, and a factor of 1000 in the network's embedding would make that a difference of 1e-3 in f.
    first_call={"timestep": 1.0},
    embeddings=("prompt_embeds", "prompt_attention_mask"),
    conditioning={"instruction": bool, "max_sequence_length": int},
    published={"instruction": False},
    last_layer="proj_out",
)
STABLE_DIFFUSION = Family(pipeline_class="StableDiffusionPipeline", last_layer="conv_out")
FLUX = Family(pipeline_class="FluxPipeline", conditioning={"max_sequence_length": int}, last_layer="proj_out")

_RECORDS = (
    SANA_SPRINT,
    STABLE_DIFFUSION,
    FLUX,
    Family(pipeline_class="StableDiffusionXLPipeline", last_layer="conv_out"),
    Family(pipeline_class="StableDiffusion3Pipeline", last_layer="proj_out"),
    Family(pipeline_class="Flux2KleinPipeline", last_layer="proj_out"),
    Family(pipeline_class="ZImagePipeline", last_layer="all_final_layer.2-1.linear"),
    Family(  # guidance is embedded, as it was distilled
        pipeline_class="LatentConsistencyModelPipeline", guidance_scale=8.5, last_layer="conv_out"
    ),
    Family(
        pipeline_class="PixArtAlphaPipeline",
        embeddings=("prompt_embeds", "prompt_attention_mask"),
        last_layer="proj_out",
    ),
    Family(pipeline_class="PixArtSigmaPipeline", embeddings=("prompt_embeds", "prompt_attention_mask")),
    # The mixture of experts runs under no_grad outside of training mode; in it, its sum has another order.
    Family(pipeline_class="HiDreamImagePipeline", training=("MOEFeedForwardSwiGLU",), own_size=True),
    Family(pipeline_class="HunyuanImagePipeline", guidance="distilled_guidance_scale", guidance_scale=3.25),
    # Its guidance_scale is for guidance-distilled networks, and the class says so at every call of another.
    Family(pipeline_class="QwenImagePipeline", guidance="true_cfg_scale", guidance_scale=1.0, last_layer="proj_out"),
    Family(pipeline_class="SanaPipeline", multiple=32, arguments={"complex_human_instruction": None}),
)
FAMILIES: dict[str, Family] = {family.pipeline_class: family for family in _RECORDS}


def family_of(pipeline_class: str) -> Family:
    """The record of a pipeline class, or one of defaults."""
    return FAMILIES.get(pipeline_class) or Family(pipeline_class=pipeline_class)
