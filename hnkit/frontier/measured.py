"""A trained hypernetwork on the frontier: its gain, its nats and its distance from the law it was trained for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hnkit.backend import BackendBase, image_noise
from hnkit.errors import InputError
from hnkit.frontier.certified import GapBound, gap_lower_bound
from hnkit.frontier.curve import LEAST_SAMPLES, Frontier
from hnkit.frontier.table import MethodGain, Rewards, methods_on_frontier
from hnkit.injection import deployed_noise
from hnkit.internal.seeds import generator_for
from hnkit.internal.stats import Estimate, mean_and_stderr, ratio_and_stderr
from hnkit.internal.values import finite
from hnkit.internal.workers import ALONE, Workers, shared_out
from hnkit.kl.divergence import Method, noise_kl
from hnkit.kl.verdict import L2Verdict, l2_verdict
from hnkit.maps import Condition, slices
from hnkit.prompts import spread
from hnkit.rewards import RewardSum

EXACT_UP_TO = 1024
"""Largest noise dimension at which the KL is taken from dense Jacobians."""

VERDICT_SAMPLES = 16
"""Samples from which it is told whether the L2 term is good enough."""

FAITHFUL = ("exact", "arnoldi", "lanczos", "low-rank")
"""Methods whose mean is that of the KL integrand to working accuracy; a certified gap rests on no other."""


@dataclass(frozen=True)
class FrontierSettings:
    """What a measurement of a hypernetwork against the frontier is told.

    Attributes:
        base_samples: base images a prompt, from which the frontier is estimated.
        samples: steered images a prompt, from which gain and KL are estimated; the noises of the first base images.
        steps: sampler steps of the generator.
        seed: the seed of the noise and of the probes.
        batch: images generated together.
        method: the method of `noise_kl`; `None`: exact up to 1024 dimensions, Golub-Kahan above.
    """

    base_samples: int = 128
    samples: int = 8
    steps: int = 1
    seed: int = 0
    batch: int = 16
    method: Method | None = None

    def __post_init__(self) -> None:
        for name, least in (("base_samples", LEAST_SAMPLES), ("samples", 2), ("steps", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {least} or more")


@dataclass(frozen=True)
class NetworkOnFrontier:
    """A hypernetwork beside what its nats could buy.

    Attributes:
        frontier: the frontier of the base, by the reward.
        table: rewards of base and hypernetwork, prompt by prompt.
        methods: the hypernetwork's gain and efficiency, under its name.
        kl: mean over prompts of the KL integrand, nats: the KL where the map is injective, else a lower bound of it.
            Where noise is injected, the mean of its proved upper bound.
        kl_stderr: its standard error over samples within prompts.
        l2: mean over prompts of `|f|^2 / 2`, nats.
        l2_stderr: its standard error over samples within prompts.
        injective: what is known of the injectivity of the map under every prompt; `None` where noise is injected.
        folds: samples at which it reverses orientation, and samples looked at; `None` where the method cannot tell.
        relative_error: `(l2 - kl) / kl`, no unit; `None` where noise is injected.
        gap: how far the hypernetwork is from the tilted law of its temperature; `None` without temperature, or where
            there is one prompt, the method of the KL leaves out a part of it, or it is bounded from above alone.
        alpha: that temperature.
        injected: whether noise is injected, so that `kl` is an upper bound's mean.
        l2_verdict: whether the L2 term is good enough; `None` where noise is injected.
    """

    frontier: Frontier
    table: dict[str, Rewards]
    methods: dict[str, MethodGain]
    kl: float
    kl_stderr: float
    l2: float
    gap: GapBound | None
    alpha: float | None
    injected: bool = False
    l2_verdict: L2Verdict | None = None
    injective: str | None = None
    folds: tuple[int, int] | None = None
    relative_error: Estimate | None = None
    l2_stderr: float = math.nan

    def figures(self) -> dict[str, Any]:
        """The figures of the hypernetwork beyond its place on the frontier, for the JSON document."""
        name = "kl_at_most" if self.injected else "kl"
        found: dict[str, Any] = {name: self.kl, f"{name}_stderr": self.kl_stderr, "l2": self.l2,
                                 "l2_stderr": self.l2_stderr, "alpha": self.alpha}  # fmt: skip
        if self.gap is not None:
            found["gap_lower_bound"] = self.gap.lower
            found["gap_confidence"] = self.gap.confidence
            found["gap_estimate"] = self.gap.estimate
            found["gap_stderr"] = self.gap.stderr
        if self.l2_verdict is not None:
            found["l2_verdict"] = self.l2_verdict.to_json()
            found["local_norm"] = {"max": self.l2_verdict.local_norm}
        if self.relative_error is not None:
            found |= {
                "relative_error": self.relative_error.value,
                "relative_error_stderr": self.relative_error.stderr,
                "injective": self.injective,
                "folds": None if self.folds is None else {"negative": self.folds[0], "samples": self.folds[1]},
            }
        record: dict[str, Any] = finite(found)
        return record


@dataclass(frozen=True)
class _Prompt:
    """What is measured under one prompt: rewards of base and steered images, and the KL integrand, all on the CPU.

    `half` is `|f|^2 / 2`; `faithful` says that the integrand leaves nothing out; `injective` and `folds` are what its
    estimate tells of the map under this prompt.
    """

    base: Tensor
    steered: Tensor
    integrand: Tensor
    half: Tensor
    faithful: bool
    injective: str | None = None
    folds: tuple[int, int] | None = None


@torch.no_grad()
def network_on_frontier(
    backend: BackendBase,
    rewards: RewardSum,
    prompts: Sequence[str],
    settings: FrontierSettings,
    *,
    alpha: float | None = None,
    name: str = "hypernetwork",
    workers: Workers = ALONE,
) -> NetworkOnFrontier:
    """Generate base and steered images, score them, and measure the KL of the hypernetwork on the same noises.

    Args:
        backend: the backend, with its adapter loaded.
        rewards: what the frontier is drawn in.
        prompts: the prompt set; every prompt counts the same.
        settings: sizes, seed and method.
        alpha: effective temperature that the hypernetwork was trained at, in units of the reward.
        name: how the hypernetwork is called.
        workers: the processes that the prompts are shared out over.

    Raises:
        InputError: no reward, no prompts, or rewards that are constant or not finite.
    """
    if not rewards.rewards:
        raise InputError("no reward: give --reward NAME=WEIGHT, or the folder of the run, which names its own")
    if not prompts:
        raise InputError("no prompts: give one at least")
    dim = torch.Size(backend.noise_shape).numel()
    method = settings.method or ("exact" if dim <= EXACT_UP_TO else "lanczos")
    injection = backend.injection
    backend.prepare(prompts)
    distinct = list(dict.fromkeys(prompts))
    mine: dict[int, _Prompt] = {}
    for number, prompt in shared_out(distinct, workers):
        noise = image_noise(backend, _images(prompt, settings.base_samples, settings))
        scores = _scores(backend, rewards, prompt, noise, settings)
        x = noise[: settings.samples]
        f = backend.map_for([prompt] * len(x))
        images = _images(prompt, len(x), settings)
        moved, delta = deployed_noise(injection, x, f(x), images.generators("injected noise"))
        faithful = injection is None
        known: dict[str, Any] = {}
        if injection is None:
            with torch.enable_grad():
                estimate = noise_kl(f, x, method=method, generator=images.generators("probes")[0])
            faithful = estimate.method in FAITHFUL
            integrand = estimate.per_sample.double().cpu()
            signs = estimate.folds
            known = {"injective": estimate.injective, "folds": signs and (signs.negative, signs.samples)}
        else:
            integrand = injection.nats(delta).double().cpu()
        half = delta.double().flatten(1).square().sum(1).cpu() / 2
        steered_scores = _scores(backend, rewards, prompt, moved.to(x.dtype), settings)
        mine[number] = _Prompt(scores, steered_scores, integrand, half, faithful, **known)
    gathered = {number: part for parts in workers.gather(mine) for number, part in parts.items()}
    ordered = [gathered[number] for number in range(len(distinct))]
    base = {prompt: part.base for prompt, part in zip(distinct, ordered, strict=True)}
    steered = {prompt: part.steered for prompt, part in zip(distinct, ordered, strict=True)}
    integrands, squares = [part.integrand for part in ordered], [float(part.half.mean()) for part in ordered]
    kl = sum(float(values.mean()) for values in integrands) / len(integrands)
    errors = [mean_and_stderr(values)[1] ** 2 for values in integrands]
    gap = None
    if alpha is not None and len(base) > 1 and all(part.faithful for part in ordered):
        gap = gap_lower_bound(integrands, list(steered.values()), list(base.values()), alpha)
    stderr = sum(errors) ** 0.5 / len(errors)
    table = {"base": Rewards(base), name: Rewards(steered, kl, stderr, gap, injection is not None)}
    frontier, methods = methods_on_frontier(table)
    square = sum(squares) / len(squares)
    spread = sum(mean_and_stderr(part.half)[1] ** 2 for part in ordered) ** 0.5 / len(ordered)
    found = NetworkOnFrontier(
        frontier, table, methods, kl, stderr, square, gap, alpha, injection is not None, l2_stderr=spread
    )
    if injection is not None:
        return found
    values, halves = torch.cat(integrands), torch.cat([part.half for part in ordered])
    return replace(
        found,
        l2_verdict=_l2_verdict(backend, list(base), settings),
        relative_error=Estimate(*ratio_and_stderr(halves - values, values)),
        **_injectivity(ordered),
    )


def _injectivity(parts: Sequence[_Prompt]) -> dict[str, Any]:
    """What is known of the maps of all prompts: the worst that is known of one."""
    words = [part.injective for part in parts]
    worst = next((word for word in ("violated", "unknown") if word in words), "certified")
    counts = [part.folds for part in parts if part.folds is not None]
    folds = None if not counts else (sum(n for n, _ in counts), sum(n for _, n in counts))
    return {"injective": worst, "folds": folds}


def _l2_verdict(backend: BackendBase, prompts: Sequence[str], settings: FrontierSettings) -> L2Verdict:
    """Whether the L2 term is good enough, from one sample each of prompts all over their order, more of a few."""
    each = max(1, -(-VERDICT_SAMPLES // len(prompts)))
    chosen = [prompts[place] for place in spread(len(prompts), VERDICT_SAMPLES)]
    rows = [(prompt, number) for number in range(min(each, settings.samples)) for prompt in chosen][:VERDICT_SAMPLES]
    asked, numbers = zip(*rows, strict=True)
    images = Condition(asked).of_images(settings.seed, numbers)
    with torch.enable_grad():
        return l2_verdict(
            backend.map_for(asked), image_noise(backend, images), generator=generator_for(settings.seed, "l2 verdict")
        )


def _images(prompt: str, count: int, settings: FrontierSettings) -> Condition:
    """The images 0, 1, ... of a prompt, whatever the other prompts are."""
    return Condition((prompt,) * count).of_images(settings.seed, range(count))


def _scores(backend: BackendBase, rewards: RewardSum, prompt: str, noise: Tensor, settings: FrontierSettings) -> Tensor:
    """Rewards of the images of one prompt, float64 on the CPU."""
    parts = []
    for rows in slices(len(noise), settings.batch):
        part = noise[rows]
        prompts = [prompt] * len(part)
        condition = backend.encode(prompts).of_images(settings.seed, range(rows.start, rows.stop))
        images = backend.generate(part, condition, settings.steps)
        parts.append(rewards(images, prompts).double().cpu())
    return torch.cat(parts)
