"""Which sample a run sees when: noise, prompts and probes as pure functions of the seed and the position.

Row `i` of the batch of step `t` is the same for one process and for many, and after a restart needs nothing but
the step counter: every draw comes from a generator seeded by a digest of (seed, purpose, position), the whole batch
is drawn on the CPU, and a process takes its rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hnkit.internal.seeds import generator_for


@dataclass(frozen=True)
class Batch:
    """The rows that one process works on: noise `(n, *shape)` on the CPU, a prompt for each, and its image's number."""

    noise: Tensor
    prompts: tuple[str, ...]
    images: tuple[int, ...]


@dataclass(frozen=True)
class SampleStream:
    """The training samples of a run.

    Prompts come in epochs: epoch `e` is a permutation that depends on `(seed, e)`; row `i` of step `t` is item
    `t * batch + i` of that endless sequence.

    Attributes:
        seed: the seed of the run.
        batch: rows of one optimiser step over all processes.
        shape: the shape of one noise.
        dtype: the type of the noise.
        prompts: the training prompts, not empty (`("",)` for an unconditional generator).
        noise: `"fresh"`: one for each row of each step; `"step"`: one for each step, shared by all its rows, as the
            published code draws it; `"fixed"`: one for each prompt, for the whole run (an unconditional generator
            keeps one for each row).
    """

    seed: int
    batch: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    prompts: Sequence[str]
    noise: Literal["fresh", "step", "fixed"] = "fresh"

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows `start` to `stop` of the batch of optimiser step `step` (counted from 0).

        Images that share their noise for the whole run share all that is random in them; others share nothing else.
        """
        items = [self._item(step * self.batch + row) for row in range(start, stop)]
        images = tuple(range(step * self.batch + start, step * self.batch + stop))
        prompts = tuple(self.prompts[item] for item in items)
        if self.noise == "fresh":
            noise = self._normal(self.batch, "noise", step)[start:stop]
        elif self.noise == "step":
            noise = self._normal(1, "step noise", step).repeat(stop - start, *[1] * len(self.shape))
        elif len(self.prompts) == 1:
            images = tuple(range(start, stop))
            noise = self._normal(self.batch, "fixed noise")[start:stop]
        else:
            images = (0,) * (stop - start)
            noise = torch.cat([self._normal(1, "fixed noise", item) for item in items])
        return Batch(noise, prompts, images)

    def probe_generator(self, step: int, start: int) -> torch.Generator:
        """A generator whose next Rademacher probes are those of row `start` and the rows after it.

        Integer tensors consume a CPU generator entry by entry, so drawing the rows before is skipping them.
        """
        generator = generator_for(self.seed, "probes", step)
        torch.randint(0, 2, (start, math.prod(self.shape)), generator=generator)
        return generator

    def injection_generators(self, step: int, start: int, stop: int) -> list[torch.Generator]:
        """The generator of the injected noise of each of the rows `start` to `stop` of a step."""
        return [generator_for(self.seed, "injected noise", step, row) for row in range(start, stop)]

    def epoch(self, step: int) -> float:
        """Passes over the training prompts made by the start of step `step`."""
        return step * self.batch / len(self.prompts)

    def _normal(self, rows: int, purpose: str, *position: int) -> Tensor:
        generator = generator_for(self.seed, purpose, *position)
        return torch.randn(rows, *self.shape, dtype=self.dtype, generator=generator)

    def _item(self, index: int) -> int:
        count = len(self.prompts)
        if count == 1:
            return 0
        return int(_permutation(self.seed, index // count, count)[index % count])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The order of epoch `epoch`; the last few are kept, since consecutive rows share them."""
    return torch.randperm(count, generator=generator_for(seed, "epoch", epoch))
