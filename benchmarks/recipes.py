"""Training recipes of the miniature's hypernetwork beside each other, over seeds: tables of docs/earning.md.

    python benchmarks/recipes.py run --out runs/recipes                  # all, one and a half hours of one core
    python benchmarks/recipes.py run --only base --seeds 0 --out runs/recipes
    python benchmarks/recipes.py checkpoint --of RUN/checkpoints/step-00004000 --out runs/recipes   # of the preset long
    python benchmarks/recipes.py report --out runs/recipes               # docs/results/recipes.json

The sizes are those of one core: 160 steps of 32, 5,120 samples, for every recipe but the default's own and the long
one; of one seed all recipes see the same noises in the same order, unless it is these that they change. Every run
trains on all but 200 of the training sentences and is measured on 800 images of these, the same for all, by the
trained reward; neither the judge nor a held-out sentence has a part in it. Runs wait in a queue for `--workers`
processes; what a process has measured is kept when the time is over, and a second call does what is left.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from earning import load, normal, rewards, split
from recipe_figures import by_kind, spread, summary
from recipe_training import REWARDS, SCORER, Recipe, Steered, rewarded, started, trained
from torch import Tensor

from hnkit import ExpansiveMapError, Frontier, noise_kl
from hnkit.backend import BackendBase
from hnkit.internal.files import write_json
from hnkit.internal.stats import mean_and_stderr
from hnkit.internal.versions import versions
from hnkit.jacobian import dense_jacobian
from hnkit.kl.estimate import KLEstimate
from hnkit.maps import ConditionedMap, NoiseMap
from hnkit.scaled.digits.scenes import validate_prompt
from hnkit.training.checkpoint import load_checkpoint
from hnkit.training.optimize import load_parameters

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "recipes.json"
IMAGES, OF_KL, OF_SPECTRUM, OF_FRONTIER = 800, 64, 48, 96
"""Images that a map is measured on; noises of them for E(J), for dense Jacobians; base images a sentence."""


SMOOTHED = (0.3, 0.5, 0.7, 0.9)
"""Correlations of two noises at which a yardstick correlates their rewards."""


BASE = Recipe()
DEFAULT = Recipe(steps=500, batch=64, alpha=0.15, measure_at=(250,), last_weights=True)
ON = Recipe(steps=60, bundled=True, weigh_kinds=True, alpha=0.3)
RECIPES: dict[str, Recipe] = {
    **{name: replace(BASE, reward=name, alpha=2.0) for name in REWARDS},
    "base": replace(BASE, steps=240, measure_at=(80, 160), last_weights=True),
    "default": DEFAULT,
    "default, kinds weighed": replace(DEFAULT, weigh_kinds=True),
    "default, no bound": replace(DEFAULT, bound=math.inf, last_weights=False),
    "3,000 steps": Recipe(steps=3000, batch=64, measure_at=(500, 1000, 2000)),
    "given a gradient": replace(BASE, hint=True),
    "second-order": replace(BASE, kl="second-order"),
    "all weights": replace(BASE, rank=0, lr=3e-4),
    "the bundled adapter": replace(ON, steps=0),
    "the bundled adapter, gone on": ON,
    "the bundled adapter, gone on with a fold penalty": replace(ON, fold_penalty=1.0),
    "the bundled adapter, gone on with a fold penalty of 10": replace(ON, fold_penalty=10.0),
    "the bundled adapter, gone on with second-order": replace(ON, kl="second-order"),
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
TRAINING = "the bundled adapter's training"
"""What rows of its checkpoints are called."""
KINDS_OF = ("default", "default, kinds weighed", "3,000 steps", "the bundled adapter")
"""Recipes whose gains are told apart by kind of sentence."""
COMMON = ("attribution", "position")
"""Kinds of which there are enough among the sentences that maps are measured on."""


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


def groups() -> list[str]:
    """Kind of each sentence that maps are measured on; those that are rare there together."""
    kinds = [validate_prompt(text).kind for text in split()[1]]
    return [kind if kind in COMMON else "the other four" for kind in kinds]


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


def append(file: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of JSON lines."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


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
        append(out / f"{name.replace(' ', '-')}.{seed}.jsonl", {**record, **found, "settings": asdict(recipe)})
        began = time.perf_counter()
    (out / f"{name.replace(' ', '-')}.{seed}.done").touch()


def measure_checkpoint(checkpoint: Path, device: str, out: Path) -> None:
    """Append what the average of a checkpoint's weights earns to the file of the bundled adapter's training."""
    found = load_checkpoint(checkpoint)
    backend = started(Recipe.rank, device, 0)
    steered, prefix = Steered(ON, backend), "average/"
    load_parameters(
        {name.removeprefix("network."): value for name, value in steered.trained().items()},
        {name.removeprefix(prefix): value for name, value in found.tensors.items() if name.startswith(prefix)},
    )
    record = {"recipe": TRAINING, "seed": found.state["config"]["train"]["seed"], "step": found.step, "averaged": True}
    settings = asdict(replace(ON, batch=found.state["config"]["train"]["batch"]))
    measured = figures(steered, yardstick(device, out, SCORER), spectrum=False)
    append(out / f"{TRAINING.replace(' ', '-')}.jsonl", {**record, "seconds": 0.0, **measured, "settings": settings})


def worker(queue: multiprocessing.Queue[tuple[str, int] | None], device: str, out: Path) -> None:
    """Take runs from the queue until it is empty; one that fails is recorded and is no end of the others."""
    torch.set_num_threads(1)
    while (item := queue.get()) is not None:
        try:
            job(*item, device, out)
        except Exception as error:  # noqa: BLE001, recorded
            append(out / "failed.jsonl", {"recipe": item[0], "seed": item[1], "error": repr(error)})


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
    """Everything measured so far, as docs/results/recipes.json; what `out` knows nothing of stays as it is there."""
    records = [json.loads(line) for path in sorted(out.glob("*.jsonl")) if path.name != "failed.jsonl"
               for line in path.read_text(encoding="utf-8").splitlines()]  # fmt: skip
    before = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    rows, smooth, spreads, kinds = [], before.get("smoothness", {}), before.get("spread"), []
    for reward in (SCORER, *REWARDS):
        if not (out / f"{base_of(reward)}.pt").exists():
            continue
        yard = torch.load(out / f"{base_of(reward)}.pt")
        frontier = Frontier(list(yard["pool"]))
        # records of runs from before there were several say nothing
        mine = [record for record in records if record["settings"].get("reward", SCORER) == reward]
        rows += summary(mine, frontier)
        smooth[reward] = {f"{s:g}": value for s, value in yard.get("smoothness", {}).items()}
        if reward == SCORER:
            spreads = spread(mine, frontier) or spreads
            told_apart = [record for name in KINDS_OF for record in mine if record["recipe"] == name]
            kinds = by_kind(told_apart, groups())
    order = [*RECIPES, TRAINING]
    rows = kept(before.get("rows", []), rows) + rows
    kinds = sorted(kept(before.get("kinds", []), kinds) + kinds, key=lambda row: KINDS_OF.index(row["recipe"]))
    rows.sort(key=lambda row: (order.index(row["recipe"]), row["step"], not row["averaged"]))
    document = {"rows": rows, "spread": spreads, "kinds": kinds, "smoothness": smooth}
    document |= {"images": IMAGES, "sentences": len(split()[1])}
    write_json(OUT, {**document, "versions": versions()})


def kept(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier report, of recipes that have none now."""
    measured = {row["recipe"] for row in now}
    return [row for row in before if row["recipe"] in RECIPES.keys() | {TRAINING} and row["recipe"] not in measured]


def main() -> None:
    """Parse the command line and run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "checkpoint", "report"])
    parser.add_argument("--only", action="append", choices=list(RECIPES), help="recipes; all by default")
    parser.add_argument("--of", type=Path, help="a checkpoint")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    arguments = parser.parse_args()
    if arguments.what == "report":
        report(arguments.out)
        return
    if arguments.what == "checkpoint":
        measure_checkpoint(arguments.of, arguments.device, arguments.out)
        return
    names = arguments.only or list(RECIPES)
    run(names, arguments.seeds, arguments.device, arguments.workers, arguments.seconds, arguments.out)


if __name__ == "__main__":
    main()
