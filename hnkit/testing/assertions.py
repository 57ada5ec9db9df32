"""Assertions about noise maps, losses and estimates, for anyone's test suite; `hnkit.testing` re-exports them.

Each raises `AssertionError` with the numbers that disagree. Statistical ones take independent samples and compare the
z-score of a mean with the quantile of a stated false-alarm rate: a correct implementation fails with that probability
(to the accuracy of the central limit theorem), and repeats exactly under a fixed seed. Bad arguments, and hypotheses
that are not met, raise `hnkit.InputError` instead: they say nothing about what is tested.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.special import ndtri
from torch import Tensor

from hnkit.bounds import BOUNDS, local_theorem7_bound, theorem7_bound
from hnkit.errors import InputError
from hnkit.internal.stats import mean_and_stderr, rounded_up
from hnkit.jacobian import check_batch, check_map, dense_jacobian, evaluate
from hnkit.kl.divergence import Form, Method, noise_kl
from hnkit.linalg.matrices import MatrixNumbers
from hnkit.lipschitz.local import local_lipschitz
from hnkit.logdet import log_det_error
from hnkit.maps import NoiseMap

__all__ = [
    "assert_bounds",
    "assert_kl",
    "assert_kl_identity",
    "assert_lipschitz",
    "assert_map",
    "assert_mean",
    "assert_moments",
    "assert_rows_independent",
    "assert_theorem7",
]

_MIN_SAMPLES = 32  # fewer make the normal quantile of a z-test meaningless
_ROUNDING = 1e-10  # relative slack of deterministic comparisons in float64


def fail(message: str) -> None:
    __tracebackhide__ = True
    raise AssertionError(message)


def _threshold(false_alarm: float, tests: int = 1) -> float:
    if not 0 < false_alarm < 1:
        raise InputError(f"false_alarm = {false_alarm}: a probability strictly between 0 and 1")
    return -float(ndtri(false_alarm / (2 * tests)))


def require_samples(count: int) -> None:
    if count < _MIN_SAMPLES:
        raise InputError(f"{count} samples: a z-test needs at least {_MIN_SAMPLES}")


def assert_mean(
    samples: Tensor, expected: float, *, false_alarm: float = 1e-6, bias_bound: float = 0.0, what: str = "the mean"
) -> None:
    """Assert that independent samples have a given mean, by a two-sided z-test.

    Fails if `|mean - expected| > bias_bound + z stderr`, `z` the normal quantile at `false_alarm`. Samples that are all
    equal have to equal `expected` up to rounding.

    Args:
        samples: `(n,)`, independent, `n >= 32`.
        expected: the mean claimed.
        false_alarm: probability of failing although the claim is true.
        bias_bound: a systematic error that is allowed for, in the units of the samples.
        what: what the samples are, for the message.

    Raises:
        AssertionError: the mean differs; the message gives both, the standard error and the z-score.
        InputError: fewer than 32 samples, or a bad `false_alarm`.
    """
    __tracebackhide__ = True
    limit = _threshold(false_alarm)
    require_samples(samples.numel())
    mean, stderr = mean_and_stderr(samples)
    rounding = _ROUNDING * max(1.0, float(samples.abs().max()), abs(expected)) / math.sqrt(samples.numel())
    distance = abs(mean - expected)
    if not distance <= bias_bound + limit * stderr + rounding:
        score = distance / stderr if stderr > 0 else math.inf
        bias = f" and a bias of at most {rounded_up(bias_bound, 3)}" if bias_bound else ""
        fail(
            f"{what} is {mean:.8g} +- {stderr:.2g}, expected {expected:.8g}: off by {distance:.3g} = {score:.1f} "
            f"standard errors (n = {samples.numel()}; {limit:.2f}{bias} are allowed at false alarm {false_alarm:g})"
        )


def assert_moments(samples: Tensor, mean: Tensor, covariance: Tensor, *, false_alarm: float = 1e-6) -> None:
    """Assert the mean and covariance of independent samples, entry by entry, by z-tests.

    With `u = x - mean` the entries tested are `E u_i = 0` and `E u_i u_j = covariance_ij`; the false-alarm rate is
    divided among them (Bonferroni).

    Args:
        samples: `(n, d)`, independent, `n >= 32`.
        mean: `(d,)`.
        covariance: `(d, d)`.
        false_alarm: probability of failing although both are right.

    Raises:
        AssertionError: naming the entry that is furthest off.
        InputError: shapes that do not fit, or fewer than 32 samples.
    """
    __tracebackhide__ = True
    n, d = samples.shape[0], samples[0].numel()
    if mean.shape != (d,) or covariance.shape != (d, d):
        raise InputError(
            f"mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)} do not fit samples of {d} entries"
        )
    require_samples(n)
    centred = samples.detach().reshape(n, d).double() - mean.double()
    rows, columns = torch.triu_indices(d, d)
    products = centred[:, rows] * centred[:, columns]
    values = torch.cat([centred, products], 1)
    expected = torch.cat([torch.zeros(d, dtype=torch.float64), covariance.double()[rows, columns]])
    names = [f"mean entry {i}" for i in range(d)]
    names += [f"covariance entry ({int(i)}, {int(j)})" for i, j in zip(rows, columns, strict=True)]
    stderr = values.std(0) / math.sqrt(n)
    distance = (values.mean(0) - expected).abs()
    scale = values.abs().amax(0) + expected.abs()
    score = distance / (stderr + _ROUNDING * scale).clamp_min(torch.finfo(torch.float64).tiny)
    worst, limit = int(score.argmax()), _threshold(false_alarm, len(names))
    if not float(score[worst]) <= limit:
        target = float(mean[worst]) if worst < d else float(expected[worst])
        found = float(values.mean(0)[worst]) + (float(mean[worst]) if worst < d else 0.0)
        fail(
            f"{names[worst]} is {found:.6g} +- {float(stderr[worst]):.2g}, expected {target:.6g}: "
            f"{float(score[worst]):.1f} standard errors off (n = {n}; {limit:.2f} are allowed at false alarm "
            f"{false_alarm:g} over {len(names)} entries)"
        )


def assert_kl_identity(f: NoiseMap, x: Tensor, *, false_alarm: float = 1e-6) -> None:
    """Assert that the two forms of the noise-space KL have the same mean over Gaussian noise.

    Their difference is Stein's identity, `E[x . f(x)] = E[tr J(x)]`. It fails for a map that jumps, whose derivative
    is wrong, or for `x` that is not standard normal.

    Args:
        f: batch-first map, rows independent, differentiable.
        x: `(n, *shape)`, independent draws of `N(0, I)`, `n >= 32`.
        false_alarm: probability of failing although the identity holds.

    Raises:
        AssertionError: with both values, the difference and its z-score.
        InputError: a map that is none (see `noise_kl`), or too few samples.

    Source:
        arXiv 2508.09968, Lemma 6 and eq. 53, 55.
    """
    __tracebackhide__ = True
    check_batch(x)
    require_samples(x.shape[0])
    stein, change = noise_kl(f, x, form="stein"), noise_kl(f, x, form="change-of-variables", check=False)
    what = (
        "Stein's identity fails (is x standard normal, f continuous, its derivative right?): the KL is "
        f"{stein.value:.6g} in the Stein form, {change.value:.6g} by change of variables; the mean of x.f - tr J"
    )
    assert_mean(change.per_sample - stein.per_sample, 0.0, false_alarm=false_alarm, what=what)


def assert_kl(
    f: NoiseMap,
    x: Tensor,
    expected: float,
    *,
    method: Method = "exact",
    form: Form = "stein",
    false_alarm: float = 1e-6,
    bias_bound: float = 0.0,
    **options: Any,
) -> None:
    """Assert the noise-space KL of a map against a value known otherwise, by a z-test over the samples.

    Args:
        f: batch-first map; its KL is `KL(law of x + f(x) || N(0, I))` where `x + f(x)` is injective.
        x: `(n, *shape)`, independent draws of `N(0, I)`, `n >= 32`.
        expected: nats.
        method: as in `noise_kl`.
        form: as in `noise_kl`.
        false_alarm: probability of failing although the value is right.
        bias_bound: allowed systematic error, nats, for methods that truncate.
        **options: further options, which are passed to `noise_kl`.

    Raises:
        AssertionError: with the estimate, its standard error and the z-score.
    """
    __tracebackhide__ = True
    estimate = noise_kl(f, x, method=method, form=form, **options)
    what = f"the noise-space KL (method {method}, {form} form, nats)"
    assert_mean(estimate.per_sample, expected, false_alarm=false_alarm, bias_bound=bias_bound, what=what)


def assert_theorem7(f: NoiseMap, x: Tensor, *, lipschitz: float | None = None) -> None:
    """Assert `|E(J(x))| <= d h(L)` at every row, with a claimed constant or with the local norm.

    Args:
        f: batch-first map.
        x: `(n, *shape)`.
        lipschitz: a claimed Lipschitz constant below 1; `None`: `|J(x)|_2` at each row.

    Raises:
        AssertionError: naming the sample, `|E(J)|`, the bound and the local norm there.
        InputError: the constant, or a local norm, is not below 1: the theorem says nothing.

    Source:
        arXiv 2508.09968, Theorem 7.
    """
    __tracebackhide__ = True
    jacobians = dense_jacobian(f, x)
    dim = jacobians.shape[-1]
    norms = torch.linalg.matrix_norm(jacobians, 2)
    errors = log_det_error(jacobians).abs()
    if lipschitz is None:
        bounds, constant = local_theorem7_bound(dim, norms), "the local norm"
    else:
        bounds = torch.full_like(norms, theorem7_bound(dim, lipschitz))
        constant = f"the claimed constant {lipschitz:.6g}"
    excess = errors - bounds * (1 + _ROUNDING) - torch.finfo(torch.float64).tiny
    worst = int(excess.argmax())
    if not float(excess[worst]) <= 0:
        fail(
            f"Theorem 7 fails at sample {worst}: |E(J)| = {float(errors[worst]):.8g} exceeds d h(L) = "
            f"{rounded_up(float(bounds[worst]), 8)} nats with L {constant}, d = {dim}, "
            f"|J|_2 = {float(norms[worst]):.6g} there"
        )


def assert_bounds(A: Tensor) -> None:
    """Assert every bound of `hnkit.bounds` on `E(A)` that applies to the matrices, and their order.

    Those of `hnkit.bounds.BOUNDS`: field of values where `lambda_min(S) > -1`; and where `|A|_2 < 1` the second-order
    remainder and `|E| <= singular values <= Frobenius <= Theorem 7`.

    Args:
        A: `(..., d, d)`.

    Raises:
        AssertionError: naming the two quantities that are out of order.
    """
    __tracebackhide__ = True
    d = A.shape[-1]
    for index, matrix in enumerate(A.reshape(-1, 1, d, d)):
        where = f" (matrix {index})" if A.ndim > 2 else ""
        numbers = MatrixNumbers(matrix)
        room = {"norm": 1 - float(numbers.norm), "cone": 1 + float(numbers.least)}
        scale = _ROUNDING * float(numbers.frobenius_square)
        for bound in BOUNDS.values():
            if room[bound.hypothesis] <= 1e-9:
                continue
            value = float(bound.bound(numbers))
            slack = (
                scale * max(1.0, room["cone"] ** -2) if bound.hypothesis == "cone" else max(scale, _ROUNDING * value)
            )
            _ordered(float(bound.left(numbers)), value, bound.left_label, bound.label, slack, where)
            if bound.looser is not None:
                looser = BOUNDS[bound.looser]
                above = float(looser.bound(numbers))
                _ordered(value, above, bound.label, looser.label, _ROUNDING * above, where)


def _ordered(small: float, large: float, small_name: str, large_name: str, slack: float, where: str) -> None:
    __tracebackhide__ = True
    if not small <= large + slack + torch.finfo(torch.float64).tiny:
        fail(f"{small_name} = {small:.10g} exceeds {large_name} = {large:.10g} by {small - large:.3g} nats{where}")


def assert_lipschitz(f: NoiseMap, constant: float, x: Tensor, *, tolerance: float = 1e-6) -> None:
    """Assert that nothing seen at the given points contradicts a Lipschitz constant.

    `|J(x_i)|_2 <= constant` at every row, and `|f(x_i) - f(x_j)| <= constant |x_i - x_j|` for every pair of rows.
    Points can refute a constant, never prove one: for a proof use `lipschitz_upper`.

    Args:
        f: batch-first map, rows independent.
        constant: the constant claimed, at least 0.
        x: `(n, *shape)`.
        tolerance: relative excess that is put down to rounding.

    Raises:
        AssertionError: naming the sample or the pair, and the constant needed there.
        InputError: a negative constant.
    """
    __tracebackhide__ = True
    if not constant >= 0:
        raise InputError(f"constant = {constant}: a Lipschitz constant is at least 0")
    norms = local_lipschitz(f, x)
    worst = int(norms.argmax())
    if not float(norms[worst]) <= constant * (1 + tolerance):
        fail(f"|J(x)|_2 = {float(norms[worst]):.8g} at sample {worst} exceeds the Lipschitz constant {constant:.8g}")
    with torch.no_grad():
        values = evaluate(f, x).flatten(1).double()
    apart = torch.cdist(x.flatten(1).double(), x.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist")
    moved = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
    rounding = 8 * torch.finfo(x.dtype).eps * float(values.abs().max()) * math.sqrt(values.shape[1])
    excess = moved - constant * (1 + tolerance) * apart - rounding
    i, j = divmod(int(excess.argmax()), x.shape[0])
    if float(excess[i, j]) > 0:
        fail(
            f"|f(x) - f(y)| = {float(moved[i, j]):.8g} at samples {i} and {j}, {float(apart[i, j]):.8g} apart: a "
            f"Lipschitz constant of at least {float(moved[i, j] / apart[i, j]):.8g} is needed, not {constant:.8g}"
        )


def assert_map(f: NoiseMap, x: Tensor, *, rows: int = 8, jvp: bool = True) -> None:
    """Assert that a function keeps the promises that every figure of hnkit rests on; see `hnkit.check_map`.

    Its rows are independent of each other, of their position and of their number; it is a function of `x` and leaves
    it alone; and the derivatives that autograd reports, `J^T u` and `J v`, are those of finite differences and of each
    other. A straight-through estimator, a detached part and a wrong backward fail.

    Args:
        f: batch-first map.
        x: `(n, *shape)`.
        rows: the most rows that are tried.
        jvp: try `J v` too.

    Raises:
        AssertionError: saying what is not kept, with the size of the difference.
        InputError: `x` is no batch of noise.
    """
    __tracebackhide__ = True
    check_batch(x)
    try:
        check_map(f, x, rows=rows, jvp=jvp)
    except InputError as error:
        fail(str(error))


def assert_rows_independent(f: NoiseMap, x: Tensor, *, tolerance: float = 1e-5) -> None:
    """Assert that a row of the result depends on that row of the input alone, and not on its position.

    Each half of the batch is replaced while the other half stays, and the batch is reversed.

    Args:
        f: batch-first map.
        x: `(n, *shape)`, `n >= 2`.
        tolerance: change that is put down to rounding, relative to the largest entry of f(x).

    Raises:
        AssertionError: naming the row that changed, and by how much.
        InputError: fewer than two rows, or a map that returns another shape.
    """
    __tracebackhide__ = True
    check_batch(x)
    n = x.shape[0]
    if n < 2:
        raise InputError("one row cannot show a dependence on others: give at least two")
    with torch.no_grad():
        base = evaluate(f, x)
        limit = tolerance * max(float(base.abs().max()), torch.finfo(x.dtype).tiny)
        for kept, other in ((slice(0, n // 2), slice(n // 2, n)), (slice(n // 2, n), slice(0, n // 2))):
            changed = x.clone()
            changed[other] = 1.0 - 2.0 * changed[other]
            _rows_agree(evaluate(f, changed)[kept], base[kept], limit, kept.start, "when other rows are replaced")
        _rows_agree(evaluate(f, x.flip(0)).flip(0), base, limit, 0, "when the batch is reversed")


def _rows_agree(new: Tensor, old: Tensor, limit: float, first: int, when: str) -> None:
    __tracebackhide__ = True
    change = (new.double() - old.double()).abs().flatten(1).amax(1)
    worst = int(change.argmax())
    if not float(change[worst]) <= limit:
        fail(
            f"rows are not independent: row {first + worst} of f(x) changes by {float(change[worst]):.4g} {when} "
            f"(rounding would explain {limit:.2g})"
        )
