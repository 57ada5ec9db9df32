"""The records of a run: the table `[train]`, the settings of `generate`, the rewards, and a resolved run as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import tomli_w

from hnkit.errors import InputError
from hnkit.internal.values import plain_record, require_ranges, setting

if TYPE_CHECKING:
    from hnkit.injection import NoiseInjection

Scalar = bool | int | float | str
CONFIG_FILE = "config.toml"
PERMISSIONS: dict[str, Scalar] = {"local_files_only": True}
"""Options that allow what a file must not switch on, with the value that allows nothing. They are taken from flags,
and are not part of a run: a run folder that is passed on does not hold them."""

_LARGEST = 3.4e38
"""Numbers at or above it are not those of float32, which most networks are trained in."""


@dataclass(frozen=True)
class TrainConfig:
    """The table `[train]`: everything about a run that does not belong to the generator or the rewards.

    Attributes:
        from_adapter: a trained adapter, or its run, to start from; empty: f = 0. Its rank, model and conditioning are
            then the defaults of the backend's options.
        objective: `"hypernoise"` trains f on the noise; `"direct"` trains the backend's direct fine-tuning twin, the
            baseline. The latter's loss is `-reward / alpha` alone.
        kl: the KL term of `NoiseLoss`.
        alpha: temperature of the tilt, in units of the reward.
        reduction: `"sum"` over the noise dimensions, or `"mean"`, which hides a factor d in alpha.
        injection: share `1 - a^2` of the noise that is drawn afresh, in training and wherever the adapter is used:
            `x_hat = a (x + f) + sqrt(1 - a^2) eps`, whose KL is at most `a^2 E|f|^2 / (2 (1 - a^2))`; 0 is none.
        max_delta: bound on `|f|` with injected noise, to which longer deltas are scaled down; 0 is none.
        draws: draws of injected noise for each sample of a step, each a pass of the generator: 2 or more with
            score-function gradients, whose baseline they are, else 1.
        reward_gradient: `"pathwise"`, through reward and generator, or `"score-function"`, which needs values of the
            reward alone: with injected noise and 2 draws or more.
        noise: `"fresh"` noise for every sample; one for each optimiser `"step"`, shared by all its prompts, as in the
            published code; or one `"fixed"` noise for each training prompt.
        generator_steps: sampler steps of the generator during training.
        steps: optimiser steps.
        batch: samples per optimiser step, over all processes and accumulated micro-batches together.
        accumulate: micro-batches per process that make up one optimiser step.
        optimizer: `"adamw8bit"` needs the package bitsandbytes.
        lr: peak learning rate.
        momentum: the momentum of SGD.
        nesterov: Nesterov momentum, for SGD.
        weight_decay: decoupled (AdamW) or added to the gradient (SGD).
        clip: bound on the norm of the gradient of one optimiser step; 0 is none.
        reward_clip: bound on the norm of each sample's gradient of the reward in its noise, in units of the reward; 0
            is none. Direct fine-tuning and score-function gradients, which have none, are as they are without.
        warmup: steps over which the rate grows linearly to `lr`.
        schedule: what the rate does afterwards, until the last step.
        ema: decay of an exponential average of the weights, which is then what is measured and saved; 0 is none.
        precision: `"bfloat16"` runs network and generator under autocast; KL and rewards stay in float32 or better.
        seed: seed of noise, prompt order and probes. Sample i of step t depends on the seed, t and i alone, not on the
            number of processes.
        max_skipped: so many batches with a non-finite loss or gradient in a row end the run.
        measure_every: steps between measurements of the exact KL, L2 term and their gap; 0 is only at the end.
        measure_samples: samples of one measurement.
        measure_method: of `noise_kl`; `"auto"` is exact up to dimension 512 and Arnoldi above.
        measure_rel_error: the relative error at which a stochastic method stops.
        checkpoint_every: steps between checkpoints.
        keep: how many of the newest checkpoints are kept.
        validate_every: steps between comparisons of base and steered outputs on held-out prompts; 0 is only at the
            end.
        validate_samples: pairs of one comparison.
        prompts: training prompts; empty: the backend's own.
        validation_prompts: held-out prompts; empty: the backend's own, or a share of the training prompts.
        validation_share: that share; 0 trains on all of them and validates on the training prompts.
        trackers: besides metrics.jsonl.
    """

    from_adapter: str = setting("", flags=(), metavar="DIR", beside=True)
    objective: Literal["hypernoise", "direct"] = setting("hypernoise", flags=())
    kl: Literal["l2", "second-order", "arnoldi", "exact"] = setting("l2", flags=())
    alpha: float = setting(1.0, above=0, below=_LARGEST, flags=())
    reduction: Literal["sum", "mean"] = setting("sum", flags=())
    injection: float = setting(0.0, least=0, below=1)
    max_delta: float = setting(0.0, least=0, below=_LARGEST)
    draws: int = setting(1, least=1)
    reward_gradient: Literal["pathwise", "score-function"] = "pathwise"
    noise: Literal["fresh", "step", "fixed"] = "fresh"
    generator_steps: int = setting(1, least=1)
    steps: int = setting(1000, least=1, flags=())
    batch: int = setting(16, least=1, below=2**24, flags=())
    accumulate: int = setting(1, least=1)
    optimizer: Literal["sgd", "adamw", "adamw8bit"] = "adamw"
    lr: float = setting(1e-3, above=0, below=_LARGEST, flags=())
    momentum: float = setting(0.0, least=0, below=1)
    nesterov: bool = False
    weight_decay: float = setting(0.0, least=0, below=_LARGEST)
    clip: float = setting(1.0, least=0, below=_LARGEST)
    reward_clip: float = setting(0.0, least=0, below=_LARGEST)
    warmup: int = setting(0, least=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    ema: float = setting(0.0, least=0, below=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = setting(0, least=0, below=2**63, flags=())
    max_skipped: int = setting(20, least=1)
    measure_every: int = setting(0, least=0)
    measure_samples: int = setting(256, least=2, below=2**24)
    measure_method: Literal["auto", "exact", "arnoldi", "lanczos", "power", "roulette", "second-order"] = "auto"
    measure_rel_error: float = setting(0.05, above=0, below=1)
    checkpoint_every: int = setting(100, least=1)
    keep: int = setting(3, least=1)
    validate_every: int = setting(0, least=0)
    validate_samples: int = setting(16, least=1, below=2**24)
    prompts: str = setting("", flags=(), metavar="FILE", beside=True)
    validation_prompts: str = setting("", beside=True)
    validation_share: float = setting(0.1, least=0, below=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        require_ranges(self, "train.")
        if self.draws > 1 and self.reward_gradient == "pathwise":
            raise InputError(
                f"train.draws = {self.draws} with train.reward_gradient = 'pathwise', which takes one, for more do not "
                "earn their passes: leave it out, or give train.reward_gradient = 'score-function', whose baseline "
                "they are"
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise InputError("train.nesterov = true needs train.optimizer = 'sgd' and train.momentum above 0")
        if self.batch % self.accumulate:
            raise InputError(
                f"train.batch = {self.batch} is not a multiple of train.accumulate = {self.accumulate}: "
                "batch counts the samples of one optimiser step, all micro-batches together"
            )
        if self.injection:
            if self.objective == "direct":
                raise InputError("train.injection with train.objective = 'direct', which moves no noise: leave one out")
            if self.kl != "l2":
                raise InputError(
                    f"train.injection with train.kl = {self.kl!r}: its KL is bounded by 'l2', leave kl out"
                )
        elif named := [name for name in ("max_delta", "reward_gradient") if self._set(name)]:
            raise InputError(
                f"train.{named[0]} = {getattr(self, named[0])!r} without train.injection, which it is about: give the "
                "share of the noise that is drawn afresh, such as 0.5"
            )
        if self.reward_gradient == "score-function" and self.draws < 2:
            raise InputError("train.reward_gradient = 'score-function' needs a baseline: give train.draws = 2 or more")

    def _set(self, name: str) -> bool:
        """Whether a setting is not at its default."""
        default = {item.name: item.default for item in dataclasses.fields(self)}[name]
        return bool(getattr(self, name) != default)

    @property
    def deployment(self) -> NoiseInjection | None:
        """How the hypernetwork is deployed, in training as in use; `None`: as `x + f(x)`."""
        if not self.injection:
            return None
        from hnkit.injection import NoiseInjection

        return NoiseInjection(self.injection, self.max_delta or None)


@dataclass(frozen=True)
class GenerateSettings:
    """What a run of `generate` is told.

    Attributes:
        count: images per prompt, each from its own noise. Image k of every prompt starts from the same noise.
        steps: sampler steps of the generator.
        seed: seed of the noise.
        batch: images generated together.
        layout: also write the folder that a scorer reads.
    """

    count: int = setting(4, least=1, flags=("--count", "-n"))
    steps: int = setting(1, least=1, flags=())
    seed: int = setting(0, least=0, flags=())
    batch: int = setting(8, least=1, flags=())
    layout: Literal["geneval", "geneval2", "t2i-compbench", "dpg-bench"] | None = setting(None, flags=())

    def __post_init__(self) -> None:
        require_ranges(self, "--", " ")
        if self.layout is not None:
            from hnkit.output.layouts import check_layout

            check_layout(self.layout, (), self.count)


@dataclass(frozen=True)
class RewardSpec:
    """One entry of `[rewards]` or `[heldout]`: its weight in the sum, and options of its loader."""

    weight: float = 1.0
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """A resolved run: the backend's name and options, the table `[train]`, the rewards.

    `rewards` empty means the backend's default reward. `heldout` rewards are reported and never trained on.
    """

    backend: str
    options: Any
    train: TrainConfig = field(default_factory=TrainConfig)
    rewards: Mapping[str, RewardSpec] = field(default_factory=dict)
    heldout: Mapping[str, RewardSpec] = field(default_factory=dict)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The configuration as plain tables: what `config.toml` and `report.json` hold."""
        return {
            "train": plain_record(self.train),
            "backend": {"name": self.backend, **_without_permissions(plain_record(self.options))},
            "rewards": {name: _plain_reward(spec) for name, spec in self.rewards.items()},
            "heldout": {name: _plain_reward(spec) for name, spec in self.heldout.items()},
        }

    def to_toml(self) -> str:
        """The same as TOML; `resolve_config(config_file=...)` reads it back to an equal record."""
        return config_toml(self.to_dict())


def config_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of a resolved configuration as they stand in `config.toml`."""
    return "# The resolved configuration of this run.\n\n" + tomli_w.dumps(tables)


def _plain_reward(spec: RewardSpec) -> dict[str, Scalar]:
    return {"weight": spec.weight, **_without_permissions(spec.options)}


def _without_permissions(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in PERMISSIONS}
