"""Configurations of published models, so that a plan needs no download: sizes alone, and where each can be read.

The files themselves lie on the hub and could not be opened where this was written; what stands here was read in public
repositories that quote them, and each network's number of parameters is checked against the published one in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class PublishedModel:
    """What is known of a published pipeline without its files.

    Attributes:
        pipeline: its class in diffusers.
        components: component -> its configuration; what is left out is the default of the class.
        network: the component that f is a twin of.
        parameters: that network's published number of parameters.
        encoders: the published number of parameters of all its text encoders.
        source: where the values of the network stand; those of the text encoders are their classes' defaults in
            transformers, or stand in the configurations that public repositories quote.
    """

    pipeline: str
    components: Mapping[str, Config]
    network: str
    parameters: float
    encoders: float
    source: str


def _kl(channels: int, scaling: float, shift: float | None = None) -> dict[str, Any]:
    """Stable Diffusion's autoencoder; those of 16 channels have no convolutions between encoder and decoder."""
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": channels,
        "layers_per_block": 2,
        "sample_size": 1024,
        "scaling_factor": scaling,
    }
    return (
        config
        if shift is None
        else config | {"shift_factor": shift, "use_quant_conv": False, "use_post_quant_conv": False}
    )


_DC_AE: Config = {
    "_class_name": "AutoencoderDC",
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_act_fns": "silu",
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}

_SANA: Config = {
    "_class_name": "SanaTransformer2DModel",
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
    "guidance_embeds": True,
    "guidance_embeds_scale": 0.1,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 1000.0,
}

_UNET_21: Config = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "use_linear_projection": True,
}

_UNET_XL: Config = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}

_SD_35_LARGE: Config = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}

_Z_IMAGE: Config = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}

_KLEIN_4B: Config = {
    "_class_name": "Flux2Transformer2DModel",
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}

_FLUX: Config = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}

_QWEN: Config = {
    "_class_name": "QwenImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}

_SANA_LARGE: Config = {
    **_SANA,
    "num_attention_heads": 70,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
}

_UNET_LCM: Config = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "time_cond_proj_dim": 256,
}

_PIXART: Config = {
    "_class_name": "PixArtTransformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": True,
}


def _clip_text(width: int, layers: int, heads: int, *, projected: bool = False) -> Config:
    """The text half of a CLIP; its projection is as wide as itself."""
    return {
        "_class_name": "CLIPTextModelWithProjection" if projected else "CLIPTextModel",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    }


_CLIP_L, _CLIP_L_PROJECTED = _clip_text(768, 12, 12), _clip_text(768, 12, 12, projected=True)
_CLIP_H = _clip_text(1024, 23, 16)  # without the last layer of OpenCLIP's ViT-H
_CLIP_G = _clip_text(1280, 32, 20, projected=True)
_T5_XXL: Config = {
    "_class_name": "T5EncoderModel",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_GEMMA_2B: Config = {
    "_class_name": "Gemma2Model",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
_QWEN3_4B: Config = {
    "_class_name": "Qwen3Model",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
_QWEN_VL_7B: Config = {
    "_class_name": "Qwen2_5_VLForConditionalGeneration",
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}

_EULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
_SCM: Config = {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": 0.5}


def _flow(shift: float, *, dynamic: bool = False) -> Config:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift, "use_dynamic_shifting": dynamic}


_LCM: Config = {**_EULER, "_class_name": "LCMScheduler"}
_XL: Mapping[str, Config] = {
    "unet": _UNET_XL, "vae": _kl(4, 0.13025), "scheduler": _EULER, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G,
}  # fmt: skip

_SDXL = PublishedModel(
    "StableDiffusionXLPipeline",
    _XL,
    "unet",
    2.567e9,
    0.818e9,
    "unet/config.json of Stable Diffusion XL, as quoted in public repositories",
)

PUBLISHED_MODELS: dict[str, PublishedModel] = {
    "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers": PublishedModel(
        "SanaSprintPipeline",
        {"transformer": _SANA, "vae": _DC_AE, "scheduler": _SCM, "text_encoder": _GEMMA_2B},
        "transformer",
        0.594e9,
        2.614e9,
        "arXiv 2503.09641; diffusers scripts/convert_sana_to_diffusers.py",
    ),
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": PublishedModel(
        "SanaSprintPipeline",
        {"transformer": _SANA_LARGE, "vae": _DC_AE, "scheduler": _SCM, "text_encoder": _GEMMA_2B},
        "transformer",
        1.604e9,
        2.614e9,
        "arXiv 2503.09641; diffusers scripts/convert_sana_to_diffusers.py; the defaults of its class in diffusers",
    ),
    "stabilityai/sd-turbo": PublishedModel(
        "StableDiffusionPipeline",
        {"unet": _UNET_21, "vae": _kl(4, 0.18215), "scheduler": _EULER, "text_encoder": _CLIP_H},
        "unet",
        0.866e9,
        0.340e9,
        "unet/config.json of Stable Diffusion 2.1, which it is distilled from",
    ),
    "SimianLuo/LCM_Dreamshaper_v7": PublishedModel(
        "LatentConsistencyModelPipeline",
        {"unet": _UNET_LCM, "vae": _kl(4, 0.18215), "scheduler": _LCM, "text_encoder": _CLIP_L},
        "unet",
        0.860e9,
        0.123e9,
        "unet/config.json of Stable Diffusion 1.5, which it is distilled from, with an embedding of the guidance",
    ),
    "stabilityai/sdxl-turbo": _SDXL,
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "PixArt-alpha/PixArt-LCM-XL-2-1024-MS": PublishedModel(
        "PixArtAlphaPipeline",
        {"transformer": _PIXART, "vae": _kl(4, 0.13025), "scheduler": _LCM, "text_encoder": _T5_XXL},
        "transformer",
        0.611e9,
        4.762e9,
        "arXiv 2310.00426; diffusers scripts/convert_pixart_alpha_to_diffusers.py",
    ),
    "stabilityai/stable-diffusion-3.5-large-turbo": PublishedModel(
        "StableDiffusion3Pipeline",
        {
            "transformer": _SD_35_LARGE,
            "vae": _kl(16, 1.5305, 0.0609),
            "scheduler": _flow(3.0),
            "text_encoder": _CLIP_L_PROJECTED,
            "text_encoder_2": _CLIP_G,
            "text_encoder_3": _T5_XXL,
        },
        "transformer",
        8.06e9,
        5.581e9,
        "transformer/config.json, as quoted in public repositories",
    ),
    "Tongyi-MAI/Z-Image-Turbo": PublishedModel(
        "ZImagePipeline",
        {
            "transformer": _Z_IMAGE,
            "vae": _kl(16, 0.3611, 0.1159),
            "scheduler": _flow(3.0),
            "text_encoder": _QWEN3_4B,
        },
        "transformer",
        6.15e9,
        4.022e9,
        "transformer/config.json, as quoted in public repositories; the defaults of its class in diffusers",
    ),
    "black-forest-labs/FLUX.2-klein-4B": PublishedModel(
        "Flux2KleinPipeline",
        {
            "transformer": _KLEIN_4B,
            "vae": {"_class_name": "AutoencoderKLFlux2"},
            "scheduler": _flow(3.0, dynamic=True),
            "text_encoder": {**_QWEN3_4B, "_class_name": "Qwen3ForCausalLM"},
        },
        "transformer",
        3.88e9,
        4.022e9,
        "diffusers scripts/convert_flux2_to_diffusers.py, klein-4b",
    ),
    "black-forest-labs/FLUX.1-schnell": PublishedModel(
        "FluxPipeline",
        {
            "transformer": _FLUX,
            "vae": _kl(16, 0.3611, 0.1159),
            "scheduler": _flow(1.0),
            "text_encoder": _CLIP_L,
            "text_encoder_2": _T5_XXL,
        },
        "transformer",
        11.89e9,
        4.885e9,
        "transformer/config.json, as quoted in public repositories; the defaults of its class in diffusers",
    ),
    "Qwen/Qwen-Image": PublishedModel(
        "QwenImagePipeline",
        {
            "transformer": _QWEN,
            "vae": {"_class_name": "AutoencoderKLQwenImage"},
            "scheduler": _flow(1.0, dynamic=True),
            "text_encoder": _QWEN_VL_7B,
        },
        "transformer",
        20.43e9,
        8.292e9,
        "transformer/config.json, as quoted in public repositories; the defaults of its class in diffusers",
    ),
}
"""By hub name. Schedulers matter to a plan by their class alone: their numbers change no size."""
