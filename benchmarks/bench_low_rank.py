"""The stochastic methods on a trained miniature, whose local norms exceed 1, in 64 products a sample.

    hnkit train --backend digits --steps 600 --out RUN
    python benchmarks/bench_low_rank.py --adapter RUN      measure and write docs/results/low-rank.json

The Jacobians of the first 64 samples are kept as matrices: they are the oracle, and what the methods see through
products. Control variates are measured on the exact integrands of all 300. `--products` also runs the default
low-rank method on the network itself at all samples.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.adapters import default_prompts, load_trained
from hnkit.backend import completed
from hnkit.errors import InputError
from hnkit.internal.stats import Estimate
from hnkit.jacobian import dense_jacobian
from hnkit.kl import noise_kl
from hnkit.kl.control import controlled_mean, two_level_mean
from hnkit.kl.estimators import QuadraticForm, arnoldi, draw_probes, lanczos, roulette
from hnkit.kl.method import Run
from hnkit.kl.methods.low_rank import LowRank, low_rank
from hnkit.logdet import log_det_error
from hnkit.maps import NoiseMap, at_rows, chunked
from tests.hnkit.operator_zoo import MatrixOperator

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "low-rank.json"
SAMPLES, MATRICES, REPEATS = 300, 64, 5


def trained(adapter: Path) -> tuple[NoiseMap, Tensor]:
    """The map and the noise of the samples, prompts in turn."""
    backend, _ = load_trained("digits", adapter)
    backend.hypernetwork.eval()
    full, prompts = completed(backend), default_prompts(backend)
    rows = [prompts[i % len(prompts)] for i in range(SAMPLES)]
    x = torch.randn(SAMPLES, *full.noise_shape, dtype=full.noise_dtype, generator=torch.Generator().manual_seed(5))
    return full.map_for(rows), x


def exact_parts(f: NoiseMap, x: Tensor, cache: Path | None) -> dict[str, Tensor]:
    """The exact figures at every sample, and J at the first."""
    if cache is not None and cache.is_file():
        known: dict[str, Tensor] = torch.load(cache, weights_only=True)
        return known
    J = [dense_jacobian(inner, points).double() for _, inner, points in chunked(*at_rows(f, x, MATRICES), 4)]
    parts = noise_kl(f, x, check=False, certify=False).parts
    names = ("l2", "alignment", "error", "trace", "square")
    found = {"J": torch.cat(J), **{name: getattr(parts, name) for name in names}}
    if cache is not None:
        torch.save(found, cache)
    return found


Form = Callable[[MatrixOperator, Tensor, torch.Generator], QuadraticForm]


def cases() -> dict[str, tuple[int, Form]]:
    """Methods and their probes per sample, each in at most 64 products a sample."""

    def ranked(probes: int, rank: int) -> Form:
        settings = LowRank(probes=probes, rank=rank)
        return lambda operator, v, generator: low_rank(operator, v, settings, Run(generator))

    return {
        "low-rank, default (rank 16, 4 probes)": (4, ranked(4, 16)),
        "low-rank, rank 24, 4 probes": (4, ranked(4, 24)),
        "low-rank, rank 32, 1 probe": (1, ranked(1, 32)),
        "lanczos, 31 steps, 1 probe": (1, lambda operator, v, _: lanczos(operator, v, steps=31)),
        "lanczos, 7 steps, 4 probes": (4, lambda operator, v, _: lanczos(operator, v, steps=7)),
        "arnoldi, 64 steps": (1, lambda operator, v, _: arnoldi(operator, v, steps=64)),
        "roulette, 4 sure terms": (1, lambda operator, v, generator: roulette(operator, v, generator=generator)),
    }


def measured(J: Tensor, exact: Tensor, probes: int, form: Form) -> dict[str, Any]:
    """Error of the mean over the samples, in nats: its root mean square over repeats, and what one costs."""
    errors, spread, products = [], [], 0.0
    for seed in range(REPEATS):
        values = []
        spent = 0
        for first in range(0, len(J), 50):
            part = J[first : first + 50].repeat_interleave(probes, 0)
            operator = MatrixOperator(part, len(part))
            generator = torch.Generator().manual_seed(1000 * seed + first)
            v = draw_probes(len(part), J.shape[1], "rademacher", generator)
            try:
                values.append(form(operator, v, generator).value.reshape(-1, probes).mean(1))
            except InputError as reason:
                return {"refused": str(reason)}
            spent += operator.num_jvp + operator.num_vjp
        difference = torch.cat(values) - exact
        errors.append(float(difference.mean()))
        spread.append(float(difference.std()))
        products += spent / len(J) / REPEATS
    return {
        "products": products,
        "rms_error": math.sqrt(sum(e * e for e in errors) / len(errors)),
        "largest_error": max(map(abs, errors)),
        "spread": sum(spread) / len(spread),
    }


def pair(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.stderr]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--exact", type=Path, help="where the exact figures are kept between calls")
    parser.add_argument("--products", action="store_true", help="run low-rank on the network itself too: minutes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    f, x = trained(chosen.adapter)
    found = exact_parts(f, x, chosen.exact)
    J, l2 = found["J"], found["l2"]
    exact = log_det_error(J)
    singular = torch.linalg.svdvals(J)
    integrand, stein = l2 + found["error"], found["alignment"] - found["trace"]
    second = l2 + found["square"] / 2
    plain, change = Estimate.of(integrand), Estimate.of(integrand + stein)
    controlled = controlled_mean(integrand, stein)
    few = SAMPLES // 4
    two, alone = two_level_mean(integrand[:few], second[:few], second[few:]), Estimate.of(integrand[:few])
    quantiles = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    document = {
        "samples": SAMPLES,
        "matrices": len(J),
        "dim": J.shape[1],
        "repeats": REPEATS,
        "kl": pair(plain),
        "l2": pair(Estimate.of(l2)),
        "error": pair(Estimate.of(found["error"])),
        "local_norm": singular[:, 0].quantile(quantiles).tolist(),
        "stable_rank": (singular.square().sum(1) / singular[:, 0].square()).quantile(quantiles).tolist(),
        "beyond": {str(k): float(singular[:, k].median()) for k in (4, 8, 16, 32)},
        "methods": {name: measured(J, exact, *case) for name, case in cases().items()},
        "control": {
            "stein form": pair(plain),
            "change of variables": pair(change),
            "x.f - tr J regressed out": pair(controlled),
            "a quarter of the samples": pair(alone),
            "the same, second order at the rest": pair(two),
            "correlation": float(torch.corrcoef(torch.stack([found["error"], found["square"] / 2]))[0, 1]),
        },
    }
    if chosen.products:
        generator = torch.Generator().manual_seed(9)
        low = noise_kl(f, x, method="low-rank", generator=generator, check=False, certify=False)
        difference = low.parts.error - found["error"]
        document["network"] = {
            "products": (low.num_jvp + low.num_vjp) / SAMPLES,
            "error": float(difference.mean()),
            "spread": float(difference.std()),
            "kl": pair(low),
            "controlled": pair(low.controlled),
            "folds": None if low.folds is None else [low.folds.negative, low.folds.upper],
        }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
