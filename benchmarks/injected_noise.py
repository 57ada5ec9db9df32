"""What injected noise costs, and what a reward's values alone can train, on the bundled miniature.

Short runs of one recipe that differ in one thing each: the L2 loss without injected noise; injected noise with one
draw, by the gradient through reward and generator; and by the score function with four draws, on a copy of the reward
that has no gradient, at the same number of reward calls and at four times as many; and both on a reward of the image
alone that is smooth over the noise. Gains are on held-out prompts. Four draws by the gradient were measured up to the
day that `EARLIER` names; training has refused them since.

    python benchmarks/injected_noise.py                 all runs, half an hour of one core
    python benchmarks/injected_noise.py --only l2       one of them

Writes docs/results/injected-noise.json, from which `python docs/tables.py` makes the tables of docs/training.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from recipe_training import REWARDS
from torch import Tensor

from hnkit.backend import Reward
from hnkit.config import resolve_config
from hnkit.training.run import train

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "injected-noise.json"
BATCH, STEPS, SHARE = 32, 400, 0.5
COMMON = {
    "steps": STEPS,
    "batch": BATCH,
    "lr": 1e-3,
    "measure_samples": 8,
    "validate_samples": 632,
    "checkpoint_every": STEPS,
}
RUNS: dict[str, dict[str, Any]] = {
    "l2": {},
    "injected": {"injection": SHARE},
    "score function, as many calls": {
        "injection": SHARE, "draws": 4, "batch": BATCH // 4, "reward_gradient": "score-function",
    },
    "score function, four times the calls": {"injection": SHARE, "draws": 4, "reward_gradient": "score-function"},
    "ink on the left, injected": {"injection": SHARE, "alpha": 1.0},
    "ink on the left, score function, as many calls": {
        "injection": SHARE, "draws": 4, "batch": BATCH // 4, "reward_gradient": "score-function", "alpha": 1.0,
    },
}  # fmt: skip
LEFT = "ink on the left"
EARLIER = {"injected, 4 draws, four times the calls": "2026-11-26"}
"""Rows that cannot be measured any more, with the day of the last version that could."""


@cache
def _scorer() -> Reward:
    from hnkit.scaled.digits.rewards import scorer

    return scorer()


def values_alone(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The miniature's reward, through numpy: the same values, and no gradient."""
    with torch.no_grad():
        return torch.from_numpy(_scorer()(images.detach(), prompts).double().numpy())


def ink_on_the_left(images: Tensor, _: Sequence[str]) -> Tensor:
    """How much more light there is left than right, as the recipes are trained on it."""
    return REWARDS[LEFT](images)


def ink_on_the_left_alone(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same through numpy, without a gradient."""
    return torch.from_numpy(ink_on_the_left(images.detach(), prompts).double().numpy())


def rewards_of(name: str, values: bool) -> list[str]:
    """The rewards of a run, as the command line takes them; none is the miniature's own."""
    if name.startswith(LEFT):
        return [f"injected_noise:ink_on_the_left{'_alone' if values else ''}=1"]
    return ["injected_noise:values_alone=1"] if values else []


def measured(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run: its gain on held-out prompts, its nats, and what it spent."""
    chosen = COMMON | settings
    values = chosen.get("reward_gradient") == "score-function"
    config = resolve_config(
        backend="digits",
        overrides=[f"train.{key}={value}" for key, value in chosen.items()],
        rewards=rewards_of(name, values),
    )
    begun = time.process_time()
    report = train(config, out=folder / name.replace(" ", "-")).report
    figures, score = report["measurement"], report["validation"]["scores"]["reward"]
    return {
        "name": name,
        "gain": score["gain"],
        "gain_stderr": score["gain_stderr"],
        "images": score["samples"],
        "injected": figures.get("injected"),
        "kl": figures["kl"],
        "kl_stderr": figures["kl_stderr"],
        "l2": figures["l2"],
        "reward_calls": chosen["steps"] * chosen["batch"] * chosen.get("draws", 1),
        "gradient_of_the_reward": not values,
        "cpu_seconds": round(time.process_time() - begun),
        "skipped": report["skipped"],
        "settings": settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(RUNS), action="append")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    document: dict[str, Any] = {"common": COMMON, "share": SHARE, "runs": []}
    if arguments.out.is_file():
        document = json.loads(arguments.out.read_text())
    for name in arguments.only or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, RUNS[name], Path(folder))
        kept = [run for run in document["runs"] if run["name"] != name]
        order = [*list(RUNS)[:2], *EARLIER, *list(RUNS)[2:]]
        document["runs"] = sorted([*kept, found], key=lambda run: order.index(run["name"]))
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")
        print(f"{name}: gain {found['gain']:.3f} ± {found['gain_stderr']:.3f}, {found['cpu_seconds']} s")


if __name__ == "__main__":
    main()
