"""E(J) from few products: hnkit's estimators beside what one would otherwise take.

    pytest -m '' benchmarks/bench_logdet.py -s         measure, print, and check the ratios
    python benchmarks/bench_logdet.py                  measure, write docs/results/bench-logdet.json and the plots

Every estimator is applied to the same dense matrices (the zoo, and Jacobians of networks at a random point, computed
once), with many probes at several lengths. One probe of an estimator has a mean, a variance and a number of products,
so that its root-mean-square error after N products is `sqrt(bias^2 + variance * products / N)`. For each N the best
length is taken, for the alternatives as for hnkit.

The alternatives estimate the log-determinant alone (a power series or roulette, as residual flows do, or Lanczos
quadrature of `log det B^T B / 2`) and the trace separately by Hutchinson's estimator with probes of its own.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hnkit import RowJacobian, dense_jacobian, log_det_error
from hnkit.internal.files import atomic_write, write_json
from hnkit.jacobian import rows_per_pass
from hnkit.kl.estimators import (
    QuadraticForm,
    arnoldi,
    draw_probes,
    lanczos,
    power_series,
    roulette,
    second_order,
)
from hnkit.kl.xtrace import xtrace
from hnkit.linalg.krylov import LanczosProcess

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PROBES = 256
BUDGETS = (8, 16, 32, 64, 128, 256)
DIM = 300


class Matrix:
    """One matrix as an operator on rows."""

    def __init__(self, A: Tensor, rows: int) -> None:
        self.A, self.rows, self.dim = A, rows, A.shape[-1]

    def vjp(self, u: Tensor) -> Tensor:
        return u @ self.A

    def jvp(self, v: Tensor) -> Tensor:
        return v @ self.A.T


# --- cases ------------------------------------------------------------------------------------------------------------


def _scaled(A: Tensor, norm: float) -> Tensor:
    return A / torch.linalg.matrix_norm(A, ord=2) * norm


def zoo() -> dict[str, Tensor]:
    """Matrices of dimension 300 by kind and norm."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q
    decay = 0.93 ** torch.arange(DIM, dtype=torch.float64)
    return {
        "Gaussian, norm 0.3": _scaled(G, 0.3),
        "Gaussian, norm 0.8": _scaled(G, 0.8),
        "symmetric, norm 0.3": _scaled(G + G.T, 0.3),
        "symmetric, norm 0.8": _scaled(G + G.T, 0.8),
        "skew, norm 0.8": _scaled(G - G.T, 0.8),
        "decaying spectrum, norm 0.8": _scaled((Q * decay) @ Q.T, 0.8),
        "decaying non-normal, norm 0.8": _scaled(G @ torch.diag(decay), 0.8),
    }


class Bottleneck(nn.Module):
    """`x + f(x)` steers along few directions: a low-rank update of features, as LoRA hypernetworks make it."""

    def __init__(self, dim: int, width: int, rank: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.features(x)))


class RewardStep(nn.Module):
    """A gradient step on a smooth reward: what the L2 loss tends to (a symmetric Jacobian)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reward = nn.Sequential(nn.Linear(dim, 256), nn.Tanh(), nn.Linear(256, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self.reward
        hidden = torch.tanh(first(x))
        return ((1 - hidden.square()) * last.weight[0]) @ first.weight


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks with random weights and a point of noise each."""
    torch.manual_seed(0)
    first, second, last = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 16), (16, 3)))
    convolutions = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
    return {
        "MLP, d = 256": (nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256)), torch.randn(1, 256)),
        "convolutions, d = 768": (convolutions, torch.randn(1, 3, 16, 16)),
        "rank-8 update, d = 512": (Bottleneck(512, 256, 8), torch.randn(1, 512)),
        "gradient of a reward, d = 512": (RewardStep(512), torch.randn(1, 512)),
    }


def network_jacobians(norm: float = 0.3) -> dict[str, Tensor]:
    """Their Jacobians, the output scaled to a local norm of 0.3."""
    found = {}
    for name, (f, x) in networks().items():
        found[f"{name}, norm {norm}"] = _scaled(dense_jacobian(f.double(), x.double())[0], norm)
    return found


# --- estimators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What the probes of one estimator gave: estimates `(rows,)` and the mean number of products of one."""

    values: Tensor
    products: float


def _form(form: QuadraticForm) -> Sample:
    return Sample(form.value, float(form.products.mean()))


def _probes(dim: int, seed: int) -> Tensor:
    return draw_probes(PROBES, dim, "rademacher", torch.Generator().manual_seed(seed))


def _hutchinson(A: Tensor) -> Tensor:
    v = _probes(A.shape[0], 17)
    return (v * (v @ A)).sum(1)


def _series_terms(A: Tensor, v: Tensor, length: int) -> list[Tensor]:
    """`(-1)^(k+1) / k v' A^k v` for k = 1 ... length."""
    terms, vector = [], v
    for k in range(1, length + 1):
        vector = vector @ A
        terms.append((-1) ** (k + 1) / k * (v * vector).sum(1))
    return terms


def separate_series(A: Tensor, length: int) -> Sample:
    """The truncated series of log det(I + A), as residual flows evaluate it, and a separate trace."""
    terms = _series_terms(A, _probes(A.shape[0], 0), length)
    return Sample(_hutchinson(A) - torch.stack(terms).sum(0), length + 1.0)


def separate_roulette(A: Tensor, keep: float) -> Sample:
    """The unbiased series of residual flows (two sure terms) and a separate trace."""
    v = _probes(A.shape[0], 0)
    # P(N >= k) = keep^(k - 2), by inversion.
    uniform = torch.rand(PROBES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lengths = 2 + (uniform.log() / math.log(keep)).floor()
    terms = torch.stack(_series_terms(A, v, int(lengths.max())))
    k = torch.arange(1, terms.shape[0] + 1, dtype=torch.float64)[:, None]
    weights = (k <= lengths) / keep ** (k - 2).clamp(min=0)
    return Sample(_hutchinson(A) - (weights * terms).sum(0), float(lengths.mean()) + 1)


def separate_lanczos(A: Tensor, steps: int) -> Sample:
    """Stochastic Lanczos quadrature of log det(B'B)/2, B = I + A, and a separate trace."""
    process = LanczosProcess(Matrix(A, PROBES), _probes(A.shape[0], 0))
    for _ in range(steps):
        process.advance()
    values, vectors = torch.linalg.eigh(process.matrix())
    log_det = process.scale.square() * (vectors[:, 0].square() * torch.log1p(values)).sum(1) / 2
    return Sample(_hutchinson(A) - log_det, 2.0 * steps + 1)


def _xtrace(A: Tensor, group: int, steps: int) -> Sample:
    rows = PROBES // group * group
    form = xtrace(Matrix(A, rows), _probes(A.shape[0], 0)[:rows], group=group, steps=steps)
    # One estimate is the mean of a group, with the products of all its probes.
    return Sample(form.value.reshape(-1, group).mean(1), float(form.products.mean()) * group)


def _ours(name: str, A: Tensor, length: int) -> Sample:
    v = _probes(A.shape[0], 0)
    operator = Matrix(A, PROBES)
    if name == "arnoldi":
        return _form(arnoldi(operator, v, steps=length))
    if name == "lanczos":
        return _form(lanczos(operator, v, steps=length))
    if name == "power":
        return _form(power_series(operator, v, steps=length))
    if name == "roulette":
        return _form(roulette(operator, v, generator=torch.Generator().manual_seed(2)))
    return _form(second_order(operator, v))


LENGTHS = (2, 3, 4, 6, 8, 12)
ESTIMATORS: Mapping[str, tuple[Callable[[Tensor, Any], Sample], Sequence[Any]]] = {
    "arnoldi": (lambda A, m: _ours("arnoldi", A, m), LENGTHS),
    "arnoldi + xtrace": (lambda A, at: _xtrace(A, *at), [(k, m) for k in (3, 6, 10, 16) for m in (2, 3, 4, 6)]),
    "lanczos": (lambda A, m: _ours("lanczos", A, m), LENGTHS),
    "power": (lambda A, m: _ours("power", A, m), LENGTHS),
    "roulette": (lambda A, m: _ours("roulette", A, m), (0,)),
    "second-order": (lambda A, m: _ours("second-order", A, m), (2,)),
    "log-det series + trace": (separate_series, LENGTHS),
    "log-det roulette + trace": (separate_roulette, (0.3, 0.5, 0.8)),
    "log-det Lanczos + trace": (separate_lanczos, LENGTHS),
}
ALTERNATIVES = tuple(name for name in ESTIMATORS if name.startswith("log-det"))


def errors(A: Tensor) -> dict[str, Any]:
    """Root-mean-square error of every estimator at every budget, and E(A)."""
    exact = float(log_det_error(A))
    curves: dict[str, list[float | None]] = {}
    for name, (estimator, lengths) in ESTIMATORS.items():
        reached = [math.inf] * len(BUDGETS)
        for length in lengths:
            sample = estimator(A, length)
            variance = float(sample.values.var())
            # A bias below three of its own standard errors is not told from zero.
            bias = abs(float(sample.values.mean()) - exact)
            bias = 0.0 if bias < 3 * math.sqrt(variance / sample.values.numel()) else bias
            for i, budget in enumerate(BUDGETS):
                if budget >= sample.products:
                    reached[i] = min(reached[i], math.sqrt(bias**2 + variance * sample.products / budget))
        curves[name] = [value if math.isfinite(value) else None for value in reached]
    at = BUDGETS.index(64)
    ours = curves["arnoldi"][at]
    best = min(value for name in ("arnoldi", "arnoldi + xtrace") if (value := curves[name][at]) is not None)
    others = min(value for name in ALTERNATIVES if (value := curves[name][at]) is not None)
    assert ours is not None
    symmetry = float((A * A.T).sum() / A.square().sum())
    return {
        "exact": exact,
        "symmetry_index": symmetry,
        "budgets": list(BUDGETS),
        "rmse": curves,
        "scale": float(A.square().sum()) / 2,
        "relative_at_64": ours / abs(exact),
        "best_relative_at_64": best / abs(exact),
        "scaled_at_64": ours / (float(A.square().sum()) / 2),
        "variance_ratio": (others / max(ours, 1e-300)) ** 2,
    }


# --- cost of a product ------------------------------------------------------------------------------------------------


def product_cost(f: nn.Module, x: Tensor, steps: int = 6) -> float:
    """CPU time of Arnoldi's `steps` products over as many bare batched products of the same rows."""
    rows = rows_per_pass(x[0].numel(), x.device)
    points = torch.randn(rows, *x.shape[1:])
    v = draw_probes(rows, x[0].numel(), "rademacher", torch.Generator().manual_seed(0))

    def bare() -> None:
        leaf = points.clone().requires_grad_()
        y, u = f(leaf), v.to(points).reshape(points.shape)
        for _ in range(steps):
            (u,) = torch.autograd.grad(y, leaf, u, retain_graph=True)

    def ours() -> None:
        arnoldi(RowJacobian(f, points), v, steps=steps)

    times: dict[Callable[[], None], list[float]] = {bare: [], ours: []}
    with torch.no_grad():
        for p in f.parameters():
            p.mul_(0.5)  # whatever the weights: a local norm below 1
    for turn in range(5):
        for call, seconds in times.items():
            start = time.process_time()
            call()
            if turn:
                seconds.append(time.process_time() - start)
    return min(times[ours]) / min(times[bare])


def wide_networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks whose products cost what real ones cost, per entry of the noise."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(4, 64, 3, padding=1)]
    for _ in range(3):
        layers += [nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1)]
    layers += [nn.SiLU(), nn.Conv2d(64, 4, 3, padding=1)]
    mlp = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 256))
    return {
        "MLP, width 1024, d = 256": (mlp, torch.randn(1, 256)),
        "5 convolutions of 64 channels, d = 1024": (nn.Sequential(*layers), torch.randn(1, 4, 16, 16)),
    }


def measure() -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(1)
    return {
        "machine": f"{platform.machine()} CPU, one thread, torch {torch.__version__.split('+')[0]}",
        "probes": PROBES,
        "zoo": {name: errors(A) for name, A in zoo().items()},
        "networks": {name: errors(A) for name, A in network_jacobians().items()},
        "product_cost": {name: product_cost(f, x) for name, (f, x) in wide_networks().items()},
    }


def show(document: dict[str, Any]) -> None:
    """Print the ratios."""
    for group in ("zoo", "networks"):
        for name, found in document[group].items():
            print(
                f"{name:<42} E {found['exact']:9.3g}  arnoldi at 64 products {100 * found['relative_at_64']:8.2f} % "
                f"of E ({100 * found['best_relative_at_64']:.2f} % with xtrace), "
                f"{100 * found['scaled_at_64']:.2f} % of |J|_F^2/2;  "
                f"variance of the best alternative x {found['variance_ratio']:.3g}"
            )
    for name, cost in document["product_cost"].items():
        print(f"{name:<42} a product costs {cost:.2f} bare products")


def draw(cases: Mapping[str, Any], title: str) -> bytes:
    """Error against products, one panel per case."""
    from hnkit.output import plots

    colours = (plots.BLUE, plots.SKY, plots.GREEN, plots.PURPLE, plots.INK, plots.GREY, plots.VERMILION,
               plots.ORANGE, "#8c510a")  # fmt: skip
    columns = 2
    with plots.style():
        figure, axes = plots.new_figure(10.5, 3.1 * -(-len(cases) // columns), columns, -(-len(cases) // columns))
        for ax, (name, found) in zip(axes, cases.items(), strict=False):
            for colour, (method, curve) in zip(colours, found["rmse"].items(), strict=True):
                known = [(n, e / abs(found["exact"])) for n, e in zip(BUDGETS, curve, strict=True) if e]
                if known:
                    dashed = "--" if method in ALTERNATIVES else "-"
                    ax.plot(*zip(*known, strict=True), dashed, color=colour, marker="o", ms=3, lw=1.5, label=method)
            ax.axhline(0.01, color=plots.GREY, lw=0.8)
            ax.set(xscale="log", yscale="log", title=name, xlabel="products", ylabel="error / |E|")
        for ax in axes[len(cases) :]:
            ax.axis("off")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        return plots.to_png(figure)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """One measurement for all checks."""
    found = measure()
    show(found)
    return found


def test_variance_against_log_det_alone(document: dict[str, Any]) -> None:
    """At equal products, ten times less variance than the best alternative on low-norm Jacobians."""
    cases = {**document["zoo"], **document["networks"]}
    low = [found["variance_ratio"] for name, found in cases.items() if "norm 0.3" in name]
    assert min(low) > 10


def test_network_cases_reach_one_percent(document: dict[str, Any]) -> None:
    """Within 64 products, where E(J) is not a small difference of its own eigenvalues' terms."""
    found = [case["relative_at_64"] for case in document["networks"].values() if abs(case["symmetry_index"]) > 0.5]
    assert found
    assert max(found) < 0.05


def test_products_cost_what_they_must(document: dict[str, Any]) -> None:
    """Orthogonalisation and bookkeeping stay small beside the network."""
    assert max(document["product_cost"].values()) < 1.35


def main() -> None:
    """Measure and write what the documentation shows."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = measure()
    show(found)
    write_json(RESULTS / "bench-logdet.json", found)
    atomic_write(RESULTS / "bench-logdet-zoo.png", draw(found["zoo"], "Matrices of dimension 300"))
    atomic_write(RESULTS / "bench-logdet-networks.png", draw(found["networks"], "Jacobians of networks"))


if __name__ == "__main__":
    main()
