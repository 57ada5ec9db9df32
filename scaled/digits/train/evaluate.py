"""Figures: judge's scores of teacher and student, the scorer's use as best-of-N and as a gradient, reconstruction."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaSprintPipeline
from torch import Tensor

from hnkit.scaled.digits.checkpoint import GUIDANCE_SCALE
from hnkit.scaled.digits.judge import Judge, Verdict
from hnkit.scaled.digits.scenes import KINDS, eval_prompts
from hnkit.scaled.digits.train.pipeline import generate
from hnkit.scaled.digits.train.teacher import LATENT, load, sample

Reward = Callable[[Tensor, Sequence[str]], Tensor]


def noises(n: int, seed: int) -> Tensor:
    """Initial noise (n, 16, 4, 4) of one seed."""
    return torch.randn(n, *LATENT, generator=torch.Generator().manual_seed(seed))


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Mean score over seeds, overall and per kind, each with its standard error over the seeds."""

    def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return {"mean": round(statistics.fmean(values), 4), "stderr": None if error is None else round(error, 4)}

    kinds: dict[str, Any] = {kind: mean_and_error([v.by_kind()[kind] for v in verdicts]) for kind in KINDS}
    illegible = mean_and_error([float(v.illegible.float().mean()) for v in verdicts])
    return {
        "overall": mean_and_error([v.score for v in verdicts]),
        **kinds,
        "illegible_cells_per_image": illegible,
        "seeds": len(verdicts),
    }


def judge_teacher(work: Path, judge: Judge, *, guidance: float, seeds: int, steps: int = 10) -> dict[str, Any]:
    """The teacher's score on the held-out prompts."""
    flow, tokenizer = load(work / "teacher")
    from hnkit.scaled.digits.train.common import load_autoencoder

    vae, texts, verdicts = load_autoencoder(work), eval_prompts(), []
    for seed in range(seeds):
        y = sample(flow, tokenizer, texts, noises(len(texts), seed), guidance=guidance, steps=steps)
        with torch.no_grad():
            images = vae.decode(y / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
        verdicts.append(judge(images.clamp(0, 1), texts))
    return summary(verdicts)


def judge_student(
    pipeline: SanaSprintPipeline, judge: Judge, *, steps: int, seeds: int, guidance: float = GUIDANCE_SCALE
) -> dict[str, Any]:
    """The student's score on the held-out prompts, through the pipeline's own call."""
    texts = eval_prompts()
    images = [
        generate(pipeline, texts, noises(len(texts), seed), steps=steps, guidance=guidance, seed=seed)
        for seed in range(seeds)
    ]
    return summary([judge(batch, texts) for batch in images])


def best_of(pipeline: SanaSprintPipeline, judge: Judge, reward: Reward, *, n: int, seeds: int) -> dict[str, Any]:
    """The judge's score of the image that `reward` likes best among n from different noises."""
    texts, verdicts = eval_prompts(), []
    for seed in range(seeds):
        images, scores = [], []
        for k in range(n):
            batch = generate(pipeline, texts, noises(len(texts), seed * n + k), steps=1, guidance=GUIDANCE_SCALE)
            images.append(batch)
            with torch.no_grad():
                scores.append(reward(batch, texts))
        best = torch.stack(scores).argmax(0)
        verdicts.append(judge(torch.stack(images)[best, torch.arange(len(texts))], texts))
    return summary(verdicts)


def ascend(
    pipeline: SanaSprintPipeline,
    judge: Judge,
    reward: Reward,
    *,
    iterations: int,
    rate: float,
    seeds: int,
    weight: float = 1.0,
) -> dict[str, Any]:
    """The judge's score after gradient ascent of weight * reward - |x|^2 / 2 on each image's own noise."""
    texts, verdicts, moved = eval_prompts(), [], []
    call = inspect.unwrap(type(pipeline).__call__)
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(list(texts), max_sequence_length=8)
    for seed in range(seeds):
        start = noises(len(texts), seed)
        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=rate)
        for iteration in range(iterations + 1):
            latents = call(
                pipeline,
                prompt_embeds=states,
                prompt_attention_mask=mask,
                num_inference_steps=1,
                intermediate_timesteps=None,
                guidance_scale=GUIDANCE_SCALE,
                height=32,
                width=32,
                latents=x,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                use_resolution_binning=False,
            ).images
            images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
            if iteration == iterations:
                break
            objective = weight * reward(images.clamp(0, 1), texts) - x.square().sum((1, 2, 3)) / 2
            adam.zero_grad()
            torch.autograd.backward(-objective.sum())
            adam.step()
        verdicts.append(judge(images.detach(), texts))
        moved.append(float((x - start).detach().square().sum((1, 2, 3)).mean()))
    return {**summary(verdicts), "mean_squared_move": round(statistics.fmean(moved), 2)}


def show(name: str, figures: Mapping[str, Any]) -> None:
    """Print one row."""
    cells = "  ".join(f"{kind} {figures[kind]['mean']:.3f}" for kind in KINDS)
    overall = figures["overall"]
    print(
        f"{name:28s} {overall['mean']:.3f} +- {overall['stderr']}  {cells}  "
        f"illegible {figures['illegible_cells_per_image']['mean']:.3f}",
        flush=True,
    )
