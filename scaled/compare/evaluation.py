"""Running a method over prompts and seeds, paired and resumable: every finished chunk is on the disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from hnkit.backend import Backend, completed, image_noise
from hnkit.internal.files import atomic_write, file_digest, read_plain, read_sealed, write_sealed
from hnkit.internal.seeds import image_seed
from hnkit.internal.values import finite, or_nan, typed_values
from hnkit.internal.workers import ALONE, Workers, shared_out
from hnkit.maps import Condition, slices
from hnkit.rewards import RewardSum
from hnkit.scaled.compare.baselines import Cost, Method, Outcome

_IMAGES, _SUFFIX = "images", ".safetensors"
"""The key of a part under which its images have their digest, and their file is beside it."""


@dataclass(frozen=True)
class Row:
    """One image: what it was asked for, from which noise, every score of it, and the rewards of its candidates.

    A score that is not finite is NaN.
    """

    prompt: str
    seed: int
    category: str
    scores: Mapping[str, float]
    pool: Sequence[float] = ()


@dataclass(frozen=True)
class Evaluation:
    """A method on a set of prompts and seeds: the images' scores, the cost of making them all, and seconds an image.

    Seconds are the median over chunks, which one interruption of the machine does not move.
    """

    method: str
    steps: int
    rows: tuple[Row, ...]
    cost: Cost
    seconds: float


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


@dataclass(frozen=True)
class Job:
    """Images of every prompt from every seed by one method, scored; a chunk that is on the disk is not made again.

    Attributes:
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
        shown: prompts, from the first, of which the images of the first noise are kept beside their scores.
        made_from: the digest of what the comparison, and the network, are made from; see `read_part`.
    """

    name: str
    method: Method
    backend: Backend
    prompts: Sequence[str]
    scorer: Scorer
    seeds: int
    steps: int
    batch: int
    seed: int
    folder: Path
    shown: int = 0
    made_from: str = ""

    @property
    def chunks(self) -> list[tuple[int, slice]]:
        """Number of the noise and prompts of each chunk, in order."""
        return [(index, chunk) for index in range(self.seeds) for chunk in slices(len(self.prompts), self.batch)]

    def chunk(self, index: int, chunk: slice) -> tuple[list[Row], Cost]:
        """The rows and the cost of one chunk, made if they are not on the disk."""
        part = self.prompts[chunk]
        path = self._path(index, chunk)
        found = _read(path, part, self.made_from)
        if found is None:
            outcome = self._made(index, chunk)
            document = _document(outcome, part, index, self.backend, self.scorer)
            if shown := self._shown(index, chunk):
                self.folder.mkdir(parents=True, exist_ok=True)
                document[_IMAGES] = _kept(path, outcome.images[:shown])
            write_part(path, document, self.made_from)
            found = _parsed(document)
        return found

    def shown_images(self) -> Tensor:
        """The images of the first noise of the first `shown` prompts, float32 on the CPU: those that were scored.

        What the folder has lost of them is made again.
        """
        parts = []
        for index, chunk in self.chunks:
            if count := self._shown(index, chunk):
                self.chunk(index, chunk)
                path = self._path(index, chunk)
                file, document = path.with_suffix(_SUFFIX), read_part(path, self.made_from) or {}
                if not (file.is_file() and document.get(_IMAGES) == file_digest(file)):
                    images = self._made(index, chunk).images[:count]
                    write_part(path, document | {_IMAGES: _kept(path, images)}, self.made_from)
                parts.append(load(read_plain(file))[_IMAGES])
        return torch.cat(parts)

    def warm_up(self) -> None:
        """Make the first chunk and forget it: what a first pass sets up is in no figure of time."""
        self._made(*self.chunks[0])

    def _path(self, index: int, chunk: slice) -> Path:
        return self.folder / f"{self.name}-steps{self.steps}-seed{index}-from{chunk.start}.json"

    def _made(self, index: int, chunk: slice) -> Outcome:
        part = self.prompts[chunk]
        return images_of(self.method, self.backend, part, image_seeds(self.seed, part, index), self.steps)

    def _shown(self, index: int, chunk: slice) -> int:
        """How many images of a chunk are shown, from its first."""
        return 0 if index else max(0, min(chunk.stop, self.shown) - chunk.start)

    def result(self) -> Evaluation:
        """All chunks together."""
        parts = [self.chunk(*place) for place in self.chunks]
        rows = tuple(row for part, _ in parts for row in part)
        cost = sum((spent for _, spent in parts), Cost())
        seconds = median(spent.seconds / len(part) for part, spent in parts)
        return Evaluation(self.name, self.steps, rows, cost, seconds)


def evaluate_in_turn(jobs: Sequence[Job], workers: Workers = ALONE) -> None:
    """Make every chunk of jobs on the same prompts and seeds, chunk by chunk and within it job by job.

    What the machine does meanwhile meets all methods alike, so that their times can be compared.

    Args:
        jobs: what is to be made.
        workers: the processes that the chunks are shared out over; they see the same folder.
    """
    for _, place in shared_out(jobs[0].chunks, workers):
        for job in jobs:
            job.chunk(*place)
    workers.gather(None)  # nobody reads before all have written


def without_images(job: Job, workers: Workers) -> str:
    """One sentence where there are fewer chunks than processes, else nothing."""
    chunks = len(job.chunks)
    if chunks >= workers.count:
        return ""
    return (
        f"{chunks} batches of prompts and seeds for {workers.count} processes, so that {workers.count - chunks} make "
        f"no images: a compare.batch below {job.batch} makes more of them"
    )


def images_of(
    method: Method, backend: Backend, prompts: Sequence[str], seeds: Sequence[int], steps: int = 1
) -> Outcome:
    """What a method makes of these prompts from the base noise of the images with these seeds, and how long it took."""
    noise = image_noise(backend, Condition(tuple(prompts), seeds=tuple(seeds)))
    _finish(noise.device)
    start = time.perf_counter()
    outcome = method(backend, prompts, noise, steps=steps, seeds=seeds)
    _finish(noise.device)
    return replace(outcome, cost=replace(outcome.cost, seconds=time.perf_counter() - start))


@dataclass(frozen=True)
class _KeptRow:
    """A row as a part holds it: a score that is not finite, which JSON has no word for, is `None`."""

    prompt: str
    seed: int
    category: str
    scores: dict[str, float | None]
    pool: tuple[float | None, ...]


def _finish(device: torch.device) -> None:
    """Wait for what is queued on an accelerator: a clock sees nothing of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    document: dict[str, Any] = finite({"prompts": list(prompts), "rows": rows, "cost": asdict(outcome.cost)})
    return document


def _kept(path: Path, images: Tensor) -> str:
    """Keep the images of a part beside it; the digest of their file."""
    file = path.with_suffix(_SUFFIX)
    atomic_write(file, save({_IMAGES: images.float().cpu().contiguous()}))
    return file_digest(file)


def _parsed(document: Mapping[str, Any]) -> tuple[list[Row], Cost]:
    rows = []
    for entry in document["rows"]:
        kept = _KeptRow(**typed_values(entry, _KeptRow, "a row"))
        scores = {name: or_nan(value) for name, value in kept.scores.items()}
        rows.append(Row(kept.prompt, kept.seed, kept.category, scores, [or_nan(value) for value in kept.pool]))
    return rows, Cost(**typed_values(document["cost"], Cost, "the cost"))


def _read(path: Path, prompts: Sequence[str], made_from: str = "") -> tuple[list[Row], Cost] | None:
    """A chunk of an earlier run, if it is there, whole and about these prompts."""
    document = read_part(path, made_from)
    if document is None or document.get("prompts") != list(prompts):
        return None
    try:
        rows, cost = _parsed(document)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    whole = [row.prompt for row in rows] == list(prompts) and all("reward" in row.scores for row in rows)
    return (rows, cost) if whole else None


def read_part(path: Path, made_from: str) -> dict[str, Any] | None:
    """What an earlier run found out and `write_part` kept under this name.

    `None` if it is missing or damaged, of another name, or made from something else (another seed, other settings,
    another network): then it is found out again.
    """
    try:
        document = read_sealed(path)
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or (document.get("part"), document.get("made_from")) != (path.name, made_from):
        return None
    return document


def foreign_parts(folder: Path, known: Collection[str]) -> int:
    """How many parts in a folder cannot be taken up: made from something else than any of `known`, or damaged."""
    return sum(all(read_part(path, made_from) is None for made_from in known) for path in folder.rglob("*.json"))


def write_part(path: Path, document: Mapping[str, Any], made_from: str) -> None:
    """Keep what was found out, in a folder that is made if need be, with its name and what it was made from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, {**document, "part": path.name, "made_from": made_from})
