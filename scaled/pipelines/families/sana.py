"""SANA-Sprint: a linear-attention transformer, a deep-compression decoder, a consistency scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.options import PipelineOptions


@dataclass(frozen=True, kw_only=True)
class SanaOptions(PipelineOptions):
    """Options of the backend `sana`; the defaults are the paper's (arXiv 2508.09968, table 4)."""

    model_id: str = "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers"
    size: int = 1024
    guidance: float = 4.5
    max_sequence_length: int = 300
    instruction: bool = True
    """Put the pipeline's own enhancement instruction before each prompt, as a plain call of it does. The paper's
    published adapter was trained without."""


class SanaFamily(Family):
    """`SanaSprintPipeline`."""

    name: ClassVar[str] = "sana"
    pipeline_class: ClassVar[str] = "SanaSprintPipeline"
    network: ClassVar[str] = "transformer"
    last_layer: ClassVar[str] = "proj_out"
    multiple: ClassVar[int] = 32

    def noise_shape(self, pipe: Any, size: int) -> tuple[int, ...]:
        """`(channels, side, side)`, 32 x 32 x 32 at 1024 px."""
        side = size // pipe.vae_scale_factor
        return pipe.transformer.config.in_channels, side, side

    def encode_arguments(self, options: SanaOptions) -> dict[str, Any]:
        """The instruction and the length of the prompt."""
        import inspect

        from diffusers import SanaSprintPipeline

        default = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
        return {
            "max_sequence_length": options.max_sequence_length,
            "complex_human_instruction": default if options.instruction else None,
        }

    def embeddings(self, encoded: tuple[Any, ...]) -> dict[str, Tensor]:
        """Token embeddings and their mask."""
        return {"prompt_embeds": encoded[0], "prompt_attention_mask": encoded[1]}

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

    def call_arguments(self, options: SanaOptions, tensors: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        """The pipeline's own middle timestep is for two steps only, and resolution binning for a sample size of 32."""
        arguments: dict[str, Any] = {
            "prompt_embeds": tensors["prompt_embeds"],
            "prompt_attention_mask": tensors["prompt_attention_mask"],
            "guidance_scale": options.guidance,
            "use_resolution_binning": False,
        }
        return arguments if steps == 2 else arguments | {"intermediate_timesteps": None}
