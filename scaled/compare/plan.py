"""What a comparison will do, decided before it starts and written down, so that it can be resumed and reproduced."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hnkit.config import parse_options
from hnkit.errors import InputError
from hnkit.internal.values import typed_values

METHODS = ("base", "hypernoise", "direct", "best-of-2", "best-of-4", "best-of-n", "reno", "prompt-optimisation")


@dataclass(frozen=True)
class Plan:
    """The settings of a comparison; `--set compare.KEY=VALUE` changes one.

    Attributes:
        methods: the methods of table 1; a method that the backend cannot offer is refused by name.
        seeds: noises per prompt.
        prompts: how many held-out prompts; 0 is all.
        batch: images at once.
        steps: sampler steps of tables 2 and 8.
        best_of: N of best-of-N.
        reno_iterations: the iterations of ReNO.
        rounds: the rounds of prompt optimisation.
        proposals: the proposals of each round.
        proposer: a local transformers text-generation model for prompt optimisation; empty: the backend's own.
        ranks: LoRA ranks of tables 9 and 10, each trained here.
        losses: KL terms of which each is trained here and followed by its exact KL; "exact" may be added, at d
            products per sample and step.
        train_steps: optimiser steps of what is trained here; 0: those of adapter or preset, with `--quick` 400 at most.
        diversity_prompts: prompts of table 7.
        diversity_seeds: noises per prompt of table 7.
        dino: a transformers vision model for DINO similarity (hub name or folder); empty: left out.
        lpips: a safetensors file with LPIPS weights; empty: left out.
        measure_samples: samples of the KL measurement.
        grid: prompts shown in the grid of images.
        seed: the seed of everything.
    """

    methods: tuple[str, ...] = METHODS
    seeds: int = 4
    prompts: int = 0
    batch: int = 64
    steps: tuple[int, ...] = (1, 2, 4, 8)
    best_of: int = 50
    reno_iterations: int = 50
    rounds: int = 10
    proposals: int = 5
    proposer: str = ""
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    losses: tuple[str, ...] = ("l2", "second-order", "arnoldi")
    train_steps: int = 0
    diversity_prompts: int = 12
    diversity_seeds: int = 50
    dino: str = ""
    lpips: str = ""
    measure_samples: int = 64
    grid: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "seeds": 1,
            "batch": 1,
            "best_of": 1,
            "reno_iterations": 1,
            "rounds": 1,
            "proposals": 1,
            "diversity_prompts": 0,
            "diversity_seeds": 2,
            "measure_samples": 2,
            "grid": 1,
            "prompts": 0,
            "train_steps": 0,
            "seed": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"compare.{name} = {getattr(self, name)}: accepted is {bound} or more")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise InputError(
                f"unknown method {', '.join(unknown) or '(none given)'}: accepted are {', '.join(METHODS)}"
            )
        if not self.steps or min(self.steps) < 1:
            raise InputError(f"compare.steps = {list(self.steps)}: accepted are step counts of 1 or more")
        if any(rank < 1 for rank in self.ranks):
            raise InputError(f"compare.ranks = {list(self.ranks)}: accepted are ranks of 1 or more")
        accepted = ("l2", "second-order", "arnoldi", "exact")
        strange = [loss for loss in self.losses if loss not in accepted]
        if strange:
            raise InputError(f"compare.losses names {strange[0]!r}: accepted are {', '.join(accepted)}")

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


QUICK: dict[str, Any] = {
    "seeds": 2,
    "prompts": 36,
    "batch": 12,
    "best_of": 8,
    "reno_iterations": 10,
    "rounds": 2,
    "proposals": 4,
    "ranks": (),
    "losses": (),
    "steps": (1, 2, 4),
    "diversity_prompts": 6,
    "diversity_seeds": 16,
    "measure_samples": 16,
}
"""What `--quick` changes: minutes on a laptop; tables that need further training are left out, and so is a stochastic
KL beside the exact one."""

QUICK_STEPS = 400
"""The most optimiser steps of what `--quick` trains, unless `compare.train_steps` says another number."""


def make_plan(
    *, quick: bool, methods: Sequence[str] | None, seeds: int | None, overrides: Sequence[str]
) -> tuple[Plan, list[str]]:
    """The plan that the flags ask for, and the overrides that are not its own."""
    mine = [override for override in overrides if override.startswith("compare.")]
    others = [override for override in overrides if not override.startswith("compare.")]
    values: dict[str, Any] = dict(QUICK) if quick else {}
    if methods is not None:
        values["methods"] = tuple(dict.fromkeys(methods))
    if seeds is not None:
        values["seeds"] = seeds
    values |= parse_options(mine, Plan, "compare")
    return Plan(**values), others


def plan_from_json(document: Any) -> Plan:
    """The plan that `to_json` wrote; `InputError` if it is not one."""
    names = {field.name for field in dataclasses.fields(Plan)}
    if not isinstance(document, dict) or set(document) != names:
        raise InputError("plan.json is not the plan of a comparison: start a new one with --out")
    return Plan(**typed_values(document, Plan, "plan.json"))
