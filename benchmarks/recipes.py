"""Training recipes of the miniature's hypernetwork beside each other, over seeds: tables of docs/earning.md.

    python benchmarks/recipes.py run --device cuda --workers 6 --seconds 300 --out runs/recipes
    python benchmarks/recipes.py run --only "default" --seeds 0 --out runs/recipes       # one, where there is no card
    python benchmarks/recipes.py report --out runs/recipes         # docs/results/recipes.json

Every run trains on all but 200 of the training sentences and is measured on 800 images of these by the trained reward;
neither the judge nor a held-out sentence has a part in it. Runs wait in a queue for `--workers` processes; what a
process has measured is kept when the time is over, and a second call does what is left.
"""

from __future__ import annotations

import argparse
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
from earning import ascended, base_frontier, load, measured, normal, rewards, split
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnkit import Frontier
from hnkit.backend import BackendBase
from hnkit.internal.files import write_json
from hnkit.internal.versions import versions
from hnkit.loss import KLTerm, NoiseLoss
from hnkit.maps import Condition, ConditionedMap
from hnkit.training.optimize import WeightAverage, bounded_rows

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "recipes.json"
SCALES = (1.0, 1.5)


@dataclass(frozen=True)
class Recipe:
    """A way to train f; the defaults are those of `hnkit train --backend digits`, in larger batches.

    Attributes:
        steps: optimiser steps.
        batch: samples of a step.
        alpha: temperature of the loss.
        lr: rate of AdamW, constant after 20 steps.
        bound: bound on each sample's gradient of the reward in the noise.
        ema: decay of the average of the weights.
        rank: of LoRA; 0 trains all weights of a copy of the network.
        kl: the KL term.
        twice: whether the map is x + f(x) applied twice.
        hint: whether f is also given the bounded gradient of the reward at x, through a layer that starts at 0.
        noises: noises of each sentence in a batch.
        antithetic: whether half of the noises are the negatives of the others.
        least_correlation: of the noise that the gradient is taken at with x_hat: `s x_hat + sqrt(1 - s^2) z`, s
            uniform between it and 1.
        fold_penalty: weight of the squared excess of the smallest eigenvalue of (J + J')/2 below -0.9.
        objective: "loss", or regression of f on the proximal map of -r/alpha, found by five gradient steps.
        measure_at: steps at which the map is measured besides the last.
    """

    steps: int = 400
    batch: int = 512
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
    least_correlation: float = 1.0
    fold_penalty: float = 0.0
    objective: Literal["loss", "proximal map"] = "loss"
    measure_at: tuple[int, ...] = ()


BASE = Recipe()
LONG = Recipe(steps=6400, measure_at=(400, 800, 1600, 3200))
RECIPES: dict[str, Recipe] = {
    "default": Recipe(steps=500, batch=64, alpha=0.15),
    "long": LONG,
    "long, all weights": replace(LONG, rank=0, lr=3e-4),
    "long, rank 64": replace(LONG, rank=64),
    "base": BASE,
    "all weights": replace(BASE, rank=0, lr=3e-4),
    "rank 4": replace(BASE, rank=4),
    "rank 64": replace(BASE, rank=64),
    "applied twice": replace(BASE, twice=True),
    "given a gradient": replace(BASE, hint=True),
    "smoothed generator": replace(BASE, least_correlation=0.85),
    "regression on the proximal map": replace(BASE, objective="proximal map"),
    "second-order": replace(BASE, kl="second-order"),
    "Arnoldi": replace(BASE, kl="arnoldi"),
    "fold penalty": replace(BASE, fold_penalty=1.0),
    "no bound": replace(BASE, bound=math.inf),
    "bound 1": replace(BASE, bound=1.0),
    "bound 4": replace(BASE, bound=4.0),
    "alpha 0.1": replace(BASE, alpha=0.1),
    "alpha 0.5": replace(BASE, alpha=0.5),
    "rate 3e-4": replace(BASE, lr=3e-4),
    "rate 3e-3": replace(BASE, lr=3e-3),
    "no average": replace(BASE, ema=0.0),
    "eight noises a sentence": replace(BASE, noises=8),
    "antithetic": replace(BASE, antithetic=True),
    "batch 64": replace(BASE, batch=64),
    "batch 2048": replace(BASE, batch=2048),
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
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
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
        if self.recipe.twice:
            delta = delta + self.network(x + delta, condition)
        return delta


@functools.cache
def loaded(rank: int, device: str) -> BackendBase:
    """The miniature with a LoRA of a rank, one for all runs of a process."""
    return load(device=device, rank=rank, lora_alpha=2.0 * rank)


@torch.no_grad()
def started(rank: int, device: str, seed: int) -> BackendBase:
    """The miniature with its LoRA as peft starts it: A uniform by Kaiming's rule, B zero."""
    backend = copy.copy(loaded(rank, device))
    backend.hypernetwork = copy.copy(backend.hypernetwork)
    backend.hypernetwork._modules = dict(backend.hypernetwork._modules)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in backend.hypernetwork.named_parameters():
        if parameter.requires_grad and "lora_A" in name:
            bound = 1 / math.sqrt(parameter[0].numel())
            parameter.copy_((2 * torch.rand(parameter.shape, generator=draw) - 1) * bound)
        elif parameter.requires_grad:
            parameter.zero_()
    return backend


def trained(recipe: Recipe, seed: int, device: str) -> Iterator[tuple[int, Steered]]:
    """Train, and give the map, with its averaged weights, at each step at which it is to be measured."""
    backend = started(recipe.rank or BASE.rank, device, seed)
    steered, texts = Steered(recipe, backend), split()[0]
    parameters = steered.trained()
    average = WeightAverage(parameters, recipe.ema)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=recipe.lr, weight_decay=0.0)
    loss = NoiseLoss(kl=recipe.kl, alpha=recipe.alpha)
    draw = torch.Generator().manual_seed(1000 + seed)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1, (step + 1) / 20)
        names, x = drawn(recipe, backend, texts, draw)
        condition = backend.encode(names)
        if recipe.objective == "proximal map":
            target = ascended(backend, x, names, recipe.alpha, 5, recipe.bound) - x
            value = (steered(x, condition) - target).flatten(1).square().sum(1).mean() / 2
        else:
            value = objective(recipe, loss, steered, condition, x, draw)
        optimizer.zero_grad()
        (value * recipe.alpha).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        average.update()
        if step + 1 in (*recipe.measure_at, recipe.steps):
            with average.applied():
                yield step + 1, steered


def drawn(
    recipe: Recipe, backend: BackendBase, texts: Sequence[str], draw: torch.Generator
) -> tuple[list[str], Tensor]:
    """Sentences and noises of a step."""
    rows = recipe.batch
    each = 2 if recipe.antithetic else recipe.noises
    some = [texts[i] for i in torch.randint(len(texts), (rows // each,), generator=draw).tolist()]
    names = [name for name in some for _ in range(each)]
    x = normal(backend, rows, draw)
    if recipe.antithetic:
        x[1::2] = -x[::2]
    return names, x


def objective(
    recipe: Recipe, loss: NoiseLoss, steered: Steered, condition: Condition, x: Tensor, draw: torch.Generator
) -> Tensor:
    """The mean loss of a batch."""
    backend = steered.backend

    def generate(x_hat: Tensor) -> Tensor:
        if math.isfinite(recipe.bound):
            x_hat = bounded_rows(x_hat, recipe.bound)
        if recipe.least_correlation < 1:
            least = recipe.least_correlation
            s = least + (1 - least) * torch.rand(len(x), 1, 1, 1, generator=draw).to(x.device)
            x_hat = s * x_hat + (1 - s * s).sqrt() * normal(backend, len(x), draw)
        return backend.generate(x_hat, condition)

    f = ConditionedMap(steered, condition)
    terms = loss(f, x, generate, lambda images: backend.default_reward(images, condition.prompts), generator=draw)
    value = terms.total.mean()
    if recipe.fold_penalty:
        lowest = smallest_eigenvalue(f, x, draw)
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


@functools.cache
def frontier(device: str) -> Frontier:
    """The frontier of the sentences that recipes are measured on."""
    return base_frontier(load(device=device))


def job(name: str, seed: int, device: str, out: Path) -> None:
    """Train one recipe with one seed and append what is measured to the file of that run."""
    recipe, bought, started = RECIPES[name], frontier(device), time.perf_counter()
    torch.manual_seed(seed)
    for step, steered in trained(recipe, seed, device):
        spent = time.perf_counter() - started
        many = 64 if device.startswith("cuda") else 32
        figures = {
            str(scale): measured(steered.backend, scale, steered, kl_samples=many, frontier=bought) for scale in SCALES
        }
        record = {"recipe": name, "seed": seed, "step": step, "seconds": spent, "device": device, "scales": figures}
        with (out / f"{name.replace(' ', '-')}.{seed}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "settings": asdict(recipe)}) + "\n")
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
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        process.terminate()


def report(out: Path) -> None:
    """Everything measured so far, as docs/results/recipes.json."""
    records = [json.loads(line) for path in sorted(out.glob("*.jsonl")) if path.name != "failed.jsonl"
               for line in path.read_text(encoding="utf-8").splitlines()]  # fmt: skip
    write_json(OUT, {"records": records, "versions": versions()})


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
