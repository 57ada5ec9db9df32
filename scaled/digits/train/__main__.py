"""Train the bundled digits model from scratch.

``python -m hnkit.scaled.digits.train all --work FOLDER`` runs every stage in order; each can be run alone. About two
hours of two CPU cores in all, and as long again for the last, the adapter. The seed fixes weights, data and draws; on
another machine or thread count the figures differ in the last digits and so, slightly, do the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hnkit.scaled.digits.checkpoint import GUIDANCE_SCALE, model_folder
from hnkit.scaled.digits.judge import Judge
from hnkit.scaled.digits.rewards import legibility, scorer
from hnkit.scaled.digits.scenes import Kind
from hnkit.scaled.digits.train import adapter, autoencoder, bundle, distil, evaluate, reader, teacher
from hnkit.scaled.digits.train import scorer as scorer_stage
from hnkit.scaled.digits.train.common import record
from hnkit.scaled.digits.train.pipeline import assemble

# The second round of the scorer dwells on what it confused after the first: relations and attribution.
HARD_KINDS: dict[Kind, float] = {
    "single": 0.5,
    "two": 0.75,
    "counting": 1.0,
    "colours": 0.75,
    "position": 4.0,
    "attribution": 3.0,
}
# Shards of the bundled run; the last four arrived while the student was being trained, here they come before.
SHARDS = (*range(9), 10, 12, 14)
SHARD_SIZE = 2048


def _trajectories(work: Path, seed: int) -> None:
    for shard in SHARDS:
        distil.trajectories(work, seed=seed, shard=shard, n=SHARD_SIZE)


def _evaluate(work: Path, seeds: int) -> None:
    judge, rewards = Judge.load(work / "judge.safetensors"), scorer(work)
    pipeline = assemble(work)
    scores: dict[str, dict[str, Any]] = {}

    def measure(name: str, figures: dict[str, Any]) -> None:
        scores[name] = figures
        evaluate.show(name, figures)

    measure("teacher, 10 steps", evaluate.judge_teacher(work, judge, guidance=GUIDANCE_SCALE, seeds=seeds))
    for steps in (1, 2, 4):
        name = f"student, {steps} step{'s' if steps > 1 else ''}"
        measure(name, evaluate.judge_student(pipeline, judge, steps=steps, seeds=seeds))
    measure("student, best of 8 by CLIP", evaluate.best_of(pipeline, judge, rewards, n=8, seeds=seeds))
    measure("student, best of 8 by legibility", evaluate.best_of(pipeline, judge, legibility(work), n=8, seeds=seeds))
    ascended = evaluate.ascend(pipeline, judge, rewards, iterations=10, rate=0.1, seeds=seeds, weight=100.0)
    measure("student, 10 gradient steps on the noise by CLIP", ascended)
    record(work, "scores", scores)


def main() -> None:
    """Parse the command line and run the stages asked for."""
    parser = argparse.ArgumentParser(prog="python -m hnkit.scaled.digits.train", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--out", type=Path, default=model_folder(), help="the bundled folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=8, help="noise seeds of the evaluation")
    parser.add_argument("--adapter-steps", type=int, help="optimiser steps of the adapter's training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in STAGES if arguments.stage == "all" else [arguments.stage]:
        STAGES[name](arguments)


def _stage(function: Callable[..., None], offset: int = 0, **fixed: Any) -> Callable[[argparse.Namespace], None]:
    return lambda a: partial(function, a.work, seed=a.seed + offset, **fixed)()


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "autoencoder": _stage(autoencoder.train, steps=2200, batch=64),
    "judge": _stage(reader.train_judge, steps=2500),
    "legibility": _stage(reader.train_legibility, steps=2000),
    "scorer": _stage(scorer_stage.train, steps=2000),
    "scorer-round-2": _stage(scorer_stage.train, offset=1, steps=1500, lr=7e-4, weights=HARD_KINDS, resume=True),
    "teacher": _stage(teacher.train, steps=4000, schedule=6500),
    "trajectories": lambda a: _trajectories(a.work, a.seed),
    "student": _stage(distil.train, steps=3000),
    "evaluate": lambda a: _evaluate(a.work, a.seeds),
    "bundle": lambda a: bundle.bundle(a.work, a.out),
    "adapter": lambda a: adapter.train_adapter(a.work, a.out, seed=a.seed, steps=a.adapter_steps),
}

if __name__ == "__main__":
    main()
