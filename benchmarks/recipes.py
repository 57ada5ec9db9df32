"""Training recipes of the miniature's hypernetwork beside each other, over seeds: tables of docs/earning.md.

    python benchmarks/recipes.py run --out runs/recipes                  # all, one and a half hours of one core
    python benchmarks/recipes.py run --only base --seeds 0 --out runs/recipes
    python benchmarks/recipes.py report --out runs/recipes               # docs/results/recipes.json

The sizes are those of one core: 160 steps of 32, 5,120 samples, for every recipe but the default's own and the long
one; of one seed all recipes see the same noises in the same order, unless it is these that they change. Every run
trains on all but 200 of the training sentences and is measured on 800 images of these, the same for all, by the
trained reward; neither the judge nor a held-out sentence has a part in it. Runs wait in a queue for `--workers`
processes; what a process has measured is kept when the time is over, and a second call does what is left.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from earning import ascended, gradients, load, normal, rewards, split
from recipe_figures import spread, summary
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnkit import ExpansiveMapError, Frontier, noise_kl
from hnkit.adapters import BUNDLED, load_trained
from hnkit.backend import BackendBase
from hnkit.internal.files import write_json
from hnkit.internal.stats import mean_and_stderr
from hnkit.internal.versions import versions
from hnkit.jacobian import dense_jacobian
from hnkit.kl.estimate import KLEstimate
from hnkit.loss import KLTerm, NoiseLoss
from hnkit.maps import Condition, ConditionedMap, NoiseMap
from hnkit.scaled.digits.scenes import train_prompts, training_mixture
from hnkit.scaled.lora.twin import ZeroConv2d, ZeroLinear
from hnkit.training.optimize import WeightAverage, bounded_rows

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "recipes.json"
IMAGES, OF_KL, OF_SPECTRUM, OF_FRONTIER = 800, 64, 48, 96
"""Images that a map is measured on; noises of them for E(J), for dense Jacobians; base images a sentence."""


SCORER = "the miniature's own"
REWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "light": lambda images: 105 * images.mean((1, 2, 3)),
    "redness": lambda images: 72 * (images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))),
    "ink on the left": lambda images: 25 * (images[..., :16].mean((1, 2, 3)) - images[..., 16:].mean((1, 2, 3))),
}
"""Rewards of images alone, scaled to the spread over the noise (2) that the miniature's own has within a sentence."""
SMOOTHED = (0.3, 0.5, 0.7, 0.9)
"""Correlations of two noises at which a yardstick correlates their rewards."""


@dataclass(frozen=True)
class Recipe:
    """A way to train f; the defaults are near those of `hnkit train --backend digits`, in fewer and smaller batches.

    Attributes:
        steps: optimiser steps.
        batch: samples of a step.
        alpha: temperature of the loss.
        lr: rate of the optimizer after 20 steps of warm-up.
        bound: bound on each sample's gradient of the reward in the noise.
        ema: decay of the average of the weights.
        rank: of LoRA; 0 trains all weights of a copy of the network.
        kl: the KL term.
        twice: whether the map is x + f(x) applied twice.
        hint: whether f is also given the bounded gradient of the reward at x, through a layer that starts at 0.
        noises: noises of each sentence in a batch.
        antithetic: whether half of the noises are the negatives of the others.
        fold_penalty: weight of the squared excess of the smallest eigenvalue of (J + J')/2 below -0.9.
        curved: one in so many rows of a batch is looked at for what depends on J (the rest of the KL term, the
            penalty): an unbiased estimate that costs less.
        objective: "loss", or regression of f on `grad r / alpha` at x, or on the proximal map of -r/alpha, found by
            five steps from it, bounded gradients both.
        pool: samples whose proximal map is found before the training, which draws its batches from them; 0: fresh ones.
        bundled: whether the training goes on from the adapter that comes with the miniature.
        measure_at: steps at which the map is measured besides the last.
        last_weights: whether the weights of the last step are measured too, not their average alone.
        optimizer: AdamW, or gradient descent with Nesterov's momentum of 0.9, as the method was published.
        difference: whether f is the network with LoRA less the network without, so that the last layer keeps its
            weights, instead of a network whose last layer has LoRA alone.
        reward: what is rewarded: the miniature's own, or another of `REWARDS`.
        mixture: whether the kinds of sentences come in the proportions of the presets, not as often as there are
            sentences of them.
        schedule: of the rate after its 20 steps of warm-up: constant, or half a cosine down to 0.
    """

    steps: int = 160
    batch: int = 32
    alpha: float = 0.25
    lr: float = 1e-3
    bound: float = 2.0
    ema: float = 0.99
    rank: int = 16
    kl: KLTerm = "l2"
    twice: bool = False
    hint: bool = False
    noises: int = 1
    antithetic: bool = False
    fold_penalty: float = 0.0
    curved: int = 4
    objective: Literal["loss", "gradient", "proximal map"] = "loss"
    pool: int = 0
    bundled: bool = False
    measure_at: tuple[int, ...] = ()
    last_weights: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    difference: bool = False
    mixture: bool = False
    reward: str = SCORER


BASE = Recipe()
DEFAULT = Recipe(steps=500, batch=64, alpha=0.15, measure_at=(250,), last_weights=True)
ON = Recipe(steps=60, bundled=True, mixture=True)
RECIPES: dict[str, Recipe] = {
    **{name: replace(BASE, reward=name, alpha=2.0) for name in REWARDS},
    "base": replace(BASE, steps=240, measure_at=(80, 160), last_weights=True),
    "default": replace(DEFAULT, mixture=True),
    "default, sentences as they come": DEFAULT,
    "default, no bound": replace(DEFAULT, bound=math.inf, last_weights=False),
    "3,000 steps, sentences as they come": Recipe(steps=3000, batch=64, measure_at=(500, 1000, 2000)),
    "given a gradient": replace(BASE, hint=True),
    "second-order": replace(BASE, kl="second-order"),
    "all weights": replace(BASE, rank=0, lr=3e-4),
    "the bundled adapter": replace(ON, steps=0),
    "the bundled adapter, gone on": ON,
    "the bundled adapter, gone on with a fold penalty": replace(ON, fold_penalty=1.0),
    "the bundled adapter, gone on with a fold penalty of 10": replace(ON, fold_penalty=10.0),
    "regression on the gradient": replace(BASE, objective="gradient"),
    "regression on the proximal map": replace(BASE, objective="proximal map", pool=1280),
    "eight noises a sentence": replace(BASE, noises=8),
    "no bound": replace(BASE, bound=math.inf),
    "Arnoldi": replace(BASE, kl="arnoldi"),
    "rank 64": replace(BASE, rank=64),
    "alpha 0.1": replace(BASE, alpha=0.1),
    "applied twice": replace(BASE, twice=True),
    "alpha 0.5": replace(BASE, alpha=0.5),
    "rate 3e-3": replace(BASE, lr=3e-3),
    "antithetic": replace(BASE, antithetic=True),
    "rank 4": replace(BASE, rank=4),
    "batch 8": replace(BASE, steps=640, batch=8),
    "batch 128": replace(BASE, steps=40, batch=128),
    "difference": replace(BASE, difference=True),
    "rate 3e-4": replace(BASE, lr=3e-4),
    "cosine": replace(BASE, schedule="cosine"),
    "momentum": replace(BASE, optimizer="sgd", lr=0.1),
    "exact": replace(BASE, kl="exact", curved=32),
}
SEEDS = (0, 1, 2)


class Steered(nn.Module):
    """The hypernetwork of a recipe: noise and condition to delta."""

    def __init__(self, recipe: Recipe, backend: BackendBase) -> None:
        super().__init__()
        network = backend.hypernetwork
        if recipe.rank == 0:  # the twin's weights are the generator's own: a copy of them is trained
            network.twin = copy.deepcopy(network.twin).requires_grad_(True)
        self.network, self.recipe, self.backend = network, recipe, backend
        self.start = [with_its_last_layer(network)] if recipe.difference else []  # in a list: it is not trained
        channels = backend.noise_shape[0]
        self.hint = nn.Conv2d(2 * channels, channels, 1, bias=False).to(backend.device) if recipe.hint else None
        if self.hint is not None:
            nn.init.zeros_(self.hint.weight)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """The delta, `(n, *noise_shape)`."""
        if self.hint is not None:
            # second derivatives, which a measurement needs, exist for attention in its plain form alone
            plain = sdpa_kernel(SDPBackend.MATH) if x.requires_grad else contextlib.nullcontext()
            with torch.enable_grad(), plain:
                leaf = x if x.requires_grad else x.detach().requires_grad_()
                value = rewards(self.backend, leaf, condition.prompts, condition).sum()
                (slope,) = torch.autograd.grad(value, leaf, create_graph=x.requires_grad)
            size = slope.flatten(1).norm(dim=1).clamp(min=1e-9)
            slope = slope * (self.recipe.bound / size).clamp(max=1)[:, None, None, None]
            # the gradient moves the input of the network and, by itself, the delta
            seen, direct = self.hint.weight.chunk(2, dim=1)
            delta = self.network(x + nn.functional.conv2d(slope, seen), condition)
            return delta + nn.functional.conv2d(slope, direct)
        delta = self.network(x, condition)
        for start in self.start:
            delta = delta - start(x, condition)
        if self.recipe.twice:
            delta = delta + self.network(x + delta, condition)
        return delta


def with_its_last_layer(network: Any) -> Any:
    """Give the twin of a network the weights of its last layer back; a copy of it all as it is, frozen, is returned."""
    network.twin = copy.deepcopy(network.twin)
    for layer in network.twin.modules():
        if isinstance(layer, (ZeroLinear, ZeroConv2d)):
            layer.__class__ = nn.Linear if isinstance(layer, ZeroLinear) else nn.Conv2d
    start = copy.copy(network)
    start._modules = {**network._modules, "twin": copy.deepcopy(network.twin).requires_grad_(False)}
    return start


@dataclass(frozen=True)
class Losses:
    """The L2 loss of a whole batch, and the loss whose KL term a part of it is looked at for; each tries a map once."""

    l2: NoiseLoss
    kl: NoiseLoss


@functools.cache
def loaded(rank: int, device: str) -> BackendBase:
    """The miniature with a LoRA of a rank, one for all runs of a process."""
    return load(device=device, rank=rank, lora_alpha=2.0 * rank)


@torch.no_grad()
def started(rank: int, device: str, seed: int) -> BackendBase:
    """The miniature with its LoRA as `make_twin` starts it: A normal with deviation 1 / rank, B zero."""
    backend = copy.copy(loaded(rank, device))
    backend.hypernetwork = copy.copy(backend.hypernetwork)
    backend.hypernetwork._modules = dict(backend.hypernetwork._modules)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in backend.hypernetwork.named_parameters():
        if parameter.requires_grad and "lora_A" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / rank)
        elif parameter.requires_grad:
            parameter.zero_()
    return backend


def trained(recipe: Recipe, seed: int, device: str) -> Iterator[tuple[int, bool, Steered]]:
    """Train, and give step, whether the weights are averaged, and the map each time it is to be measured."""
    backend = gone_on(device) if recipe.bundled else started(recipe.rank or BASE.rank, device, seed)
    backend = rewarded(backend, recipe.reward)
    steered, texts = Steered(recipe, backend), split()[0]
    if recipe.mixture:
        allowed = set(texts)
        texts = [text for text in training_mixture() if text in allowed]
    parameters = steered.trained()
    average = WeightAverage(parameters, recipe.ema)
    optimizer = optimizer_of(recipe, list(parameters.values()))
    losses = Losses(NoiseLoss(alpha=recipe.alpha), NoiseLoss(kl=recipe.kl, alpha=recipe.alpha))
    draw, probes = (torch.Generator().manual_seed(start + seed) for start in (1000, 2000))
    pool = pooled(recipe, backend, texts, draw) if recipe.pool else None
    if recipe.steps == 0:
        yield 0, True, steered
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate(recipe, step)
        if recipe.objective == "loss":
            names, x = drawn(recipe, recipe.batch, backend, texts, draw)
            value = objective(recipe, losses, steered, backend.encode(names), x, probes)
        else:
            names, x, target = pool(step) if pool else regressed(recipe, recipe.batch, backend, texts, draw)
            value = (steered(x, backend.encode(names)) - target).flatten(1).square().sum(1).mean() / 2
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        average.update()
        if step + 1 in (*recipe.measure_at, recipe.steps):
            with average.applied():
                yield step + 1, True, steered
    if recipe.last_weights:
        yield recipe.steps, False, steered


def optimizer_of(recipe: Recipe, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW without decay, or gradient descent with Nesterov's momentum."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)


def rate(recipe: Recipe, step: int) -> float:
    """The share of the rate that a step takes."""
    left = (1 + math.cos(math.pi * step / recipe.steps)) / 2 if recipe.schedule == "cosine" else 1.0
    return left * min(1, (step + 1) / 20)


def regressed(
    recipe: Recipe, rows: int, backend: BackendBase, texts: Sequence[str], draw: torch.Generator
) -> tuple[list[str], Tensor, Tensor]:
    """Sentences, noises, and what f is to be at them."""
    names, x = drawn(recipe, rows, backend, texts, draw)
    if recipe.objective == "proximal map":
        return names, x, ascended(backend, x, names, recipe.alpha, 5, recipe.bound) - x
    slope = gradients(backend, x, names)[1]
    size = slope.flatten(1).norm(dim=1).clamp(min=1e-9)
    return names, x, slope * (recipe.bound / size).clamp(max=1)[:, None, None, None] / recipe.alpha


def pooled(
    recipe: Recipe, backend: BackendBase, texts: Sequence[str], draw: torch.Generator
) -> Callable[[int], tuple[list[str], Tensor, Tensor]]:
    """Batches of a step, from a pool that is gone through in a new order each time."""
    parts = [regressed(recipe, recipe.batch, backend, texts, draw) for _ in range(recipe.pool // recipe.batch)]
    names = [name for part in parts for name in part[0]]
    x, target = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    times = -(-recipe.steps * recipe.batch // recipe.pool)
    order = torch.cat([torch.randperm(recipe.pool, generator=draw) for _ in range(times)])

    def batch(step: int) -> tuple[list[str], Tensor, Tensor]:
        rows = order[step * recipe.batch : (step + 1) * recipe.batch]
        return [names[row] for row in rows.tolist()], x[rows], target[rows]

    return batch


def gone_on(device: str) -> BackendBase:
    """The miniature with its adapter, to be trained further."""
    backend, _ = load_trained("digits", BUNDLED, [f"backend.device={device}"])
    backend.prepare(train_prompts())
    for name, parameter in backend.hypernetwork.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return backend


def drawn(
    recipe: Recipe, rows: int, backend: BackendBase, texts: Sequence[str], draw: torch.Generator
) -> tuple[list[str], Tensor]:
    """Sentences and noises of a step."""
    each = 2 if recipe.antithetic else recipe.noises
    some = [texts[i] for i in torch.randint(len(texts), (rows // each,), generator=draw).tolist()]
    names = [name for name in some for _ in range(each)]
    x = normal(backend, rows, draw)
    if recipe.antithetic:
        x[1::2] = -x[::2]
    return names, x


def objective(
    recipe: Recipe, losses: Losses, steered: Steered, condition: Condition, x: Tensor, probes: torch.Generator
) -> Tensor:
    """The mean loss of a batch; what depends on the Jacobian is taken on its first rows (see `Recipe.curved`)."""
    backend = steered.backend

    def generate(x_hat: Tensor) -> Tensor:
        if math.isfinite(recipe.bound):  # what arrives is the gradient of -r / (alpha rows)
            x_hat = bounded_rows(x_hat, recipe.bound / (recipe.alpha * len(x)))
        return backend.generate(x_hat, condition)

    def reward(images: Tensor) -> Tensor:
        return backend.default_reward(images, condition.prompts)

    value = losses.l2(ConditionedMap(steered, condition), x, generate, reward).total.mean()
    rows = len(x) // recipe.curved
    few = ConditionedMap(steered, backend.encode(condition.prompts[:rows]))
    if recipe.kl != "l2":
        terms = losses.kl(few, x[:rows], lambda moved: moved, lambda moved: moved.new_zeros(rows), generator=probes)
        value = value + (terms.kl - (terms.x_hat - x[:rows]).flatten(1).square().sum(1) / 2).mean()
    if recipe.fold_penalty:
        lowest = smallest_eigenvalue(few, x[:rows], probes)
        value = value + recipe.fold_penalty * (-0.9 - lowest).clamp(min=0).square().mean()
    return value


def smallest_eigenvalue(f: Callable[[Tensor], Tensor], x: Tensor, draw: torch.Generator, iterations: int = 4) -> Tensor:
    """The Rayleigh quotient of (J + J')/2 at the vector of a few steps of the shifted power iteration; from above."""

    def product(v: Tensor, *, keep: bool) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            leaf = x.detach().requires_grad_()
            out = f(leaf)
            cotangent = v.clone().requires_grad_()
            (back,) = torch.autograd.grad((out * cotangent).sum(), leaf, create_graph=True)
            (forth,) = torch.autograd.grad((back * v).sum(), cotangent, create_graph=keep)
        return (back + forth) / 2

    v = torch.randn(x.shape, generator=draw).to(x.device)
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        v = 2 * v - product(v, keep=False).detach()
    v = v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (v * product(v, keep=True)).flatten(1).sum(1)


def rewarded(backend: BackendBase, name: str) -> BackendBase:
    """The backend, with another reward than its own."""
    if name == SCORER:
        return backend
    backend = copy.copy(backend)
    backend.default_reward = lambda images, _: REWARDS[name](images)
    return backend


@dataclass(frozen=True)
class Yardstick:
    """What every map is measured on: sentences, noises, base rewards of these, and the frontier of the sentences."""

    texts: list[str]
    x: Tensor
    base: Tensor
    frontier: Frontier


@functools.cache
def yardstick(device: str, out: Path, reward: str) -> Yardstick:
    """The yardstick; its base rewards are made once and kept beside the runs."""
    backend, sentences = rewarded(load(device=device), reward), split()[1]
    texts = [sentences[i % len(sentences)] for i in range(IMAGES)]
    x, kept = normal(backend, IMAGES, torch.Generator().manual_seed(77)), out / f"{base_of(reward)}.pt"
    if not kept.exists():
        draw = torch.Generator().manual_seed(3)
        pool = torch.stack([scored(backend, normal(backend, OF_FRONTIER, draw), [t] * OF_FRONTIER) for t in sentences])
        torch.save({"base": scored(backend, x, texts), "pool": pool}, kept)
    found = torch.load(kept)
    if "smoothness" not in found:
        draw = torch.Generator().manual_seed(4)
        again = {
            s: scored(backend, s * x + math.sqrt(1 - s**2) * normal(backend, IMAGES, draw), texts) for s in SMOOTHED
        }
        found["smoothness"] = {s: correlation(found["base"], other, found["pool"]) for s, other in again.items()}
        torch.save(found, kept)
    return Yardstick(texts, x, found["base"], Frontier(list(found["pool"])))


def base_of(reward: str) -> str:
    """Name of the file of a reward's yardstick."""
    return "base" if reward == SCORER else f"base-{reward.replace(' ', '-')}"


def correlation(one: Tensor, other: Tensor, pool: Tensor) -> tuple[float, float]:
    """Correlation, within sentences, of the rewards of two noises; its error is the jackknife's over sentences.

    Means and variances are those of the pool, `(sentences, n)`; `one` and `other` go through the sentences in turn.
    """
    mean, variance = pool.mean(1), pool.var(1)
    product = of_sentences((one - mean.repeat(len(one) // len(mean))) * (other - mean.repeat(len(other) // len(mean))))
    left = (product.sum() - product) / (variance.sum() - variance)
    spread = (len(left) - 1) / len(left) * (left - left.mean()).square().sum()
    return float(product.sum() / variance.sum()), math.sqrt(float(spread))


@torch.no_grad()
def scored(backend: BackendBase, x: Tensor, texts: Sequence[str]) -> Tensor:
    """Rewards of noises."""
    parts = [slice(start, start + 32) for start in range(0, len(x), 32)]
    return torch.cat([rewards(backend, x[part], texts[part]) for part in parts]).double().cpu()


def of_sentences(values: Tensor) -> Tensor:
    """Means over the images of each sentence."""
    return values.double().reshape(-1, len(split()[1])).mean(0)


@torch.no_grad()
def figures(steered: Steered, yard: Yardstick, *, spectrum: bool) -> dict[str, Any]:
    """What a map earns: gain and L2 term of each sentence, E(J) at some noises, folds; with errors over sentences.

    E(J) is by `method="low-rank"`, whose own error is far below that of so few noises.
    """
    backend, deltas = steered.backend, []
    for start in range(0, IMAGES, 32):
        texts = yard.texts[start : start + 32]
        deltas.append(steered(yard.x[start : start + 32], backend.encode(texts)))
    delta = torch.cat(deltas)
    gains = of_sentences(scored(backend, yard.x + delta, yard.texts) - yard.base)
    squares = (delta.double().flatten(1).square().sum(1) / 2).cpu()
    # with a gradient as input products are of second derivatives of the reward, and the remainder of any rank expansive
    few = OF_KL // 8 if steered.hint is not None else OF_KL
    f = ConditionedMap(steered, backend.encode(yard.texts[:few]))
    kl = integrand(f, yard.x[:few], ranks=() if steered.hint is not None else (16, 48))
    # the L2 term is known from all images, so that only the rest is taken from the few
    error = (kl.per_sample - squares[:few].to(kl.per_sample.device)).cpu()
    l2, rest = mean_and_stderr(of_sentences(squares)), mean_and_stderr(error)
    nats = (l2[0] + rest[0], math.hypot(l2[1], rest[1]))
    found = {
        "gain": mean_and_stderr(gains), "l2": l2, "kl": nats, "efficiency": None,
        "folds": [kl.folds.negative if kl.folds else None, few],
        "norm": None if math.isnan(kl.local_norm) else kl.local_norm,
        "gains": rounded(gains), "squares": rounded(of_sentences(squares)), "errors": rounded(error),
    }  # fmt: skip
    if nats[0] > 0 and yard.frontier.carries(nats[0]):
        share = yard.frontier.efficiency_estimate(gains, *nats)
        found["efficiency"] = (share.value, share.stderr)
        found["bought"] = yard.frontier.point(nats[0]).gain
    if spectrum:
        with torch.enable_grad():
            some = ConditionedMap(steered, backend.encode(yard.texts[:OF_SPECTRUM]))
            J = dense_jacobian(some, yard.x[:OF_SPECTRUM]).double()
        found["lowest"] = rounded(torch.linalg.eigvalsh((J + J.mT) / 2)[:, 0])
    return found


def integrand(f: NoiseMap, x: Tensor, ranks: Sequence[int]) -> KLEstimate:
    """The KL integrand, with more rank where the remainder of a low one is expansive, and then exact."""
    with torch.enable_grad():
        for rank in ranks:
            try:
                return noise_kl(f, x, method="low-rank", rank=rank, generator=torch.Generator().manual_seed(5))
            except ExpansiveMapError:
                continue
        return noise_kl(f, x, method="exact")


def rounded(values: Tensor) -> list[float]:
    """Values for a file."""
    return [round(value, 6) for value in values.tolist()]


def job(name: str, seed: int, device: str, out: Path) -> None:
    """Train one recipe with one seed and append what is measured to the file of that run."""
    recipe, spent = RECIPES[name], 0.0
    yard = yardstick(device, out, recipe.reward)
    torch.manual_seed(seed)
    began = time.perf_counter()
    for step, averaged, steered in trained(recipe, seed, device):
        spent += time.perf_counter() - began
        found = figures(steered, yard, spectrum=recipe.bundled)
        record = {"recipe": name, "seed": seed, "step": step, "averaged": averaged, "seconds": spent, "device": device}
        with (out / f"{name.replace(' ', '-')}.{seed}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, **found, "settings": asdict(recipe)}) + "\n")
        began = time.perf_counter()
    (out / f"{name.replace(' ', '-')}.{seed}.done").touch()


def worker(queue: multiprocessing.Queue[tuple[str, int] | None], device: str, out: Path) -> None:
    """Take runs from the queue until it is empty; one that fails is recorded and is no end of the others."""
    torch.set_num_threads(1)
    while (item := queue.get()) is not None:
        try:
            job(*item, device, out)
        except Exception as error:  # noqa: BLE001, recorded
            with (out / "failed.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"recipe": item[0], "seed": item[1], "error": repr(error)}) + "\n")


def run(names: Sequence[str], seeds: Sequence[int], device: str, workers: int, seconds: float, out: Path) -> None:
    """Start the workers on what is not done yet, and stop them when the time is over."""
    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    # all recipes of one seed before the next seed's
    wanted = [(name, seed) for seed in seeds for name in names]
    for name, seed in wanted:
        if not (out / f"{name.replace(' ', '-')}.{seed}.done").exists():
            (out / f"{name.replace(' ', '-')}.{seed}.jsonl").unlink(missing_ok=True)
            queue.put((name, seed))
    for _ in range(workers):
        queue.put(None)
    processes = [context.Process(target=worker, args=(queue, device, out), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(None if math.isinf(end) else max(0.0, end - time.monotonic()))
    for process in processes:
        process.terminate()


def report(out: Path) -> None:
    """Everything measured so far, as docs/results/recipes.json."""
    records = [json.loads(line) for path in sorted(out.glob("*.jsonl")) if path.name != "failed.jsonl"
               for line in path.read_text(encoding="utf-8").splitlines()]  # fmt: skip
    rows, smooth, sentences = [], {}, 0
    for reward in (SCORER, *REWARDS):
        if not (out / f"{base_of(reward)}.pt").exists():
            continue
        yard = torch.load(out / f"{base_of(reward)}.pt")
        frontier, sentences = Frontier(list(yard["pool"])), len(yard["pool"])
        # records of runs from before there were several say nothing
        mine = [record for record in records if record["settings"].get("reward", SCORER) == reward]
        rows += summary(mine, frontier)
        smooth[reward] = {f"{s:g}": value for s, value in yard.get("smoothness", {}).items()}
        if reward == SCORER:
            spreads = spread(mine, frontier)
    rows.sort(key=lambda row: (list(RECIPES).index(row["recipe"]), row["step"], not row["averaged"]))
    document = {"rows": rows, "spread": spreads, "smoothness": smooth, "images": IMAGES, "sentences": sentences}
    write_json(OUT, {**document, "versions": versions()})


def main() -> None:
    """Parse the command line and run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--only", action="append", choices=list(RECIPES), help="recipes; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    arguments = parser.parse_args()
    if arguments.what == "report":
        report(arguments.out)
        return
    names = arguments.only or list(RECIPES)
    run(names, arguments.seeds, arguments.device, arguments.workers, arguments.seconds, arguments.out)


if __name__ == "__main__":
    main()
