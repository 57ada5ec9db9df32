"""E(J) by hnkit and by its peers, each through its own public interface, on the same matrices with the same products.

    python benchmarks/bench_peers.py                   measure and write docs/results/bench-peers.json
    pytest -m '' benchmarks/bench_peers.py -s          measure, print, and check that all agree with the truth

Peers come from the registry: `pip install --no-deps -r benchmarks/peers.txt`.

- matfree: Golub-Kahan bidiagonalisation of `I + J` (`decomp.bidiag`, `funm.monte_carlo_funm_product_logdet`) for
  `log|det(I + J)|`, and `stochtrace.monte_carlo_trace` for the trace, each with its own probes and standard error.
- linear_operator: stochastic Lanczos quadrature (`LinearOperator.logdet`) of the positive definite `(I + J)^T (I + J)`.
  It gives one number without an error bar; the trace is added by Hutchinson's estimator.
- normflows: the roulette of residual flows (`flows.residual.iResBlock`, two sure terms), the trace likewise.

A run is one call with about as many products as `PRODUCTS`; runs with `RUNS` seeds show how far the value is off.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hnkit import log_det_error
from hnkit.internal.files import write_json
from hnkit.internal.stats import Estimate, mean_and_stderr
from hnkit.kl.estimators import arnoldi, draw_probes, lanczos

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "bench-peers.json"
DIM, PRODUCTS, RUNS, STEPS = 120, 256, 12, 6


class Counted:
    """A matrix whose products with vectors are counted."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.rows, self.dim, self.products = A, 1, A.shape[-1], 0

    def vjp(self, u: Tensor) -> Tensor:
        """`A^T u` of every row."""
        self.products += u.shape[0]
        return u @ self.A

    def jvp(self, v: Tensor) -> Tensor:
        """`A v` of every row."""
        self.products += v.shape[0]
        return v @ self.A.T


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _hutchinson(operator: Counted, probes: int, seed: int) -> Tensor:
    v = draw_probes(probes, operator.dim, "rademacher", _seeded(1000 + seed))
    return (v * operator.vjp(v)).sum(1)


def by_arnoldi(operator: Counted, seed: int) -> Estimate:
    """hnkit: one Krylov space of J^T for trace and log-determinant together."""
    v = draw_probes(PRODUCTS // STEPS, operator.dim, "rademacher", _seeded(seed))
    operator.rows = len(v)
    return Estimate.of(arnoldi(operator, v, steps=STEPS).value)


def by_lanczos(operator: Counted, seed: int) -> Estimate:
    """hnkit: Golub and Kahan's process, trace and log-determinant with the same probe."""
    v = draw_probes(PRODUCTS // (2 * STEPS + 1), operator.dim, "rademacher", _seeded(seed))
    operator.rows = len(v)
    return Estimate.of(lanczos(operator, v, steps=STEPS).value)


def by_matfree(operator: Counted, seed: int) -> Estimate:
    """Matfree's mean and standard error of the log-determinant, and of the trace."""
    import jax

    jax.config.update("jax_enable_x64", True)
    probes = PRODUCTS // (2 * STEPS + 1)
    log_det, trace = _matfree(operator.dim, probes)
    A = jax.numpy.asarray(operator.A.numpy())
    first, second = jax.random.split(jax.random.PRNGKey(seed))
    value, error = log_det(A, first)
    tr, tr_error = trace(A, second)
    operator.products += probes * (2 * STEPS + 1)
    return Estimate(float(tr - value / 2), math.hypot(float(tr_error), float(error) / 2))


@cache
def _matfree(dim: int, probes: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its two estimators as compiled functions of the matrix and the key, so that no run but the first compiles."""
    import jax
    from matfree import decomp, funm, stochtrace

    sampler = stochtrace.sampler_signs(jax.numpy.ones(dim), num=probes)
    estimate = stochtrace.estimator_monte_carlo_mean_and_sem
    log_det = estimate(funm.monte_carlo_funm_product_logdet(decomp.bidiag(STEPS)), sampler)
    trace = estimate(stochtrace.monte_carlo_trace(), sampler)
    return (
        jax.jit(lambda A, key: log_det(lambda v: v + A @ v, key)),
        jax.jit(lambda A, key: trace(lambda v: A @ v, key)),
    )


def by_linear_operator(operator: Counted, seed: int) -> Estimate:
    """linear_operator's log-determinant of `(I + J)^T (I + J)`, and Hutchinson's trace."""
    from linear_operator import LinearOperator, settings

    class Product(LinearOperator):
        def __init__(self, B: Tensor) -> None:
            super().__init__(B)
            self.B = B

        def _matmul(self, rhs: Tensor) -> Tensor:
            operator.products += 2 * (rhs.shape[-1] if rhs.ndim > 1 else 1)
            return self.B.mT @ (self.B @ rhs)

        def _size(self) -> torch.Size:
            return self.B.shape

        def _transpose_nonbatch(self) -> Product:
            return self

    probes = PRODUCTS // (2 * STEPS + 1)
    torch.manual_seed(seed)
    quadrature = Product(torch.eye(operator.dim, dtype=torch.float64) + operator.A)
    with (
        warnings.catch_warnings(),
        settings.num_trace_samples(probes),
        settings.max_cholesky_size(1),
        settings.max_preconditioner_size(0),
        settings.max_cg_iterations(STEPS),
        settings.max_lanczos_quadrature_iterations(STEPS),
        settings.cg_tolerance(1e-10),
        settings.fast_computations(log_prob=True),
    ):
        warnings.simplefilter("ignore")  # its conjugate gradients stop at the steps given: that is meant
        log_det = float(quadrature.logdet())
    return Estimate(float(_hutchinson(operator, probes, seed).mean()) - log_det / 2, math.nan)


def by_residual_flow(operator: Counted, seed: int) -> Estimate:
    """Normflows' unbiased log-determinant of an invertible residual block, and Hutchinson's trace."""
    from normflows.flows.residual import iResBlock

    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _Product.apply(x, operator)

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (its series' lengths are drawn from numpy's global state)
    block = iResBlock(Linear(), n_dist="geometric", geom_p=0.5, n_exact_terms=2, neumann_grad=False).double()
    values = []
    while operator.products < PRODUCTS * 3 // 4:
        point = torch.zeros(1, operator.dim, dtype=torch.float64)
        values.append(block._logdetgrad(point)[1].detach().flatten())
    log_dets = torch.cat(values)
    error = _hutchinson(operator, len(log_dets), seed) - log_dets
    return Estimate.of(error)


class _Product(torch.autograd.Function):
    """A linear map whose vector-Jacobian products are counted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: Counted) -> Tensor:
        ctx.operator = operator
        return x @ operator.A.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.operator.vjp(grads[0]), None


METHODS: dict[str, Callable[[Counted, int], Estimate]] = {
    "hnkit, Arnoldi": by_arnoldi,
    "hnkit, Golub-Kahan": by_lanczos,
    "matfree, Golub-Kahan": by_matfree,
    "linear_operator, Lanczos": by_linear_operator,
    "normflows, residual flow": by_residual_flow,
}


def matrices() -> dict[str, Tensor]:
    """A part of the zoo, by kind and norm."""
    G = torch.randn(DIM, DIM, generator=_seeded(0), dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(DIM, DIM, generator=_seeded(1), dtype=torch.float64)).Q
    half = torch.linspace(0.5, 0.9, DIM // 2, dtype=torch.float64)
    kinds = {
        "Gaussian, norm 0.3": (G, 0.3),
        "symmetric, norm 0.8": (G + G.T, 0.8),
        "skew, norm 0.8": (G - G.T, 0.8),
        "decaying spectrum, norm 0.8": ((Q * 0.93 ** torch.arange(DIM)) @ Q.T, 0.8),
        "gap, ±[0.5, 0.9]": ((Q * torch.cat([half, -half])) @ Q.T, 0.9),
    }
    return {name: A / torch.linalg.matrix_norm(A, ord=2) * norm for name, (A, norm) in kinds.items()}


def measure() -> dict[str, Any]:
    """Every method on every matrix: the first run, and the root-mean-square error of all."""
    torch.set_num_threads(1)
    cases = {}
    for name, A in matrices().items():
        truth, runs = float(log_det_error(A)), {}
        for method, call in METHODS.items():
            estimates, products, seconds = [], 0, math.inf
            for seed in range(RUNS):
                operator = Counted(A)
                start = time.process_time()
                estimates.append(call(operator, seed))
                seconds = min(seconds, time.process_time() - start)  # compilation is in the first run alone
                products += operator.products
            errors = torch.tensor([estimate.value - truth for estimate in estimates], dtype=torch.float64)
            runs[method] = {
                "value": estimates[0].value,
                "stderr": None if math.isnan(estimates[0].stderr) else estimates[0].stderr,
                "bias": mean_and_stderr(errors),
                "rmse": float(errors.square().mean().sqrt()),
                "products": products / RUNS,
                "seconds": seconds,
            }
        cases[name] = {"exact": truth, "runs": runs}
    machine = f"{platform.machine()} CPU, one thread, torch {torch.__version__.split('+')[0]}"
    return {"machine": machine, "dim": DIM, "steps": STEPS, "runs": RUNS, "cases": cases}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """One measurement for all checks."""
    pytest.importorskip("matfree")
    pytest.importorskip("linear_operator")
    pytest.importorskip("normflows")
    return measure()


def test_everyone_estimates_the_same_number(document: dict[str, Any]) -> None:
    """Peers are called as they are meant to be: the mean of their runs is the truth, up to some truncation."""
    for name, case in document["cases"].items():
        scale = float(matrices()[name].square().sum()) / 2
        for method, run in case["runs"].items():
            bias, stderr = run["bias"]
            assert abs(bias) < 5 * stderr + 0.05 * scale, (name, method)


def test_one_probe_for_trace_and_log_determinant_pays(document: dict[str, Any]) -> None:
    """At equal products, smaller errors than every peer on all but skew matrices, where nothing cancels."""
    for name, case in document["cases"].items():
        if not name.startswith("skew"):
            ours = case["runs"]["hnkit, Arnoldi"]["rmse"]
            assert all(run["rmse"] > ours for method, run in case["runs"].items() if not method.startswith("hnkit"))


def main() -> None:
    """Measure and write what the documentation shows."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = measure()
    for name, case in found["cases"].items():
        print(f"{name}: E = {case['exact']:.5g}")
        for method, run in case["runs"].items():
            error = "unknown" if run["stderr"] is None else f"{run['stderr']:.2g}"
            print(
                f"  {method:<26} {run['value']:10.4g} ± {error:<8} rmse {run['rmse']:.2g}, "
                f"{run['products']:.0f} products, {run['seconds'] * 1e3:.1f} ms"
            )
    write_json(RESULT, found)


if __name__ == "__main__":
    main()
