"""The KL of a comparison's networks, at noises that their images were made from: nats and gains of the same samples."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from hnkit.backend import Backend, completed, image_noise
from hnkit.figures import measure
from hnkit.figures.measurement import BLOCK_RECORDS, Sharing
from hnkit.internal.kept import Keep, from_document, not_kept, to_document
from hnkit.internal.seeds import derived_seed
from hnkit.internal.workers import ALONE, Workers
from hnkit.maps import ConditionedMap
from hnkit.prompts import spread
from hnkit.scaled.compare.evaluation import read_part, write_part

T = TypeVar("T")


@dataclass(frozen=True)
class NetworkKL:
    """What was measured of a network; joined from its blocks, which are the parts of the comparison's folder.

    Attributes:
        places: which of the comparison's prompts, from all over their order.
        seeds: how many of its seeds, from the first.
        figures: the record of the measurement, as `hnkit.figures.Measurement.to_json` gives it.
        per_sample: the integrand of the KL, `[seed * len(places) + place]`, nats.
    """

    places: tuple[int, ...]
    seeds: int
    figures: dict[str, Any]
    per_sample: tuple[float, ...]

    @property
    def nats(self) -> tuple[float, float]:
        """The KL of what is deployed and its standard error: with injected noise its proved bound, nats."""
        found = self.figures.get("injected")
        record, key = (self.figures, "kl") if not found else (found, "nats")
        return record[key], record[f"{key}_stderr"] or 0.0

    def of_prompt(self, index: int) -> torch.Tensor:
        """The integrand at the noises of the prompt at `places[index]`, `(seeds,)`."""
        return torch.tensor(self.per_sample[index :: len(self.places)], dtype=torch.float64)


def rows_within(prompts: int, seeds: int, samples: int) -> tuple[int, int]:
    """How many prompts and seeds a measurement of `samples` noises takes: two seeds a prompt where there are two.

    Two samples of a prompt tell its noise from the differences between prompts.
    """
    each = min(seeds, 2)
    chosen = max(1, min(prompts, samples // each))
    return chosen, max(1, min(seeds, samples // chosen))


def kept_block(folder: Path, made_from: str, name: str, make: Callable[[], T]) -> T:
    """What was made of a block of noises, from the folder, where any process has left it, or else as it is made now."""
    path = folder / f"{re.sub('[^a-z0-9]+', '-', name)}.json"
    saved = read_part(path, made_from)
    if saved is not None and saved.get("block") == name:
        with contextlib.suppress(ValueError):
            found: T = from_document(saved.get("value"), BLOCK_RECORDS)
            return found
    made = make()
    write_part(path, {"block": name, "value": to_document(made)}, made_from)
    return made


def network_kl(
    backend: Backend,
    prompts: Sequence[str],
    seeds: int,
    samples: int,
    seed: int,
    *,
    method: str = "auto",
    workers: Workers = ALONE,
    keep: Keep = not_kept,
) -> NetworkKL:
    """Measure the KL of a network on noises of the comparison.

    Args:
        backend: the backend, with its adapter loaded.
        prompts: the comparison's prompts.
        seeds: its noises a prompt.
        samples: noises to measure on, at most.
        seed: the seed of the comparison.
        method: the method of `hnkit.figures.measure`.
        workers: the processes that the noises are shared out over.
        keep: where what was made of a block of noises is kept.
    """
    chosen, each = rows_within(len(prompts), seeds, samples)
    places = spread(len(prompts), chosen)
    asked = [prompts[place] for place in places] * each
    numbers = [index for index in range(each) for _ in range(chosen)]
    condition = backend.encode(asked).of_images(seed, numbers)
    f = ConditionedMap(backend.hypernetwork, condition)
    found = measure(
        f,
        image_noise(backend, condition),
        method=method,
        prompts=asked,
        injection=completed(backend).injection,
        sharing=Sharing(derived_seed(seed, "compare probes"), workers, keep),
    )
    figures = found.to_json() | {"prompts": chosen}
    return NetworkKL(tuple(places), each, figures, tuple(found.per_sample.tolist()))
