"""FLUX.1-schnell: a rectified-flow transformer over 2 x 2 patches of the latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hnkit.scaled.pipelines.factory import PREFERENCES, PUBLISHED, PipelineFactory, Preset, epochs
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.options import PipelineOptions


@dataclass(frozen=True, kw_only=True)
class FluxOptions(PipelineOptions):
    """Options of the backend `flux`; the defaults are the paper's (arXiv 2508.09968, table 4)."""

    model_id: str = "black-forest-labs/FLUX.1-schnell"
    size: int = 512
    lora_alpha: float = 640.0
    max_sequence_length: int = 512
    hypernetwork_checkpointing: bool = True


class FluxFamily(Family):
    """`FluxPipeline`; the noise is kept unpacked, `(channels, side, side)`."""

    name: ClassVar[str] = "flux"
    pipeline_class: ClassVar[str] = "FluxPipeline"
    network: ClassVar[str] = "transformer"
    last_layer: ClassVar[str] = "proj_out"
    multiple: ClassVar[int] = 16
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    conditioning: ClassVar[Mapping[str, type]] = {"size": int, "max_sequence_length": int}

    def noise_shape(self, pipe: Any, size: int) -> tuple[int, ...]:
        """`(channels, side, side)`, 16 x 64 x 64 at 512 px."""
        side = 2 * (size // (2 * pipe.vae_scale_factor))
        return pipe.transformer.config.in_channels // 4, side, side

    def encode_arguments(self, options: PipelineOptions) -> dict[str, Any]:
        """The second prompt is the first."""
        return {"prompt_2": None, "max_sequence_length": options.max_sequence_length}

    def embeddings(self, encoded: tuple[Any, ...]) -> dict[str, Tensor]:
        """Token and pooled embeddings; the text's positions are all zero and are made anew."""
        return {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[1]}

    def embedding_shapes(self, pipe: Any, options: PipelineOptions) -> dict[str, tuple[int, ...]]:
        """T5's tokens and CLIP's pooled embedding."""
        config = pipe.transformer.config
        return {
            "prompt_embeds": (options.max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def delta(
        self, pipe: Any, network: nn.Module, noise: Tensor, tensors: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """The first step has flow time 1."""
        embeds = tensors["prompt_embeds"]
        count, channels, height, width = noise.shape
        factor = pipe.vae_scale_factor
        latents, positions = pipe.prepare_latents(
            count, channels, height * factor, width * factor, embeds.dtype, noise.device, None, self.pack(pipe, noise)
        )
        embedded = pipe.transformer.config.guidance_embeds
        delta: Tensor = network(
            hidden_states=latents,
            timestep=torch.ones(count, device=noise.device, dtype=embeds.dtype),
            guidance=torch.full((count,), guidance, device=noise.device) if embedded else None,
            pooled_projections=tensors["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=noise.device, dtype=embeds.dtype),
            img_ids=positions,
            return_dict=False,
        )[0]
        return self.unpack(pipe, delta, height * factor, width * factor)

    def plain_arguments(self, options: PipelineOptions) -> dict[str, Any]:
        """What a plain call needs beside its defaults."""
        return super().plain_arguments(options) | {"max_sequence_length": options.max_sequence_length}

    def call_arguments(self, options: PipelineOptions, tensors: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        """Both embeddings."""
        return {
            "prompt_embeds": tensors["prompt_embeds"],
            "pooled_prompt_embeds": tensors["pooled_prompt_embeds"],
            "guidance_scale": options.guidance,
        }

    def pack(self, pipe: Any, noise: Tensor) -> Tensor:
        """`(n, c, h, w)` to `(n, h w / 4, 4 c)`: one token per 2 x 2 patch."""
        packed: Tensor = pipe._pack_latents(noise, *noise.shape)
        return packed

    def unpack(self, pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `pack`, for an image of `height` x `width` pixels."""
        noise: Tensor = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        return noise


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
    family=FluxFamily(),
)
