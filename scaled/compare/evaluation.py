"""Running a method over prompts and seeds, paired and resumable: every finished chunk is on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.backend import Backend, completed, image_noise
from hnkit.internal.files import read_sealed, write_sealed
from hnkit.internal.seeds import image_seed
from hnkit.internal.workers import ALONE, Workers, shared_out
from hnkit.maps import Condition, slices
from hnkit.rewards import RewardSum
from hnkit.scaled.compare.baselines import Cost, Method, Outcome

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One image: what it was asked for, from which noise, every score of it, and the rewards of its candidates."""

    prompt: str
    seed: int
    category: str
    scores: Mapping[str, float]
    pool: Sequence[float] = ()


@dataclass(frozen=True)
class Evaluation:
    """A method on a set of prompts and seeds: the images' scores and the cost of making them."""

    method: str
    steps: int
    rows: tuple[Row, ...]
    cost: Cost


@dataclass(frozen=True)
class Scorer:
    """Every score of an image: the trained reward and its parts, held-out rewards, the independent judge."""

    rewards: RewardSum
    heldout: RewardSum
    judge: Callable[[Tensor, Sequence[str]], Tensor] | None

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Name -> `(n,)`; `reward` is the weighted sum that training maximises, `judge` what nothing maximises."""
        trained = self.rewards.scores(images, prompts)
        scores = {"reward": trained.total}
        if len(self.rewards.names) > 1:
            scores |= trained.parts
        if self.heldout.rewards:
            scores |= self.heldout.scores(images, prompts).parts
        if self.judge is not None:
            scores["judge"] = self.judge(images, prompts)
        return {name: values.double().cpu() for name, values in scores.items()}


def image_seeds(seed: int, prompts: Sequence[str], index: int) -> list[int]:
    """The seeds of image number `index` of each prompt: the same for every method, step count, batch and prompt set."""
    return [image_seed(seed, prompt, index) for prompt in prompts]


def category_of(backend: Backend, prompt: str) -> str:
    """The backend's category of a prompt (GenEval's six kinds, say), or nothing."""
    category = completed(backend).category
    return "" if category is None else category(prompt)


def evaluate(
    name: str,
    method: Method,
    backend: Backend,
    prompts: Sequence[str],
    scorer: Scorer,
    *,
    seeds: int,
    steps: int,
    batch: int,
    seed: int,
    folder: Path,
    progress: Progress,
    workers: Workers = ALONE,
) -> Evaluation:
    """Images of every prompt from every seed, scored; chunks that are already on the disk are read.

    Args:
        name: key of the evaluation, a file name.
        method: what makes the images.
        backend: what it makes them with.
        prompts: distinct prompts.
        scorer: the scorer of the images.
        seeds: noises per prompt.
        steps: sampler steps.
        batch: images at once.
        seed: the seed of the comparison.
        folder: where chunks are kept.
        progress: a function that is told `(name, done, all)` after every chunk.
        workers: the processes that the chunks are shared out over; they see the same folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = seeds * len(prompts)
    chunks = [(index, chunk) for index in range(seeds) for chunk in slices(len(prompts), batch)]

    def done(index: int, chunk: slice) -> tuple[list[Row], Cost]:
        part = prompts[chunk]
        path = folder / f"{name}-steps{steps}-seed{index}-from{chunk.start}.json"
        found = _read(path, part)
        if found is None:
            outcome = images_of(method, backend, part, image_seeds(seed, part, index), steps)
            document = _document(outcome, part, index, backend, scorer)
            write_sealed(path, document)
            found = _parsed(document)
        return found

    if workers.count > 1:
        for _, (index, chunk) in shared_out(chunks, workers):
            done(index, chunk)
        workers.gather(None)  # nobody reads before all have written
    rows: list[Row] = []
    cost = Cost()
    for index, chunk in chunks:
        found = done(index, chunk)
        rows += found[0]
        cost = cost + found[1]
        progress(name, len(rows), total)
    return Evaluation(name, steps, tuple(rows), cost)


def images_of(
    method: Method, backend: Backend, prompts: Sequence[str], seeds: Sequence[int], steps: int = 1
) -> Outcome:
    """What a method makes of these prompts from the base noise of the images with these seeds."""
    noise = image_noise(backend, Condition(tuple(prompts), seeds=tuple(seeds)))
    return method(backend, prompts, noise, steps=steps, seeds=seeds)


def _document(outcome: Outcome, prompts: Sequence[str], seed: int, backend: Backend, scorer: Scorer) -> dict[str, Any]:
    scores = scorer(outcome.images, prompts)  # always against what was asked for, also when the wording was changed
    rows = [
        {
            "prompt": prompt,
            "seed": seed,
            "category": category_of(backend, prompt),
            "scores": {name: float(values[i]) for name, values in scores.items()},
            "pool": [] if outcome.pool is None else outcome.pool[i].tolist(),
        }
        for i, prompt in enumerate(prompts)
    ]
    return {"prompts": list(prompts), "rows": rows, "cost": asdict(outcome.cost)}


def _parsed(document: Mapping[str, Any]) -> tuple[list[Row], Cost]:
    return [Row(**row) for row in document["rows"]], Cost(**document["cost"])


def _read(path: Path, prompts: Sequence[str]) -> tuple[list[Row], Cost] | None:
    """A chunk of an earlier run, if it is there, whole and about these prompts."""
    document = read_part(path)
    if not isinstance(document, dict) or document.get("prompts") != list(prompts):
        return None
    try:
        return _parsed(document)
    except (KeyError, TypeError):
        return None


def read_part(path: Path) -> Any:
    """What an earlier run found out; `None` if it is missing or damaged, and then it is found out again."""
    try:
        return read_sealed(path)
    except (OSError, ValueError):
        return None
