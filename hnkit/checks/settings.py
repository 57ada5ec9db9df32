"""What a run of `verify-bound` is told, whatever it is run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from hnkit.errors import InputError
from hnkit.figures.measured_map import BLOCKS, DENSE_DIM, MeasuredMap
from hnkit.injection import NoiseInjection
from hnkit.internal.workers import ALONE, Workers
from hnkit.kl.divergence import METHODS
from hnkit.maps import NoiseMap

Say = Callable[[str], None]


@dataclass(frozen=True)
class VerifySettings:
    """What a run of `verify-bound` is told, whatever it is run on.

    Attributes:
        samples: noise samples; `None`: 2048 for a toy, 256 down to 32 for a map, by its dimension.
        seed: the seed of the noise and of every probe.
        method: the method of `noise_kl`; `None`: exact up to 1024 dimensions; above, Arnoldi for a map and low rank
            plus remainder for a trained hypernetwork, whose local norms exceed 1, or Golub-Kahan where rank is lacking.
        certify: enclose E(A) and its bounds in ball arithmetic at some samples.
        options: further options of `noise_kl`.
        injection: how a map of one's own is deployed; a trained network's adapter says how it is.
    """

    samples: int | None = None
    seed: int = 0
    method: str | None = None
    certify: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    injection: NoiseInjection | None = None

    def __post_init__(self) -> None:
        if self.samples is not None and not 1 <= self.samples < 2**40:
            raise InputError(f"{self.samples} samples: give at least 1, and 2 or more for error bars, below 2^40")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed {self.seed}: give an integer from 0 to 2^63 - 1")
        if self.certify and find_spec("flint") is None:
            raise InputError("--certify needs the package python-flint: pip install 'hnkit[certify]' adds it")
        if self.method is not None and self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}: accepted are {', '.join(METHODS)}")

    def samples_for(self, dim: int) -> int:
        """Samples of a map in so many dimensions: 256, and fewer, down to 32, where each costs d products."""
        return self.samples or min(256, max(32, 2**13 // dim))

    def method_for(self, dim: int, *, trained: bool = False) -> str:
        """The method that is used in so many dimensions, on a map or on a trained hypernetwork."""
        return self.method or ("exact" if dim <= DENSE_DIM else "low-rank" if trained else "arnoldi")

    def to_config(self) -> dict[str, Any]:
        """The settings as a JSON object."""
        deployed = {} if self.injection is None else {"injection": asdict(self.injection)}
        return {"samples": self.samples, "seed": self.seed, "method": self.method or "automatic",
                "certify": self.certify, **self.options, **deployed}  # fmt: skip

    def measured(
        self,
        name: str,
        f: NoiseMap,
        x: Tensor,
        module: NoiseMap | None = None,
        *,
        trained: bool = False,
        workers: Workers | None = None,
    ) -> MeasuredMap:
        """A map on its noise, to be measured as these settings say, in blocks of samples where `workers` are given."""
        dim = x[0].numel()
        return MeasuredMap(
            name, f, x, self.seed, self.method_for(dim, trained=trained), dict(self.options), module,
            ascent_steps=25 if dim <= 64 else 5, fallback="lanczos" if trained and self.method is None else None,
            workers=workers or ALONE, blocks=BLOCKS if workers else 1,
        )  # fmt: skip
