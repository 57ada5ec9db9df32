"""SD-Turbo: a UNet of the Stable Diffusion 2.1 family, one Euler step, no classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hnkit.scaled.pipelines.factory import PREFERENCES, PUBLISHED, PipelineFactory, Preset, epochs
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.options import PipelineOptions


@dataclass(frozen=True, kw_only=True)
class SDTurboOptions(PipelineOptions):
    """Options of the backend `sd-turbo`; the defaults are the paper's (arXiv 2508.09968, table 4)."""

    model_id: str = "stabilityai/sd-turbo"
    size: int = 512
    rank: int = 256


class SDTurboFamily(Family):
    """`StableDiffusionPipeline` with a distilled UNet."""

    name: ClassVar[str] = "sd-turbo"
    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    network: ClassVar[str] = "unet"
    last_layer: ClassVar[str] = "conv_out"
    load_arguments: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}

    def noise_shape(self, pipe: Any, size: int) -> tuple[int, ...]:
        """`(channels, side, side)`, 4 x 64 x 64 at 512 px."""
        side = size // pipe.vae_scale_factor
        return pipe.unet.config.in_channels, side, side

    def encode_arguments(self, options: PipelineOptions) -> dict[str, Any]:
        """No negative prompt: SD-Turbo is sampled without classifier-free guidance."""
        return {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}

    def embeddings(self, encoded: tuple[Any, ...]) -> dict[str, Tensor]:
        """Token embeddings of the prompt itself."""
        return {"prompt_embeds": encoded[0]}

    def embedding_shapes(self, pipe: Any, options: PipelineOptions) -> dict[str, tuple[int, ...]]:
        """CLIP's 77 tokens, of the width that the network attends to."""
        return {"prompt_embeds": (77, pipe.unet.config.cross_attention_dim)}

    def delta(
        self, pipe: Any, network: nn.Module, noise: Tensor, tensors: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """The first step is the last training timestep; its input, scaled to unit variance, is the noise itself."""
        embeds = tensors["prompt_embeds"]
        first = pipe.scheduler.config.num_train_timesteps - 1
        delta: Tensor = network(noise.to(embeds.dtype), first, encoder_hidden_states=embeds, return_dict=False)[0]
        return delta

    def call_arguments(self, options: PipelineOptions, tensors: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        """The prompt's embeddings."""
        return {"prompt_embeds": tensors["prompt_embeds"], "guidance_scale": options.guidance}

    def pack(self, pipe: Any, noise: Tensor) -> Tensor:
        """This pipeline does not convert the latents' type itself."""
        return noise.to(pipe.unet.dtype)

    def prepared_scale(self, pipe: Any) -> float:
        """Euler samplers start from noise of the largest sigma."""
        return float(pipe.scheduler.init_noise_sigma)


# AdamW's weight decay is the published code's (ExplainableML/HyperNoise at bbe3ab4, training/optim.py line 11). It has
# no script for this model: the warm-up is that of one process.
_PREFERENCE: Preset = {
    **PUBLISHED,
    **PREFERENCES,
    "train.optimizer": "adamw",
    "train.weight_decay": 1e-4,
    "train.lr": 1e-5,
    "train.clip": 1000.0,
    "train.batch": 18,
    "train.accumulate": 1,
    "train.steps": epochs(18),
    "train.warmup": 100,
    "backend.rank": 256,
    "backend.lora_alpha": 256.0,
    "backend.size": 512,
}

FACTORY = PipelineFactory(
    name="sd-turbo",
    summary="SD-Turbo, 512 px, d = 16,384",
    options=SDTurboOptions,
    presets={"default": _PREFERENCE, "preference": _PREFERENCE},
    family=SDTurboFamily(),
)
