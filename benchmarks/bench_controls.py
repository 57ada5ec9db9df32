"""What control variates save on maps whose KL is known, by the exact method and by stochastic ones.

    python benchmarks/bench_controls.py      measure and write docs/results/controls.json (half a minute)

A variance ratio is that of the plain mean over that of the mean with the control variate, from the same samples: how
many times fewer samples the same error takes. Its error is over independent batches, and so is that of the difference
of the two means, which is the bias where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.checks.measured_problem import MeasuredProblem
from hnkit.checks.reference_maps import contraction, reference_maps
from hnkit.checks.verify_toys import chosen_problems
from hnkit.errors import ExpansiveMapError
from hnkit.internal.stats import Estimate, ratio_and_stderr
from hnkit.kl import noise_kl, two_level_kl
from hnkit.maps import NoiseMap

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "controls.json"
BATCHES, SAMPLES, COSTLY, PROBES = 32, 256, 64, 2

Pair = tuple[Estimate, Estimate]


def maps() -> dict[str, tuple[NoiseMap, int]]:
    """The maps and their dimensions: what `verify-bound` measures, and one of more dimensions."""
    found = {name: (f, dim) for name, (f, dim, _) in reference_maps().items()}
    found["contraction, d = 24"] = (contraction(24, 0.9), 24)
    for name in ("linear-gaussian", "half-space"):
        known = MeasuredProblem(chosen_problems([name])[0], 2)
        found[f"optimum of {name}"] = (known.optimum, known.x[0].numel())
    return found


def exact(f: NoiseMap, x: Tensor, _: torch.Generator) -> Pair:
    """Determinants, and `x . f - tr J` regressed out."""
    plain = noise_kl(f, x, check=False, certify=False)
    return plain, plain.controlled


def probed(f: NoiseMap, x: Tensor, generator: torch.Generator) -> Pair:
    """Arnoldi, and the same with the trace that its probes see."""
    plain = noise_kl(f, x, method="arnoldi", probes=PROBES, generator=generator, check=False, certify=False)
    return plain, plain.controlled


def two_levels(f: NoiseMap, x: Tensor, generator: torch.Generator) -> Pair:
    """Arnoldi at some samples, and the same with the second order at the others."""
    first = torch.Generator().manual_seed(generator.initial_seed())
    plain = noise_kl(f, x[:COSTLY], method="arnoldi", probes=PROBES, generator=first, check=False, certify=False)
    both = two_level_kl(f, x, costly=COSTLY, method="arnoldi", probes=PROBES, generator=generator, check=False)
    return plain, both


CASES: dict[str, Callable[[NoiseMap, Tensor, torch.Generator], Pair]] = {
    "exact": exact, "arnoldi": probed, "two levels": two_levels,
}  # fmt: skip


def measured(f: NoiseMap, dim: int, case: Callable[..., Pair]) -> dict[str, Any]:
    """Variance ratio and difference of the means, with their errors over batches."""
    pairs = []
    for seed in range(BATCHES):
        x = torch.randn(SAMPLES, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        try:
            pairs.append(case(f, x, torch.Generator().manual_seed(1000 + seed)))
        except ExpansiveMapError as reason:
            return {"refused": str(reason)}
    plain, controlled = (torch.tensor([one.stderr**2 for one in side]).double() for side in zip(*pairs, strict=True))
    means = torch.tensor([[a.value, b.value] for a, b in pairs]).double()
    difference = Estimate.of(means[:, 1] - means[:, 0])
    return {
        "ratio": list(ratio_and_stderr(plain, controlled)),
        "kl": float(means[:, 0].mean()),
        "difference": [difference.value, difference.stderr],
    }


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    document = {
        "batches": BATCHES, "samples": SAMPLES, "costly": COSTLY, "probes": PROBES,
        "maps": {
            name: {"dim": dim, **{case: measured(f, dim, run) for case, run in CASES.items()}}
            for name, (f, dim) in maps().items()
        },
    }  # fmt: skip
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
