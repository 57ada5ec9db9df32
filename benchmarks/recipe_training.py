"""How one recipe trains the miniature's hypernetwork: its settings, its map, its samples and its loss."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from earning import ascended, bounded, gradients, load, normal, rewards, split
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnkit.adapters import BUNDLED, load_trained
from hnkit.backend import BackendBase
from hnkit.loss import KLTerm, NoiseLoss
from hnkit.maps import Condition, ConditionedMap
from hnkit.scaled.digits.scenes import train_prompts, training_mixture
from hnkit.scaled.lora.twin import ZeroConv2d, ZeroLinear
from hnkit.training.optimize import WeightAverage, bounded_rows

SCORER = "the miniature's own"
REWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "light": lambda images: 105 * images.mean((1, 2, 3)),
    "redness": lambda images: 72 * (images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))),
    "ink on the left": lambda images: 25 * (images[..., :16].mean((1, 2, 3)) - images[..., 16:].mean((1, 2, 3))),
}
"""Rewards of images alone, scaled to the spread over the noise (2) that the miniature's own has within a sentence."""


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
        weigh_kinds: whether the kinds of sentences come in the proportions of the preset `long`, not as often as there
            are sentences of them.
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
    weigh_kinds: bool = False
    reward: str = SCORER


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
            slope = bounded(slope, self.recipe.bound)
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
    backend = gone_on(device) if recipe.bundled else started(recipe.rank or Recipe.rank, device, seed)
    backend = rewarded(backend, recipe.reward)
    steered, texts = Steered(recipe, backend), sentences(recipe)
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


def sentences(recipe: Recipe) -> list[str]:
    """The sentences that a recipe draws from, those that maps are measured on left out."""
    texts = split()[0]
    if not recipe.weigh_kinds:
        return texts
    allowed = set(texts)
    return [text for text in training_mixture() if text in allowed]


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
    return names, x, bounded(slope, recipe.bound) / recipe.alpha


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
