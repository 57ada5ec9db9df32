"""Stage 1: the deep-compression autoencoder, 32 x 32 x 3 pixels to 4 x 4 x 16 latents (d = 256)."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor

from hnkit.scaled.digits.scenes import load_scans, render, sample_scene
from hnkit.scaled.digits.train.common import Average, PromptSampler, optimiser, record, steps_logged

LATENT_NOISE = 0.1


def build() -> AutoencoderDC:
    """An untrained autoencoder."""
    return AutoencoderDC(
        in_channels=3,
        latent_channels=16,
        attention_head_dim=16,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 32, 64, 64),
        decoder_block_out_channels=(16, 32, 64, 64),
        encoder_layers_per_block=(0, 1, 2, 1),
        decoder_layers_per_block=(0, 1, 2, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        encoder_out_shortcut=True,
        decoder_in_shortcut=True,
        scaling_factor=1.0,
    )


def train(work: Path, *, seed: int, steps: int, batch: int = 96) -> None:
    """Train on random scenes; a little noise on the latents makes the decoder forgiving.

    Args:
        work: Folder for the result (``vae/``) and the figures.
        seed: Seed of weights and data.
        steps: Optimiser steps.
        batch: Scenes a step.
    """
    torch.manual_seed(seed)
    vae, scans, sampler = build().train(), load_scans("generator"), PromptSampler(seed)
    adam, schedule = optimiser(list(vae.parameters()), 3e-3, steps, decay=0.0)
    average, start = Average(vae, 0.995), time.monotonic()
    log: dict[str, Tensor | float] = {}
    for step in steps_logged(steps, 100, log, "autoencoder"):
        prompts = sampler(batch // 2) + [None] * (batch - batch // 2)
        images = render([sample_scene(p, sampler.rng) for p in prompts], scans, seed=seed * 1_000_003 + step)
        target = images * 2 - 1
        z = vae.encode(target, return_dict=False)[0]
        noisy = z + LATENT_NOISE * torch.randn_like(z)
        decoded = vae.decode(noisy, return_dict=False)[0]
        scale = (z.pow(2).mean((0, 2, 3)) - 1).pow(2).mean() + z.mean((0, 2, 3)).pow(2).mean()
        loss = F.mse_loss(decoded, target) + 0.2 * F.l1_loss(decoded, target) + 0.01 * scale
        adam.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adam.step()
        schedule.step()
        average.update(vae)
        log.update(mse=F.mse_loss(decoded.detach(), target), scale=scale.detach())
    trained = average.module
    rng = random.Random(seed + 1)
    scenes = [sample_scene(None, rng) for _ in range(2048)]
    with torch.no_grad():
        z = trained.encode(render(scenes, scans, seed=seed + 2) * 2 - 1, return_dict=False)[0]
        trained.register_to_config(scaling_factor=float(1 / z.std()))
        held = render(scenes, load_scans("judge"), seed=seed + 3)
        back = trained.decode(trained.encode(held * 2 - 1, return_dict=False)[0], return_dict=False)[0] / 2 + 0.5
        mse = F.mse_loss(back.clamp(0, 1), held)
    trained.save_pretrained(work / "vae")
    figures = {
        "psnr_db_unseen_handwriting": float(-10 * mse.log10()),
        "latent_std_per_channel": [round(v, 4) for v in z.std((0, 2, 3)).tolist()],
        "parameters": sum(p.numel() for p in trained.parameters()),
        "steps": steps,
        "seconds": round(time.monotonic() - start, 1),
    }
    record(work, "autoencoder", figures)
    print(figures, flush=True)
