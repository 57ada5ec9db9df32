"""Tiny random-weight checkpoints of the real pipeline classes of many families, seeded; nothing is downloaded.

Each builder returns a pipeline of the class that it is named after; `BUILDERS` lists them with the image side at which
each is used. Configurations follow those of diffusers' own tests, smaller still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers

from tests.scaled import tiny

_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def flow(**settings: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def small_kl(channels: int = 4, levels: int = 2, **settings: Any) -> diffusers.AutoencoderKL:
    """One pixel of the latent is `2^(levels - 1)` of the image."""
    config = dict(tiny.kl_autoencoder(channels, **{"scaling": 0.3611, "shift": 0.1159, **settings}).config)
    config |= {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return diffusers.AutoencoderKL.from_config(config)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """Byte level, one token a byte, with a chat template."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = [byte for byte in range(256) if byte not in letters]
    characters = [chr(byte) for byte in letters] + [chr(256 + i) for i in range(len(spare))]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*characters, *specials])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=specials[1:])
    tokenizer.chat_template = _TURNS
    return tokenizer


def qwen3(hidden: int = 16, layers: int = 2, cls: Any = transformers.Qwen3Model) -> Any:
    return cls(
        transformers.Qwen3Config(
            vocab_size=len(qwen_tokenizer()),
            hidden_size=hidden,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
        )
    )


def qwen2_vl(hidden: int = 16) -> transformers.Qwen2_5_VLForConditionalGeneration:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(qwen_tokenizer()),
            "hidden_size": hidden,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": hidden,
        },
        vision_end_token_id=2,
        vision_start_token_id=3,
        vision_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def t5(tokenizer: Any, hidden: int = 16, cls: Any = transformers.T5EncoderModel, config: Any = None) -> Any:
    config = config or transformers.T5Config
    return cls(
        config(
            vocab_size=len(tokenizer), d_model=hidden, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def gemma2(tokenizer: Any, hidden: int = 16, layers: int = 1) -> transformers.Gemma2Model:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=32, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        )
    )  # fmt: skip


def clip(hidden: int, tokenizer: Any, projected: bool = True) -> Any:
    config = tiny.clip_text_encoder(hidden, tokenizer).config
    config.projection_dim, config.num_hidden_layers = hidden, 2
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def unet(**settings: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **settings,
        }
    )


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    first, second = tiny.clip_tokenizer(), tiny.clip_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=small_kl(scaling=0.13025, shift=None),
        text_encoder=clip(16, first, projected=False),
        text_encoder_2=clip(16, second),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet(
            cross_attention_dim=32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        ),
        add_watermarker=False,
    )  # fmt: skip


def lcm() -> diffusers.LatentConsistencyModelPipeline:
    tokenizer = tiny.clip_tokenizer()
    return diffusers.LatentConsistencyModelPipeline(
        vae=small_kl(scaling=0.18215, shift=None),
        text_encoder=clip(16, tokenizer, projected=False),
        tokenizer=tokenizer,
        unet=unet(time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3() -> diffusers.StableDiffusion3Pipeline:
    first, second, third = tiny.clip_tokenizer(), tiny.clip_tokenizer(), tiny.t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=flow(shift=3.0),
        vae=small_kl(scaling=1.5305, shift=0.0609),
        text_encoder=clip(16, first),
        tokenizer=first,
        text_encoder_2=clip(16, second),
        tokenizer_2=second,
        text_encoder_3=t5(third, 32),
        tokenizer_3=third,
    )


def flux2_klein() -> diffusers.Flux2KleinPipeline:
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            layers_per_block=1,
            latent_channels=2,
            norm_num_groups=1,
            sample_size=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=qwen3(8, 28, transformers.Qwen3ForCausalLM),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=True,
    )


def z_image() -> diffusers.ZImagePipeline:
    return diffusers.ZImagePipeline(
        scheduler=flow(shift=3.0),
        vae=small_kl(),
        text_encoder=qwen3(16),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[1024, 32, 32],
        ),
    )


def qwen_image() -> diffusers.QwenImagePipeline:
    return diffusers.QwenImagePipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[1.5, 1.0, 2.0, 1.2],
        ),
        text_encoder=qwen2_vl(),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
    )


def _pixart() -> dict[str, Any]:
    tokenizer = tiny.t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5(tokenizer),
        "vae": small_kl(scaling=0.18215, shift=None),
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=16,
            caption_channels=16,
        ),
        "scheduler": diffusers.LCMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    }


def pixart() -> diffusers.PixArtAlphaPipeline:
    return diffusers.PixArtAlphaPipeline(**_pixart())


def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    return diffusers.PixArtSigmaPipeline(**_pixart())


def sana_flow() -> diffusers.SanaPipeline:
    sprint = tiny.sana()
    config = dict(sprint.transformer.config) | {"guidance_embeds": False, "qk_norm": None}
    return diffusers.SanaPipeline(
        tokenizer=sprint.tokenizer,
        text_encoder=sprint.text_encoder,
        vae=sprint.vae,
        transformer=diffusers.SanaTransformer2DModel.from_config(config),
        scheduler=flow(shift=3.0),
    )


def chroma() -> diffusers.ChromaPipeline:
    tokenizer = tiny.t5_tokenizer()
    return diffusers.ChromaPipeline(
        scheduler=flow(),
        vae=small_kl(),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
    )


def hidream() -> diffusers.HiDreamImagePipeline:
    clips, third, fourth = [tiny.clip_tokenizer(128), tiny.clip_tokenizer(128)], tiny.t5_tokenizer(), qwen_tokenizer()
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(fourth), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    return diffusers.HiDreamImagePipeline(
        scheduler=flow(),
        vae=small_kl(levels=1),
        text_encoder=clip(16, clips[0]),
        tokenizer=clips[0],
        text_encoder_2=clip(16, clips[1]),
        tokenizer_2=clips[1],
        text_encoder_3=t5(third, 32),
        tokenizer_3=third,
        text_encoder_4=llama,
        tokenizer_4=fourth,
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[32, 16],
            text_emb_dim=32,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
    )


def aura_flow() -> diffusers.AuraFlowPipeline:
    tokenizer = tiny.t5_tokenizer()
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, cls=transformers.UMT5EncoderModel, config=transformers.UMT5Config),
        vae=small_kl(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=256,
        ),
        scheduler=flow(),
    )


def lumina2() -> diffusers.Lumina2Pipeline:
    tokenizer = tiny.gemma_tokenizer()
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            scaling_factor=1.0,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(600, 64, 64),
            cap_feat_dim=16,
        ),
        scheduler=flow(),
        vae=small_kl(levels=4),  # the class takes a factor of 8 for granted
        text_encoder=gemma2(tokenizer, layers=2),
        tokenizer=tokenizer,
    )


def hunyuan_dit() -> diffusers.HunyuanDiTPipeline:
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny.CHARACTERS])}
    words |= {f"##{letter}": len(words) + i for i, letter in enumerate(tiny.CHARACTERS)}
    bert, second = transformers.BertTokenizer(vocab=words), tiny.t5_tokenizer()
    return diffusers.HunyuanDiTPipeline(
        vae=small_kl(scaling=0.13025, shift=None),
        text_encoder=transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(bert), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            )
        ),
        tokenizer=bert,
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            hidden_size=16,
            activation_fn="gelu-approximate",
        ),
        scheduler=diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(second),
        tokenizer_2=second,
    )  # fmt: skip


def hunyuan_image() -> diffusers.HunyuanImagePipeline:
    second = transformers.ByT5Tokenizer()
    return diffusers.HunyuanImagePipeline(
        scheduler=flow(shift=4.0),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=16,
            scaling_factor=0.75,
        ),
        text_encoder=qwen2_vl(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=t5(second),
        tokenizer_2=second,
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            guidance_embeds=True,
            text_embed_dim=16,
            text_embed_2_dim=16,
            rope_axes_dim=(4, 4),
            use_meanflow=True,
        ),
        guider=None,
        ocr_guider=None,
    )


def cogview4() -> diffusers.CogView4Pipeline:
    tokenizer = qwen_tokenizer()
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.GlmForCausalLM(
            transformers.GlmConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0,
            )
        ),
        vae=small_kl(),
        transformer=diffusers.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
        ),
        scheduler=flow(use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip


def ovis_image() -> diffusers.OvisImagePipeline:
    return diffusers.OvisImagePipeline(
        scheduler=flow(),
        vae=small_kl(),
        text_encoder=qwen3(16),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.OvisImageTransformer2DModel(
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def bria() -> diffusers.BriaPipeline:
    tokenizer = tiny.t5_tokenizer()
    return diffusers.BriaPipeline(
        transformer=diffusers.BriaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=None,
            axes_dims_rope=[0, 4, 4],
        ),
        scheduler=flow(),
        vae=small_kl(scaling=0.13025, shift=0.0),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
    )


def wan() -> diffusers.WanPipeline:
    tokenizer = tiny.t5_tokenizer()
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer, cls=transformers.UMT5EncoderModel, config=transformers.UMT5Config),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=flow(shift=7.0),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=1,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
    )


BUILDERS: dict[str, tuple[Callable[[], diffusers.DiffusionPipeline], int]] = {
    "SanaSprintPipeline": (tiny.sana, 32),
    "StableDiffusionPipeline": (tiny.sd_turbo, 16),
    "FluxPipeline": (tiny.flux, 16),
    "StableDiffusionXLPipeline": (sdxl, 16),
    "LatentConsistencyModelPipeline": (lcm, 16),
    "StableDiffusion3Pipeline": (sd3, 16),
    "Flux2KleinPipeline": (flux2_klein, 16),
    "ZImagePipeline": (z_image, 16),
    "QwenImagePipeline": (qwen_image, 16),
    "PixArtAlphaPipeline": (pixart, 16),
    "PixArtSigmaPipeline": (pixart_sigma, 16),
    "SanaPipeline": (sana_flow, 32),
    "ChromaPipeline": (chroma, 16),
    "HiDreamImagePipeline": (hidream, 16),
    "AuraFlowPipeline": (aura_flow, 16),
    "Lumina2Pipeline": (lumina2, 32),
    "HunyuanDiTPipeline": (hunyuan_dit, 16),
    "HunyuanImagePipeline": (hunyuan_image, 16),
    "CogView4Pipeline": (cogview4, 16),
    "OvisImagePipeline": (ovis_image, 16),
    "BriaPipeline": (bria, 16),
    "WanPipeline": (wan, 32),
}
