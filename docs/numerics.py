"""What every public function of hnkit does in float64, float32 and bfloat16: docs/numerics.md is made here.

    python docs/numerics.py           write docs/numerics.md
    python docs/numerics.py --check   exit 1 if its functions or types are stale, or an error has grown tenfold

References are mpmath at 60 digits on the very numbers that the function was given: the rounding of an input to its type
is not counted as an error of the function.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import torch
from torch import Tensor, nn

import hnkit
from hnkit import InputError

PAGE = Path(__file__).parent / "numerics.md"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
DIM, ROWS = 4, 3
LOOSER = 10.0
"""How much larger than the page says an error may be on another machine."""

mpmath.mp.dps = 60


@dataclass(frozen=True)
class Row:
    """One function in one type: what comes out, and the largest relative error against the reference."""

    function: str
    given: str
    dtype: str
    out: str
    error: float


@dataclass(frozen=True)
class Edge:
    """What a function does at the edge of its domain: a value, or the error it raises."""

    call: str
    outcome: str
    run: Callable[[], Any]


# --- inputs -----------------------------------------------------------------------------------------------------


def matrix(dtype: torch.dtype, norm: float = 0.5) -> Tensor:
    """A fixed matrix of spectral norm about `norm`, rounded to a type."""
    A = torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (norm * A / torch.linalg.matrix_norm(A, 2)).to(dtype)


def noise(dtype: torch.dtype) -> Tensor:
    """Fixed noise, `(3, 4)`, rounded to a type."""
    return torch.randn(ROWS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)


def network(dtype: torch.dtype) -> nn.Sequential:
    """`f(x) = tanh(W x)` with the matrix above."""
    layer = nn.Linear(DIM, DIM, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(matrix(dtype))
    return nn.Sequential(layer, nn.Tanh()).eval().requires_grad_(False)


# --- references -------------------------------------------------------------------------------------------------


def exact(values: Tensor) -> Any:
    """The numbers of a tensor, exactly."""
    return mpmath.matrix(values.double().tolist())


def h(s: Any) -> Any:
    return -mpmath.log(1 - s) - s


def e_term(A: Any) -> Any:
    """`tr A - log|det(I + A)|`."""
    return sum(A[i, i] for i in range(A.rows)) - mpmath.log(abs(mpmath.det(mpmath.eye(A.rows) + A)))


def singular_values(A: Any) -> list[Any]:
    return sorted(mpmath.svd_r(A, compute_uv=False), reverse=True)


def frobenius(A: Any) -> Any:
    return mpmath.sqrt(sum(A[i, j] ** 2 for i in range(A.rows) for j in range(A.cols)))


def field_of_values(A: Any) -> tuple[Any, Any]:
    symmetric, skew = (A + A.T) / 2, (A - A.T) / 2
    least = min(mpmath.eigsy(symmetric, eigvals_only=True))
    upper = e_term(symmetric)
    return upper - frobenius(skew) ** 2 / (2 * (1 + least) ** 2), upper


def true_rows(dtype: torch.dtype) -> list[tuple[Any, Any]]:
    """`f(x)` and `J(x)` at every noise."""
    W, rows = exact(matrix(dtype)), []
    for row in noise(dtype):
        value = (W * exact(row[:, None])).apply(mpmath.tanh)
        rows.append((value, mpmath.diag([1 - v**2 for v in value]) * W))
    return rows


def true_kl(dtype: torch.dtype) -> Any:
    return mpmath.fsum(frobenius(f) ** 2 / 2 + e_term(J) for f, J in true_rows(dtype)) / ROWS


def _error(found: Any, reference: Any) -> float:
    value = found.item() if isinstance(found, Tensor) else found
    return float(abs(mpmath.mpf(value) - reference) / abs(reference))


def _largest(found: Tensor, reference: Any) -> float:
    """Largest difference of a matrix, relative to its largest entry."""
    difference = exact(found.detach()) - reference
    return float(max(map(abs, difference)) / max(map(abs, reference)))


# --- the table --------------------------------------------------------------------------------------------------


def _name(dtype: torch.dtype | type) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype.__name__


def rows() -> list[Row]:
    """Every public function in every type."""
    return [row for name, dtype in DTYPES.items() for row in (*_of_numbers(name, dtype), *_of_maps(name, dtype))]


def _of_numbers(name: str, dtype: torch.dtype) -> list[Row]:
    """Functions of matrices and of norms."""
    A, tiny = matrix(dtype), matrix(dtype, 1e-9)
    L = torch.tensor(0.5, dtype=dtype) ** 3 + torch.tensor(0.375, dtype=dtype)
    F, small = torch.tensor(0.75, dtype=dtype), torch.tensor(2.0**-30, dtype=dtype)
    (mL,), (mF,), (ms,) = exact(L.reshape(1, 1)), exact(F.reshape(1, 1)), exact(small.reshape(1, 1))
    values = singular_values(exact(A))
    lower, upper = field_of_values(exact(A))
    found = hnkit.field_of_values_bounds(A)
    calls = [
        ("log_det_error", "|A| = 0.5", hnkit.log_det_error(A), e_term(exact(A))),
        ("log_det_error", "|A| = 1e-9", hnkit.log_det_error(tiny), e_term(exact(tiny))),
        ("singular_value_bound", "|A| = 0.5", hnkit.singular_value_bound(A), mpmath.fsum(map(h, values))),
        ("field_of_values_bounds", "lower, |A| = 0.5", found[0], lower),
        ("field_of_values_bounds", "upper, |A| = 0.5", found[1], upper),
        ("theorem7_bound", "L = 0.5", hnkit.theorem7_bound(DIM, L), DIM * h(mL)),
        ("theorem7_bound", "L = 2^-30", hnkit.theorem7_bound(DIM, small), DIM * h(ms)),
        ("local_theorem7_bound", "L = 0.5", hnkit.local_theorem7_bound(DIM, L), DIM * h(mL)),
        ("frobenius_bound", "L = 0.5", hnkit.frobenius_bound(F, L), mF**2 / mL**2 * h(mL)),
        ("second_order_remainder_bound", "L = 0.5", hnkit.second_order_remainder_bound(F, L),
         mF**2 / mL**2 * (h(mL) - mL**2 / 2)),
        ("second_order_remainder_bound", "L = 2^-30", hnkit.second_order_remainder_bound(F, small),
         mF**2 / ms**2 * (h(ms) - ms**2 / 2)),
    ]  # fmt: skip
    return [Row(f, given, name, _name(value.dtype), _error(value, reference)) for f, given, value, reference in calls]


def _of_maps(name: str, dtype: torch.dtype) -> list[Row]:
    """Functions of a map that computes in the type, at noise of the type."""
    f, x, truth = network(dtype), noise(dtype), true_rows(dtype)
    kl, norms = true_kl(dtype), [singular_values(J)[0] for _, J in truth]
    J = hnkit.dense_jacobian(f, x)
    local = hnkit.local_lipschitz(f, x)
    sampled, upper = hnkit.lipschitz_lower(f, x, ascent_steps=0), hnkit.lipschitz_upper(f)
    estimate, plain = hnkit.noise_kl(f, x), hnkit.noise_kl(f, x, method="l2")
    half = mpmath.fsum(frobenius(value) ** 2 / 2 for value, _ in truth) / ROWS
    operator = hnkit.RowJacobian(f, x)
    v = torch.ones(ROWS, DIM, dtype=torch.float64)
    ones = mpmath.matrix([1] * DIM)
    loss = hnkit.NoiseLoss(kl="exact")(f, x, lambda y: y, lambda y: 0 * y.sum(1))
    largest = singular_values(exact(matrix(dtype)))[0]
    total = [frobenius(value) ** 2 / 2 + e_term(jacobian) for value, jacobian in truth]
    problem = _Still()
    gap = hnkit.optimality_gap(problem, f, x, form="stein")
    with torch.no_grad():
        injected = hnkit.injected_bound(f(x), hnkit.NoiseInjection(0.25))
    found = [
        Row("dense_jacobian", "tanh network", name, _name(J.dtype),
            max(_largest(J[i], truth[i][1]) for i in range(ROWS))),
        Row("RowJacobian.vjp", "tanh network", name, _name(operator.vjp(v).dtype),
            max(_largest(operator.vjp(v)[i, :, None], truth[i][1].T * ones) for i in range(ROWS))),
        Row("RowJacobian.jvp", "tanh network", name, _name(operator.jvp(v).dtype),
            max(_largest(operator.jvp(v)[i, :, None], truth[i][1] * ones) for i in range(ROWS))),
        Row("noise_kl", "exact", name, _name(estimate.per_sample.dtype), _error(estimate.value, kl)),
        Row("noise_kl", "l2", name, _name(plain.per_sample.dtype), _error(plain.value, half)),
        _of_verdict(name, dtype),
        Row("local_lipschitz", "tanh network", name, _name(local.dtype),
            max(_error(local[i], norms[i]) for i in range(ROWS))),
        Row("lipschitz_lower", "3 samples", name, _name(type(sampled.value)), _error(sampled.value, max(norms))),
        Row("lipschitz_upper", "tanh network", name, _name(type(upper.value)), _error(upper.value, largest)),
        Row("NoiseLoss", "exact", name, _name(loss.total.dtype),
            max(_error(loss.total[i], total[i]) for i in range(ROWS))),
        Row("injected_bound", "a quarter injected", name, _name(type(injected.nats.value)),
            _error(injected.nats.value, 3 * half)),
        Row("optimality_gap", "zero reward", name, _name(gap.per_sample.dtype), _error(gap.value, kl)),
    ]  # fmt: skip
    report = hnkit.verify_bound(f, (DIM,), samples=ROWS, seed=0)
    figure = next(q for q in report.figures if q.name == "KL (Stein form)")
    again = hnkit.verify_bound(network(dtype).double(), (DIM,), samples=ROWS, seed=0)
    twin = next(q for q in again.figures if q.name == "KL (Stein form)")
    certain = hnkit.certify_injective(f)
    return [
        *found,
        Row("verify_bound", "KL, against float64", name, _name(type(figure.value)),
            _error(figure.value, mpmath.mpf(twin.value))),
        Row("certify_injective", f"tanh network: {certain.status}", name, "str", 0.0),
        Row("check_map", f"tanh network: {_accepted(f, x)}", name, "str", 0.0),
        *_of_rewards(name, dtype),
    ]  # fmt: skip


def _of_verdict(name: str, dtype: torch.dtype) -> Row:
    """In one dimension every probe is exact: `tr(J^2) / |f|^2` of x/2 is n / sum x^2."""
    x = noise(dtype)[:, :1]
    verdict = hnkit.l2_verdict(_half, x)
    reference = ROWS / mpmath.fsum(value**2 for value in exact(x))
    return Row(
        "l2_verdict",
        "x/2, d = 1: tr J²/|f|²",
        name,
        _name(type(verdict.ratio.value)),
        _error(verdict.ratio.value, reference),
    )


def _accepted(f: Callable[[Tensor], Tensor], x: Tensor) -> str:
    hnkit.check_map(f, x)
    return "accepted"


def _jackknifed_log_mean(values: list[Any]) -> Any:
    """`log E` of positive values without its bias of order 1/n, each sample left out in turn."""
    n, total = len(values), mpmath.fsum(values)
    left = mpmath.fsum(mpmath.log((total - value) / (n - 1)) for value in values) / n
    return n * mpmath.log(total / n) - (n - 1) * left


def _of_rewards(name: str, dtype: torch.dtype) -> list[Row]:
    """The bounds from rewards, and a rule of one's own for a module's certificate."""
    generator = torch.Generator().manual_seed(3)
    base = [row.to(dtype) for row in torch.randn(20, 40, dtype=torch.float64, generator=generator)]
    steered = [row.to(dtype) for row in 2 + torch.randn(20, 40, dtype=torch.float64, generator=generator)]
    kl = [0.5 * row.square() for row in steered]
    alpha = mpmath.mpf(2)
    terms = [
        mpmath.fsum(mpmath.mpf(k) - mpmath.mpf(r) / alpha for k, r in zip(ks.tolist(), rs.tolist(), strict=True)) / 40
        + _jackknifed_log_mean([mpmath.exp(mpmath.mpf(b) / alpha) for b in bs.tolist()])
        for ks, rs, bs in zip(kl, steered, base, strict=True)
    ]
    reference = mpmath.fsum(terms) / len(terms)
    gap = hnkit.gap_lower_bound(kl, steered, base, 2.0)
    nats = hnkit.nats_lower_bound(base, steered)
    twin = hnkit.nats_lower_bound([b.double() for b in base], [s.double() for s in steered])

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    hnkit.register(Half)(lambda module, visit: hnkit.lipschitz.JacobianBounds(0.5, 0.5, 0.5))
    ruled = hnkit.lipschitz_upper(Half())
    return [
        Row("gap_lower_bound", "its estimate", name, _name(type(gap.lower)), _error(gap.estimate, reference)),
        Row("nats_lower_bound", "against float64", name, _name(type(nats)), _error(nats, mpmath.mpf(twin))),
        Row("register", "a rule of one's own", name, _name(type(ruled.value)), _error(ruled.value, mpmath.mpf("0.5"))),
    ]  # fmt: skip


class _Still:
    """A generator whose reward is 0: the tilted law is the base law, and the gap is the KL."""

    name, alpha, noise_shape = "still", 1.0, (DIM,)

    def generate(self, x: Tensor) -> Tensor:
        return x

    def reward(self, y: Tensor) -> Tensor:
        return 0 * y.sum(1)

    def log_z(self) -> float:
        return 0.0


# --- edges ------------------------------------------------------------------------------------------------------


def _half(x: Tensor) -> Tensor:
    return x / 2


def _sign(x: Tensor) -> Tensor:
    return 0.5 * torch.tanh(x)


def edges() -> list[Edge]:
    """Overflow, denormal numbers, one dimension, one sample, nothing at all."""
    k, f64 = hnkit, torch.float64
    eye = torch.eye(2, dtype=f64)
    x1 = torch.ones(1, 1, dtype=f64)
    return [
        Edge("log_det_error(1e200 I)", "2e+200", lambda: k.log_det_error(1e200 * eye)),
        Edge("log_det_error(1e308 I)", "inf", lambda: k.log_det_error(1e308 * eye)),
        Edge("log_det_error(-I), singular", "inf", lambda: k.log_det_error(-eye)),
        Edge("log_det_error(1e-160 I)", "9.99989e-321", lambda: k.log_det_error(1e-160 * eye)),
        Edge("log_det_error(5e-324 I)", "0", lambda: k.log_det_error(5e-324 * eye)),
        Edge("log_det_error(1e-20 I) in float32", "9.99995e-41", lambda: k.log_det_error(1e-20 * eye.float())),
        Edge("log_det_error(0)", "0", lambda: k.log_det_error(0 * eye)),
        Edge("log_det_error([[0.5]])", "0.0945349", lambda: k.log_det_error(0.5 * eye[:1, :1])),
        Edge("log_det_error of shape (0, 2, 2)", "shape (0,)", lambda: k.log_det_error(eye[None][:0])),
        Edge("log_det_error of shape (0, 0)", "InputError", lambda: k.log_det_error(eye[:0, :0])),
        Edge("log_det_error of nan", "NonFiniteError", lambda: k.log_det_error(math.nan * eye)),
        Edge("log_det_error of integers", "InputError", lambda: k.log_det_error(eye.long())),
        Edge("theorem7_bound(1, 0)", "0", lambda: k.theorem7_bound(1, 0.0)),
        Edge("theorem7_bound(1, 5e-324)", "1.97626e-323", lambda: k.theorem7_bound(1, 5e-324)),
        Edge("theorem7_bound(1, 1e-160)", "5.01971e-321", lambda: k.theorem7_bound(1, 1e-160)),
        Edge("theorem7_bound(4, 1 - 2^-53)", "142.947", lambda: k.theorem7_bound(4, 1 - 2.0**-53)),
        Edge("theorem7_bound(4, 1)", "InputError", lambda: k.theorem7_bound(4, 1.0)),
        Edge("theorem7_bound(4, nan)", "InputError", lambda: k.theorem7_bound(4, math.nan)),
        Edge("theorem7_bound(0, 0.5)", "InputError", lambda: k.theorem7_bound(0, 0.5)),
        Edge("theorem7_bound(4, empty)", "shape (0,)", lambda: k.theorem7_bound(4, torch.zeros(0))),
        Edge("frobenius_bound(1e200, 0.5)", "inf", lambda: k.frobenius_bound(1e200, 0.5)),
        Edge("frobenius_bound(inf, 0.5)", "InputError", lambda: k.frobenius_bound(math.inf, 0.5)),
        Edge("frobenius_bound(2, 0)", "2", lambda: k.frobenius_bound(2.0, 0.0)),
        Edge("frobenius_bound(2, 5e-324)", "2", lambda: k.frobenius_bound(2.0, 5e-324)),
        Edge(
            "second_order_remainder_bound(2, 5e-324)", "2.96439e-323",
            lambda: k.second_order_remainder_bound(2.0, 5e-324),
        ),
        Edge("second_order_remainder_bound(2, 0)", "0", lambda: k.second_order_remainder_bound(2.0, 0.0)),
        Edge("singular_value_bound([[0.5]])", "0.193147", lambda: k.singular_value_bound(eye[:1, :1] / 2)),
        Edge("singular_value_bound(I)", "InputError", lambda: k.singular_value_bound(eye)),
        Edge("singular_value_bound of shape (0, 2, 2)", "shape (0,)", lambda: k.singular_value_bound(eye[None][:0])),
        Edge("field_of_values_bounds(1e300 I)", "(2e+300, 2e+300)", lambda: k.field_of_values_bounds(1e300 * eye)),
        Edge("field_of_values_bounds(-I)", "InputError", lambda: k.field_of_values_bounds(-eye)),
        Edge("dense_jacobian at d = 1, n = 1", "0.5", lambda: k.dense_jacobian(_half, x1)),
        Edge("dense_jacobian of no rows", "InputError", lambda: k.dense_jacobian(_half, x1[:0])),
        Edge("local_lipschitz at d = 1, n = 1", "0.5", lambda: k.local_lipschitz(_half, x1)),
        Edge("local_lipschitz of no rows", "InputError", lambda: k.local_lipschitz(_half, x1[:0])),
        Edge("local_lipschitz(5e-324 x), d = 32", "0", lambda: k.local_lipschitz(_denormal, _wide())),
        Edge("local_lipschitz(1e300 x), d = 32", "1e+300", lambda: k.local_lipschitz(_huge, _wide())),
        Edge("lipschitz_lower at d = 1, n = 1", "0.5", lambda: k.lipschitz_lower(_half, x1).value),
        Edge("noise_kl at d = 1, n = 1", "0.219535 ± nan", lambda: _kl(_half, x1)),
        Edge("l2_verdict of f = 0", "0", lambda: k.l2_verdict(torch.zeros_like, torch.ones(2, 3)).within),
        Edge("l2_verdict at n = 1", "InputError", lambda: k.l2_verdict(_half, x1)),
        Edge("noise_kl of f = 0", "0 ± 0", lambda: _kl(torch.zeros_like, torch.ones(2, 3))),
        Edge("noise_kl of no rows", "InputError", lambda: _kl(_half, x1[:0])),
        Edge("noise_kl of 1e-160 x", "1.99998e-320 ± 0", lambda: _kl(_faint, torch.ones(2, 2, dtype=f64))),
        Edge("noise_kl of 1e200 x", "inf ± nan", lambda: _kl(_enormous, torch.ones(2, 2, dtype=f64))),
        Edge("noise_kl at x = nan", "NonFiniteError", lambda: _kl(_half, math.nan * x1)),
        Edge("NoiseLoss at d = 1, n = 1", "0.125", lambda: _loss(_half, x1)),
        Edge("NoiseLoss of no rows", "InputError", lambda: _loss(_half, x1[:0])),
        Edge("injected_bound of one row", "0.5 ± unknown", lambda: str(k.injected_bound(x1, k.NoiseInjection()).nats)),
        Edge("injected_bound of no rows", "InputError", lambda: k.injected_bound(x1[:0], k.NoiseInjection())),
        Edge("verify_bound at d = 1, n = 1", "no check fails", lambda: _verdict(_sign)),
    ]  # fmt: skip


def _wide() -> Tensor:
    return torch.ones(1, 32, dtype=torch.float64)


def _denormal(x: Tensor) -> Tensor:
    return 5e-324 * x


def _huge(x: Tensor) -> Tensor:
    return 1e300 * x


def _faint(x: Tensor) -> Tensor:
    return 1e-160 * x


def _enormous(x: Tensor) -> Tensor:
    return 1e200 * x


def _kl(f: Callable[[Tensor], Tensor], x: Tensor) -> str:
    estimate = hnkit.noise_kl(f, x)
    return f"{estimate.value:.6g} ± {estimate.stderr:.6g}"


def _loss(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return hnkit.NoiseLoss()(f, x, lambda y: y, lambda y: 0 * y.sum(1)).total


def _verdict(f: Callable[[Tensor], Tensor]) -> str:
    return "no check fails" if hnkit.verify_bound(f, (1,), samples=1).ok else "a check fails"


def outcome(run: Callable[[], Any]) -> str:
    """What a call gives, in a few characters."""
    try:
        value = run()
    except InputError as error:
        return type(error).__name__
    if isinstance(value, tuple):
        return f"({', '.join(outcome(lambda part=part: part) for part in value)})"
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return f"shape {tuple(value.shape)}"
        value = value.item()
    return value if isinstance(value, str) else f"{value:.6g}"


# --- the page ---------------------------------------------------------------------------------------------------

LEAD = """# Numbers: types, accuracy, edges

Made by `docs/numerics.py`; do not edit. The largest relative error of each function is taken on fixed inputs against
mpmath at 60 digits, on the very numbers that were given (`verify_bound` against the same network in float64). A network
keeps its own type; what is computed from its values and products is float64. In bfloat16 an error is therefore the
network's own rounding of f and J. `certify_injective` and `lipschitz_upper` speak of the weights as they are stored.
"""
EDGES = """
## Edges

Overflow gives `inf`, underflow 0 or a denormal number, one sample no error bar (`nan`), and an empty batch of *noise*
an error; an empty batch of *matrices* or constants gives an empty result.
"""
SEEDS = """
## Seeds, processes and threads

Under one seed every figure is a function of its arguments: two processes on one machine agree to the last bit, whatever
the hash seed. The number of threads may change the order of sums: figures at 1 and 2 threads agree to a relative 1e-9
in float64 (`tests/robustness/test_numerics.py`).
"""


def _ceiling(error: float) -> str:
    """An error rounded up to one digit."""
    if error == 0:
        return "0"
    power = math.floor(math.log10(error))
    return f"{math.ceil(error / 10**power) * 10.0**power:.0e}".replace("e-0", "e-")


def page() -> str:
    """docs/numerics.md."""
    table = ["| function | input | " + " | ".join(DTYPES) + " |", "| --- | --- |" + " --- |" * len(DTYPES)]
    by_call: dict[tuple[str, str], list[Row]] = {}
    for row in rows():
        by_call.setdefault((row.function, row.given), []).append(row)
    for (function, given), found in by_call.items():
        cells = " | ".join(f"{row.out}, {_ceiling(row.error)}" for row in found)
        table.append(f"| `{function}` | {given.replace('|', chr(92) + '|')} | {cells} |")
    lines = ["| call | outcome |", "| --- | --- |", *(f"| `{edge.call}` | {edge.outcome} |" for edge in edges())]
    return "\n".join([LEAD, *table, EDGES, *lines, SEEDS])


def stale() -> list[str]:
    """What of the page is no longer so: other functions or types, or an error that is ten times what it says."""
    committed, made = (_cells(text) for text in (PAGE.read_text(encoding="utf-8"), page()))
    found = [f"{call}: on one side only" for call in sorted(committed.keys() ^ made.keys())]
    for call in committed.keys() & made.keys():
        for old, new in zip(committed[call], made[call], strict=True):
            (old_type, old_error), (new_type, new_error) = old, new
            if old_type != new_type or new_error > LOOSER * max(old_error, 1e-16):
                found.append(f"{call}: the page says {old}, it is {new}")
    return found


def _cells(text: str) -> dict[str, list[tuple[str, float]]]:
    """`function | input` -> (type, error) per column, and `call` -> (outcome, 0)."""
    found: dict[str, list[tuple[str, float]]] = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.replace("\\|", chr(0)).strip("| ").split(" | ")]
        if line.startswith("| `") and len(parts) == 2 + len(DTYPES):
            cells = [part.rpartition(", ") for part in parts[2:]]
            found[f"{parts[0]} | {parts[1]}"] = [(kind, float(error)) for kind, _, error in cells]
        elif line.startswith("| `"):
            found[parts[0]] = [(parts[1], 0.0)]
    return found


def public_functions() -> list[str]:
    """Names of the functions that hnkit exports."""
    return [name for name in hnkit.__all__ if inspect.isfunction(getattr(hnkit, name))]


def main() -> None:
    """Write the page, or check it."""
    if sys.argv[1:] == ["--check"]:
        problems = stale()
        print("\n".join(problems) or "docs/numerics.md is up to date")
        sys.exit(bool(problems))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
