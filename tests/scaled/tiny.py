"""Tiny random-weight checkpoints of the real pipeline classes, written in the real format.

`build("sana", folder)` writes what `SanaSprintPipeline.from_pretrained(folder)` reads: real transformer, autoencoder,
text encoder, tokenizer and scheduler classes, a few thousand weights each, seeded. Nothing is downloaded.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers

CHARACTERS = string.ascii_letters + string.digits + string.punctuation
PROMPTS = ["a red fox", "two blue cats", "a photo of a parrot", "an old train, at dawn"]


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *CHARACTERS]
    return transformers.GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def clip_tokenizer(length: int = 77) -> transformers.CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS.lower(), *(c + "</w>" for c in CHARACTERS.lower())]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def t5_tokenizer() -> transformers.T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def clip_text_encoder(hidden: int, tokenizer: transformers.CLIPTokenizer) -> transformers.CLIPTextModel:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return transformers.CLIPTextModel(config)


def kl_autoencoder(channels: int, scaling: float, shift: float | None) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def sana() -> diffusers.SanaSprintPipeline:
    """d = 4 x 4 x 4 = 64: two transformer blocks of width 16, with SANA's depthwise convolutions and ReLU attention."""
    tokenizer = gemma_tokenizer()
    encoder = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=32,
        patch_size=1,
        guidance_embeds=True,
        guidance_embeds_scale=0.1,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1000.0,
    )
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8, 16),
        decoder_block_out_channels=(8, 8, 8, 16),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        decoder_act_fns="silu",
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )
    return diffusers.SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model(encoder),
        vae=autoencoder,
        transformer=transformer,
        scheduler=diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    )


def sd_turbo() -> diffusers.StableDiffusionPipeline:
    """d = 4 x 8 x 8 = 256: a UNet with cross-attention and group norms, SD-Turbo's trailing Euler scheduler."""
    tokenizer = clip_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="epsilon",
        steps_offset=1,
    )
    return diffusers.StableDiffusionPipeline(
        vae=kl_autoencoder(4, 0.18215, None),
        text_encoder=clip_text_encoder(16, tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux() -> diffusers.FluxPipeline:
    """d = 4 x 8 x 8 = 256: one double and one single block of width 16, packed 2 x 2 latents."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    encoder = transformers.T5Config(
        vocab_size=len(t5), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=kl_autoencoder(4, 0.3611, 0.1159),
        text_encoder=clip_text_encoder(16, clip),
        tokenizer=clip,
        text_encoder_2=transformers.T5EncoderModel(encoder),
        tokenizer_2=t5,
        transformer=transformer,
    )


PIPELINES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {"sana": sana, "sd-turbo": sd_turbo, "flux": flux}
SIZES = {"sana": 32, "sd-turbo": 16, "flux": 16}
"""Image side in pixels at which each tiny checkpoint is used."""


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the tiny checkpoint of one pipeline to `folder` and return it."""
    return write(PIPELINES[name], folder, seed)


def write(builder: Callable[[], diffusers.DiffusionPipeline], folder: Path, seed: int = 0) -> Path:
    """Write the pipeline that `builder` makes, with seeded weights, to `folder` and return it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = builder()
        # Norms at their initial ones and zeros would leave mistakes about them invisible; biases likewise.
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                for parameter in component.parameters():
                    parameter.data.nan_to_num_(0.0, 0.0, 0.0)  # some are initialised by `torch.empty`
                    if parameter.ndim == 1:
                        parameter.data.add_(0.1 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def options(name: str, folder: Path, **changes: object) -> dict[str, object]:
    """Backend options for a tiny checkpoint: float32 on the CPU, rank 4."""
    small = {"size": SIZES[name], "dtype": "float32", "device": "cpu", "rank": 4, "lora_alpha": 8.0, "cache_dir": ""}
    small |= {"self_check": False}  # tests of one thing; the check has tests of its own
    return {"model_id": str(folder)} | small | changes


def text(value: object) -> object:
    """The value of an option as it is typed after `--set`."""
    return str(value).lower() if isinstance(value, bool) else value
