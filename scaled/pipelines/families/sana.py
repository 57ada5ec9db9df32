"""SANA-Sprint: a linear-attention transformer, a deep-compression decoder, a consistency scheduler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.scaled.pipelines.factory import PREFERENCES, PUBLISHED, PipelineFactory, Preset, epochs
from hnkit.scaled.pipelines.families.family import Family
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


class SanaFamily(Family):
    """`SanaSprintPipeline`."""

    name: ClassVar[str] = "sana"
    pipeline_class: ClassVar[str] = "SanaSprintPipeline"
    network: ClassVar[str] = "transformer"
    last_layer: ClassVar[str] = "proj_out"
    multiple: ClassVar[int] = 32
    conditioning: ClassVar[Mapping[str, type]] = {"size": int, "instruction": bool, "max_sequence_length": int}
    published: ClassVar[Mapping[str, Any]] = {"instruction": False}

    def noise_shape(self, pipe: Any, size: int) -> tuple[int, ...]:
        """`(channels, side, side)`, 32 x 32 x 32 at 1024 px."""
        side = size // pipe.vae_scale_factor
        return pipe.transformer.config.in_channels, side, side

    def encode_arguments(self, options: SanaOptions) -> dict[str, Any]:
        """The instruction and the length of the prompt."""
        from diffusers import SanaSprintPipeline

        default = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
        return {
            "max_sequence_length": options.max_sequence_length,
            "complex_human_instruction": default if options.instruction else None,
        }

    def embeddings(self, encoded: tuple[Any, ...]) -> dict[str, Tensor]:
        """Token embeddings and their mask."""
        return {"prompt_embeds": encoded[0], "prompt_attention_mask": encoded[1]}

    def embedding_shapes(self, pipe: Any, options: SanaOptions) -> dict[str, tuple[int, ...]]:
        """Tokens of the encoder's width, and a mask of them."""
        tokens = options.max_sequence_length
        return {"prompt_embeds": (tokens, pipe.transformer.config.caption_channels), "prompt_attention_mask": (tokens,)}

    def delta(
        self, pipe: Any, network: nn.Module, noise: Tensor, tensors: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """The first step has SCM timestep 1, where the pipeline's input scaling is 1."""
        embeds = tensors["prompt_embeds"]
        scale = torch.full((len(noise),), guidance, device=noise.device).to(embeds.dtype)
        delta: Tensor = network(
            noise.to(embeds.dtype),
            encoder_hidden_states=embeds,
            encoder_attention_mask=tensors["prompt_attention_mask"],
            guidance=scale * pipe.transformer.config.guidance_embeds_scale,
            timestep=torch.ones(len(noise), device=noise.device),
            return_dict=False,
        )[0]
        return delta

    def plain_arguments(self, options: SanaOptions) -> dict[str, Any]:
        """What a plain call needs beside its defaults."""
        arguments = super().plain_arguments(options) | {
            "intermediate_timesteps": None,
            "use_resolution_binning": False,
            "max_sequence_length": options.max_sequence_length,
        }
        return arguments if options.instruction else arguments | {"complex_human_instruction": None}

    def attached_arguments(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """No instruction, for an f that was trained without; the prompt length that it was trained at."""
        arguments = super().attached_arguments(conditioning)
        return arguments if conditioning.get("instruction", True) else arguments | {"complex_human_instruction": None}

    def call_arguments(self, options: SanaOptions, tensors: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        """A middle timestep is for two steps only, and resolution binning for a sample size of 32."""
        arguments: dict[str, Any] = {
            "prompt_embeds": tensors["prompt_embeds"],
            "prompt_attention_mask": tensors["prompt_attention_mask"],
            "guidance_scale": options.guidance,
            "use_resolution_binning": False,
            "intermediate_timesteps": (options.intermediate_timestep or None) if steps == 2 else None,
        }
        return arguments


# The scripts of the published code (ExplainableML/HyperNoise at bbe3ab4, scripts/*.sh and training/optim.py) give SGD a
# momentum of 0.9 without Nesterov, and count the warm-up in 100 steps times the number of processes: 6, or 1.
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
    family=SanaFamily(),
)
