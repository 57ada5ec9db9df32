"""Stage 3: distil the guided teacher into the few-step student.

First the teacher's guided flow is integrated from many noises; then the student, started from the teacher, learns to
jump from any point of a trajectory to its end. In SANA-Sprint's terms its estimate of the end from (y_s, s) is
y_s - s u(y_s, s), which is what the pipeline computes; at s = 1 this is one-step generation, and points further down
the trajectory are what its second and fourth step start from. The guidance scale becomes an input of the student.

Source: arXiv:2503.09641 (guidance embedding, TrigFlow); regression of a teacher's end points as in arXiv:2101.02388.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hnkit.scaled.digits.train.common import Average, PromptSampler, optimiser, record, steps_logged
from hnkit.scaled.digits.train.teacher import LATENT, load, sample, save, tokenise

GUIDANCE_RANGE = (2.0, 5.0)
TEACHER_STEPS = 10
KEPT = (0, 1, 2, 4, 6, 8, 10)


def trajectories(work: Path, *, seed: int, shard: int, n: int, chunk: int = 256) -> None:
    """Integrate the teacher from n noises and write one shard.

    Args:
        work: Folder with ``teacher/``; receives ``pairs/SHARD.safetensors``.
        seed: Seed of all shards.
        shard: Number of this one; it enters the seed.
        n: Trajectories.
        chunk: Trajectories integrated at a time.
    """
    flow, tokenizer = load(work / "teacher")
    generator = torch.Generator().manual_seed(seed * 7919 + shard)
    sampler = PromptSampler(seed * 7919 + shard)
    paths, tokens, scales = [], [], []
    for _ in range(0, n, chunk):
        texts = [p.text for p in sampler(chunk)]
        low, high = GUIDANCE_RANGE
        w = low + (high - low) * torch.rand(chunk, generator=generator)
        noise = torch.randn(chunk, *LATENT, generator=generator)
        path = sample(flow, tokenizer, texts, noise, guidance=w, steps=TEACHER_STEPS, keep=True)
        paths.append(path[:, list(KEPT)].half())
        tokens.append(tokenise(tokenizer, texts)[0])
        scales.append(w)
    (work / "pairs").mkdir(exist_ok=True)
    data = {"paths": torch.cat(paths), "ids": torch.cat(tokens), "guidance": torch.cat(scales)}
    partial = work / "pairs" / f"{shard:03d}.partial"
    save_file(data, partial)
    partial.rename(work / "pairs" / f"{shard:03d}.safetensors")


def _read(folder: Path) -> dict[str, Tensor]:
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def train(work: Path, *, seed: int, steps: int, batch: int = 128, lr: float = 8e-4) -> None:
    """Train the student; shards that appear meanwhile are taken in.

    Args:
        work: Folder with ``teacher/`` and ``pairs/``; receives ``student/``.
        seed: Seed of the draws.
        steps: Optimiser steps.
        batch: Trajectory points a step.
        lr: Peak learning rate.
    """
    torch.manual_seed(seed)
    start = time.monotonic()
    log: dict[str, Tensor] = {}
    flow, tokenizer = load(work / "teacher")
    flow.train()
    data = _read(work / "pairs")
    times = torch.linspace(1, 0, TEACHER_STEPS + 1)[list(KEPT)]
    adam, schedule = optimiser([p for p in flow.parameters() if p.requires_grad], lr, steps)
    average = Average(flow, 0.999)
    for step in steps_logged(steps, 100, log, "student"):
        if step % 200 == 199:
            data = _read(work / "pairs")
        rows = torch.randint(len(data["ids"]), (batch,))
        # Half the batch starts from noise; the last kept point is the target itself.
        point = torch.where(torch.rand(batch) < 0.5, 0, torch.randint(len(KEPT) - 1, (batch,)))
        paths, ids = data["paths"][rows].float(), data["ids"][rows]
        y, end, s = paths[torch.arange(batch), point], paths[:, -1], times[point]
        u = flow(y, s, ids, (ids != tokenizer.pad_token_id).long(), data["guidance"][rows])
        error = y - s.view(-1, 1, 1, 1) * u - end
        # Pseudo-Huber: close to the median of what is possible, so sharper than the mean.
        loss = ((error.square().sum((1, 2, 3)) + 0.25).sqrt() / s.sqrt()).mean()
        adam.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        adam.step()
        schedule.step()
        average.update(flow)
        first = error.detach()[point == 0].square().mean()
        log["one_step_mse"] = first if step == 0 else 0.97 * log["one_step_mse"] + 0.03 * first
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(work / "student", average.module, tokenizer)
    record(
        work,
        "student",
        {
            "one_step_mse_to_teacher": float(log["one_step_mse"]),
            "trajectories": len(data["ids"]),
            "steps": steps,
            "batch": batch,
            "guidance_range": list(GUIDANCE_RANGE),
            "seconds": round(time.monotonic() - start, 1),
        },
    )
