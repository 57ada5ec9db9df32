"""The pipeline folder: student, autoencoder and scheduler put together as a diffusers ``SanaSprintPipeline``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from torch import Tensor

from hnkit.scaled.digits.scenes import CANVAS
from hnkit.scaled.digits.train.common import load_autoencoder
from hnkit.scaled.digits.train.teacher import load
from hnkit.scaled.digits.train.tokenizers import GEMMA_LENGTH


def assemble(work: Path, name: str = "student") -> SanaSprintPipeline:
    """Build the pipeline from the parts in the work folder.

    Args:
        work: Folder with ``vae/`` and the folder `name` (transformer, text encoder, tokenizer).
        name: ``student`` or ``teacher``.

    Returns:
        The pipeline.
    """
    flow, tokenizer = load(work / name)
    flow.text_encoder.config.use_cache = False
    pipeline = SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=flow.text_encoder,
        vae=load_autoencoder(work),
        transformer=flow.transformer,
        scheduler=SCMScheduler(sigma_data=0.5),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    pipeline: SanaSprintPipeline, texts: Sequence[str], noise: Tensor, *, steps: int, guidance: float, seed: int = 0
) -> Tensor:
    """Images in [0, 1], (n, 3, 32, 32), by the pipeline's own call."""
    out = pipeline(
        list(texts),
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        guidance_scale=guidance,
        height=CANVAS,
        width=CANVAS,
        latents=noise,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        use_resolution_binning=False,
        max_sequence_length=GEMMA_LENGTH,
        complex_human_instruction=None,
    )
    images: Tensor = out.images
    return images
