"""Training-step speed and memory of the full SANA-Sprint 0.6B configuration with random weights.

    python benchmarks/sana_full.py                                   # full size, on a GPU: 1024 px
    python benchmarks/sana_full.py --tiny                            # the same script on the CPU, in seconds
    python benchmarks/sana_full.py --batches 1,3,6 --out figures.json

No weights are needed: transformer and DC-AE decoder have the published sizes and random entries, and the text encoder
is left out (embeddings are random; training needs it only once). Every row is one training step, forward and backward,
by the backend and, as the line to compare with, by a plainly written loop of the same step. Reported: images per
second (median step) and peak memory, per batch size, without and with each memory option.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from hnkit import InputError, NoiseLoss
from hnkit.maps import Condition, ConditionedMap
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.backend import Known, PipelineBackend
from hnkit.scaled.pipelines.families.sana import SanaOptions
from hnkit.scaled.pipelines.families.table import SANA_SPRINT
from hnkit.scaled.pipelines.skeleton import planned_layout, planned_texts

OPTIONS = (
    {},
    {"vae_checkpointing": True},
    {"vae_checkpointing": True, "vae_slicing": True},
    {"vae_checkpointing": True, "generator_checkpointing": True},
    {"vae_checkpointing": True, "generator_checkpointing": True, "hypernetwork_checkpointing": True},
    {
        "vae_checkpointing": True,
        "vae_slicing": True,
        "generator_checkpointing": True,
        "hypernetwork_checkpointing": True,
    },
)


def transformer(tiny: bool) -> diffusers.SanaTransformer2DModel:
    """The 0.6B transformer of SANA-Sprint (28 layers, width 1152), or a small one of the same class."""
    heads, layers, cross, caption = (4, 2, 2, 64) if tiny else (36, 28, 16, 2304)
    return diffusers.SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_attention_heads=heads,
        attention_head_dim=32,
        num_layers=layers,
        num_cross_attention_heads=cross,
        cross_attention_head_dim=heads * 32 // cross,
        cross_attention_dim=heads * 32,
        caption_channels=caption,
        mlp_ratio=2.5,
        sample_size=32,
        patch_size=1,
        guidance_embeds=True,
        guidance_embeds_scale=0.1,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1000.0,
    )


def decoder(tiny: bool) -> diffusers.AutoencoderDC:
    """DC-AE f32c32 as SANA uses it (the encoder is one layer thick: it is never called)."""
    widths = (16, 16, 16, 32, 32, 32) if tiny else (128, 256, 512, 512, 1024, 1024)
    return diffusers.AutoencoderDC(
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6 if tiny else (3,) * 6,
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_act_fns="silu",
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )


def load(options: SanaOptions, tiny: bool, device: torch.device, dtype: torch.dtype) -> PipelineBackend:
    """A backend on random weights; `hnkit.scaled.pipelines.loading.load_pipeline` without the files."""
    torch.manual_seed(0)
    pipe = diffusers.SanaSprintPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=decoder(tiny).to(device, dtype).requires_grad_(False).eval(),
        transformer=transformer(tiny).to(device, dtype).requires_grad_(False).eval(),
        scheduler=diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    )
    memory.apply_decoder_options(pipe.vae, options)
    memory.set_checkpointing(pipe.transformer, options.generator_checkpointing)
    texts, shapes = planned_texts(SANA_SPRINT, pipe, options)
    layout = planned_layout(SANA_SPRINT, pipe, options, texts, shapes)
    return PipelineBackend(SANA_SPRINT, options, pipe, name="sana", known=Known(NoPrompts(), texts, layout))


class NoPrompts:
    """In the place of an `EmbeddingCache`: nothing is encoded."""

    def rows(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(len(prompts), 0)}


def random_condition(backend: PipelineBackend, count: int, tokens: int, dtype: torch.dtype) -> Condition:
    """Embeddings of `tokens` unmasked positions of 300."""
    width = backend._base.config.caption_channels
    mask = torch.zeros(count, 300, dtype=torch.long, device=backend.device)
    mask[:, :tokens] = 1
    embeds = torch.randn(count, 300, width, device=backend.device).to(dtype)
    return Condition(("",) * count, {"prompt_embeds": embeds, "prompt_attention_mask": mask})


def redness(images: Tensor) -> Tensor:
    """The paper's redness reward."""
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2)) / 100


def our_step(backend: PipelineBackend, noise: Tensor, condition: Condition) -> None:
    """Forward and backward as hnkit's trainer runs them."""
    terms = NoiseLoss()(
        ConditionedMap(backend.hypernetwork, condition), noise, lambda x: backend.generate(x, condition), redness
    )
    terms.total.mean().backward()


def plain_step(backend: PipelineBackend, noise: Tensor, condition: Condition) -> None:
    """The same step written down plainly, without pipeline, loss or backend."""
    base, vae, twin = backend._base, backend.pipeline.vae, backend.hypernetwork.twin
    dtype = base.dtype
    inputs = {
        "encoder_hidden_states": condition.tensors["prompt_embeds"],
        "encoder_attention_mask": condition.tensors["prompt_attention_mask"],
        "guidance": torch.full((len(noise),), 0.45, device=noise.device, dtype=dtype),
        "timestep": torch.ones(len(noise), device=noise.device),
        "return_dict": False,
    }
    delta = twin(noise.to(dtype), **inputs)[0].float()
    velocity = base((noise + delta).to(dtype), **inputs)[0].float()
    images = vae.decode((-velocity / vae.config.scaling_factor).to(dtype), return_dict=False)[0]
    images = (images / 2 + 0.5).clamp(0, 1).float()
    (delta.square().flatten(1).sum(1) / 2 - redness(images)).mean().backward()


def measure(step: Any, backend: PipelineBackend, count: int, rounds: int, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds per step, images per second, peak GiB (the device's, where there is one)."""
    noise = torch.randn(count, *backend.noise_shape, device=backend.device)
    condition = random_condition(backend, count, 40, dtype)
    cuda = backend.device.type == "cuda"
    times = []
    for turn in range(rounds + 1):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step(backend, noise, condition)
        backend.hypernetwork.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        if turn:
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    found = {"seconds": seconds, "images_per_second": count / seconds}
    return found | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})


def main() -> None:
    """Measure every combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small layers and 64 px, for a machine without a GPU")
    parser.add_argument("--batches", default="", help="comma-separated batch sizes; default 1,3,6 (tiny: 1,2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("the full size needs a GPU: use --tiny here")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    batches = [int(n) for n in (arguments.batches or ("1,2" if arguments.tiny else "1,3,6")).split(",")]
    machine = platform.processor() or platform.machine() if arguments.tiny else torch.cuda.get_device_name()
    print(f"{machine}; torch {torch.__version__}, diffusers {diffusers.__version__}; {dtype}")
    print(f"{'step':<6} {'batch':>5} {'images/s':>9} {'peak GiB':>9}  options")
    rows = []
    for chosen in OPTIONS:
        options = SanaOptions(
            size=64 if arguments.tiny else 1024, rank=8 if arguments.tiny else 128, cache_dir="", **chosen
        )
        backend = load(options, arguments.tiny, device, dtype)
        for name, step in (("hnkit", our_step), ("plain", plain_step)):
            for count in batches:
                try:
                    found = measure(step, backend, count, arguments.rounds, dtype)
                except (InputError, torch.OutOfMemoryError):
                    backend.hypernetwork.zero_grad(set_to_none=True)
                    torch.cuda.empty_cache()
                    print(f"{name:<6} {count:>5} {'-':>9} {'-':>9}  {', '.join(chosen) or 'none'}: out of memory")
                    continue
                rows.append({"step": name, "batch": count, "options": list(chosen), **found})
                peak = f"{found['peak_gib']:9.1f}" if "peak_gib" in found else f"{'-':>9}"
                print(f"{name:<6} {count:>5} {found['images_per_second']:9.2f} {peak}  {', '.join(chosen) or 'none'}")
        del backend
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
