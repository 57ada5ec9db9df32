"""The checks of `verify-bound` that need nothing but a map and base noise."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hnkit.bounds import BOUNDS, theorem7_bound
from hnkit.checks.check import UNDERFLOWN, Finding, Registry, confidence_radius, mean_finding, worst
from hnkit.checks.differences import explained_by_steps
from hnkit.checks.l2_term import l2_verdict
from hnkit.checks.one_dimension import binned_kl, folded_kl
from hnkit.errors import MissingDerivativeError, NotApplicable, NotCertifiedError
from hnkit.figures.measured_map import MeasuredMap, RowStatistics
from hnkit.internal.stats import mean_and_stderr, rounded_up
from hnkit.jacobian import RowJacobian
from hnkit.kl.divergence import noise_kl
from hnkit.tilt import affine_coefficients, kl_gaussians

MAP_CHECKS = Registry()

_ROUNDING = 1e-9

_EVEN = 0.1
"""Share of the samples that uneven weights must still be worth for their mean to be tested."""

_WITHIN = 10.0
"""The factor within which estimates of truncation errors are held to be right."""


# --- the KL and its two forms -----------------------------------------------------------------------------------


@MAP_CHECKS.add("stein-identity", "E[x·f(x)] = E[tr J(x)]", proof="lemma_6_stein", kind="statistical")
def stein_identity(measured: MeasuredMap) -> Finding:
    """The residual `x·f - tr J` has mean zero; its z-score is in the note."""
    residual = measured.alignment - measured.traces
    finding = mean_finding(residual, 0.0, floor=_floor(measured, measured.alignment, measured.traces))
    finding = explained_by_steps(finding, measured.f, measured.x, continuous=measured.continuous)
    mean, stderr = mean_and_stderr(residual)
    score = mean / stderr if stderr > 0 else 0.0
    note = "; ".join(filter(None, [f"z = {score:.2f} over {len(measured.x)} samples", finding.note]))
    return replace(finding, note=note)


@MAP_CHECKS.add(
    "two-forms",
    "E[x·f + |f|²/2 - log|det(I+J)|] = E[|f|²/2 + tr J - log|det(I+J)|]",
    proof="kl_two_forms",
    kind="statistical",
)
def two_forms(measured: MeasuredMap) -> Finding:
    """The two forms of the exact KL agree in the mean (paired samples)."""
    _need_exact(measured)
    count = len(measured.change)
    floor = _floor(measured, measured.alignment, measured.stein.per_sample)
    finding = mean_finding(measured.change - measured.stein.per_sample[:count], 0.0, floor=floor)
    return explained_by_steps(finding, measured.f, measured.x, continuous=measured.continuous)


@MAP_CHECKS.add("two-forms-pointwise", "the two integrands differ by x·f - tr J at every sample", proof="kl_two_forms")
def two_forms_pointwise(measured: MeasuredMap) -> Finding:
    """Exact integrands only: a stochastic method sees the trace through a probe."""
    _need_exact(measured)
    m = min(len(measured.change), len(measured.rows.trace))
    residual = measured.change[:m] - measured.stein.per_sample[:m] - (measured.alignment[:m] - measured.rows.trace[:m])
    return _zero(residual, measured, measured.alignment)


@MAP_CHECKS.add(
    "kl-integrand",
    "|f|²/2 + E(J) = |f|²/2 + Σ Re λ - log|1+λ| over the eigenvalues λ of J, at every sample",
    proof="theorem_7_bound",
)
def kl_integrand(measured: MeasuredMap) -> Finding:
    """The integrand of `noise_kl` against the eigenvalues of the dense Jacobian and a separate |f|^2/2."""
    _need_exact(measured)
    rows = measured.rows
    m = len(rows.spectral)
    residual = measured.stein.per_sample[:m] - measured.half_square[:m] - rows.spectral
    return _zero(residual, measured, 1 + rows.frobenius)


@MAP_CHECKS.add("jacobian-differences", "J(x)v = (f(x + hv) - f(x - hv)) / 2h + O(h²)", proof="lemma_6_stein")
def jacobian_differences(measured: MeasuredMap) -> Finding:
    """Products with the Jacobian against central differences of the map itself, in float64."""
    if measured.value.dtype != torch.float64:
        raise NotApplicable(f"central differences need float64; the map computes in {measured.value.dtype}")
    f, x = measured.first(min(256, measured.pass_rows))
    v = torch.randn(x.shape, dtype=x.dtype, generator=measured.generator("differences")).to(x.device)
    h = 1e-5
    with torch.no_grad():
        difference = (f(x + h * v) - f(x - h * v)).flatten(1) / (2 * h)
    try:
        product = RowJacobian(f, x).jvp(v.flatten(1))
    except MissingDerivativeError as reason:
        raise NotApplicable(str(reason)) from None
    relative = (product - difference).norm(dim=1) / (1e-3 + difference.norm(dim=1))
    # A kink inside the difference (ReLU, clipping) spoils single rows, never most of them.
    worst_row = relative.max() if measured.smooth else relative.median()
    note = "" if measured.smooth else "median over samples: the map has kinks"
    return Finding(float(worst_row), 0.0, 1e-5, note=note)


@MAP_CHECKS.add(
    "estimate-record",
    "value = mean of the integrand, stderr = its standard deviation / √n",
    proof="estimates_certificates",
)
def estimate_record(measured: MeasuredMap) -> Finding:
    """Mean and standard error recomputed from the integrand; the worse of the two relative deviations."""
    kl = measured.stein
    if len(measured.x) < 2:
        raise NotApplicable("one sample has no standard error: use --samples 2 or more")
    samples = kl.per_sample.tolist()
    mean = math.fsum(samples) / len(samples)
    scale = max(abs(value - mean) for value in samples) or 1.0  # whose square may underflow
    variance = math.fsum(((value - mean) / scale) ** 2 for value in samples) / (len(samples) - 1)
    stderr = scale * math.sqrt(variance / len(samples))
    error = abs(kl.value - mean) / (abs(mean) + 1e-300) if mean else abs(kl.value)
    # Where the samples agree to rounding, so must the standard error.
    spread = abs(kl.stderr - stderr) / max(stderr, _ROUNDING * abs(mean), 1e-300)
    return Finding(worst(error, spread), 0.0, 1e-6)


@MAP_CHECKS.add(
    "kl-affine",
    "for f(x) = Ax + c the KL is KL(N(c, KK') || N(0, I)), K = I + A, in closed form",
    proof="kl_two_forms",
)
def kl_affine(measured: MeasuredMap) -> Finding:
    """`noise_kl` on the points ±√d e_i, whose mean is 0 and covariance I exactly, against the Gaussian formula."""
    _need_exact(measured)
    if measured.x.dim() != 2 or measured.value.dtype != torch.float64:
        raise NotApplicable("tried on float64 maps of vectors alone")
    affine = affine_coefficients(measured.f, measured.dim)
    if affine is None:
        raise NotApplicable("the map is not affine")
    K, c = affine
    points = math.sqrt(measured.dim) * torch.eye(measured.dim, dtype=torch.float64)
    points = torch.cat([points, -points])
    value = noise_kl(measured.f, points, method="exact", check=False).value
    identity = torch.eye(measured.dim, dtype=torch.float64)
    expected = kl_gaussians(c, K @ K.mT, torch.zeros_like(c), identity)
    if expected == math.inf:
        raise NotApplicable("I + A is singular: the KL is infinite")
    return Finding(value, expected, 1e-8 * (1 + abs(expected)))


@MAP_CHECKS.add(
    "kl-one-dimensional",
    "for d = 1 and increasing T the KL is the limit of Σ m log(m/m') over bins, m' the base mass of the moved bin",
    proof="data_processing",
)
def kl_one_dimensional(measured: MeasuredMap) -> Finding:
    """The integrand under midpoint quadrature against masses of bins, which needs values of the map alone."""
    _need_exact(measured)
    (coarse, coarse_binned), (value, expected) = (binned_kl(measured, bins) for bins in (4096, 8192))
    # The midpoint rule and the binned divergence both err by O(h^2), h = 0.002; a kink of T by O(h), and a step of T
    # that is narrower than h by what halving h shows.
    error = 2 * (abs(value - coarse) + abs(expected - coarse_binned))
    return Finding(value, expected, (2e-4 if measured.smooth else 2e-3) + error)


@MAP_CHECKS.add(
    "folding-entropy",
    "for d = 1 and T that folds, E[eq. 53] + H(X | TX) is the KL of the masses that T moves",
    proof="folding_entropy",
)
def folding_entropy(measured: MeasuredMap) -> Finding:
    """The two parts by the integrand at the preimages, against masses, which need values of the map alone."""
    _need_exact(measured)
    coarse, (lower, entropy, expected) = (folded_kl(measured, bins) for bins in (512, 1024))
    error = 2 * (abs(lower + entropy - coarse[0] - coarse[1]) + abs(expected - coarse[2]))
    note = f"E[eq. 53] = {lower:.4g} alone is a lower bound; H(X | TX) = {entropy:.4g}"
    return Finding(lower + entropy, expected, (1e-3 if measured.smooth else 5e-3) + error, note=note)


@MAP_CHECKS.add(
    "degree",
    "E[sgn det(I+J) exp(-ell)] = 1 for bounded f, ell the integrand of eq. 53",
    proof="folding_entropy",
    kind="statistical",
)
def degree(measured: MeasuredMap) -> Finding:
    """The mean of the weights where a certificate says that f is bounded and they are even enough for a mean."""
    _need_exact(measured)
    if measured.stein.parts.sign is None or not measured.bounded:
        raise NotApplicable("no certificate says that f is bounded")
    count = len(measured.change)
    weight = torch.exp(-measured.change)
    effective = float(weight.sum().square() / weight.square().sum())
    if not effective >= _EVEN * count:  # NaN where all weights vanish
        raise NotApplicable(
            f"the weights exp(-ell) are worth {effective:.3g} of {count} samples: too uneven to average"
        )
    return mean_finding(measured.stein.parts.sign[:count] * weight, 1.0)


# --- bounds -----------------------------------------------------------------------------------------------------


@MAP_CHECKS.add("theorem-7", "|E(J)| ≤ d h(L), h(s) = -log(1-s) - s, for f L-Lipschitz, L < 1", proof="theorem_7_bound")
def theorem_7(measured: MeasuredMap) -> Finding:
    """The largest |E(J)| against the bound with a certified constant, or with the ascended estimate of it."""
    certified = measured.certified_constant
    constant = measured.lower.value if certified is None else certified
    word = "estimated" if certified is None else "certified"
    shown = f"{constant:.4g}" if certified is None else rounded_up(constant, below=1.0)
    if constant >= 1:
        raise NotApplicable(f"{word} L = {shown} is not below 1")
    error = measured.error
    bound = float(theorem7_bound(measured.dim, constant))
    note = f"{word} L = {shown}; E|E(J)| = {float(error.abs().mean()):.3g}"
    if measured.method != "exact":  # a single probe's value is no E(J), their mean is
        mean, stderr = mean_and_stderr(error)
        radius = confidence_radius(stderr, len(error))
        return Finding(abs(mean), bound, radius, "<=", note, certified is not None, "statistical")
    tolerance = measured.resolution * (1 + bound)
    return Finding(float(error.abs().max()), bound, tolerance, "<=", note, certified is not None)


def _share_of(name: str, measured: MeasuredMap) -> Finding:
    """The largest share of a bound that a sample uses."""
    rows, kept = _contracting(measured)
    # |E(J) - tr(J^2)/2| is a difference of numbers of the size of |J|_F^2, known to their rounding alone.
    rounding = 8 * measured.dim * torch.finfo(torch.float64).eps * rows.frobenius[kept].square()
    left = rows.left[name][kept].abs()
    return _share(
        torch.where(left < rounding, torch.zeros_like(left), left - rounding), rows.right[name][kept], measured
    )


for _name, _bound in BOUNDS.items():
    if _bound.hypothesis == "norm":
        MAP_CHECKS.add(_bound.check, f"{_bound.statement}, at every sample", proof=_bound.proof)(
            partial(_share_of, _name)
        )


@MAP_CHECKS.add(
    "bound-order",
    "singular values ≤ Frobenius ≤ local Theorem 7, bound by bound",
    proof="singular_value_bound",
)
def bound_order(measured: MeasuredMap) -> Finding:
    """The largest ratio of a bound to the next looser one."""
    rows, kept = _contracting(measured)
    ratios = [
        float(_ratio(rows.right[name][kept], rows.right[bound.looser][kept]).max())
        for name, bound in BOUNDS.items()
        if bound.looser is not None
    ]
    return Finding(worst(*ratios), 1.0, _ROUNDING, "<=")


@MAP_CHECKS.add(
    "field-of-values",
    "E(S) - |K|_F²/2(1+λ_min(S))² ≤ E(J) ≤ E(S) for J = S + K with λ_min(S) > -1, at every sample",
    proof="field_of_values",
)
def field_of_values(measured: MeasuredMap) -> Finding:
    """The smallest distance of E(J) from either end of its interval."""
    rows = measured.rows
    kept = ~(rows.least_symmetric <= -1)
    if not bool(kept.any()):
        raise NotApplicable(f"λ_min(S) = {float(rows.least_symmetric.max()):.3g} is not above -1 at any sample")
    high, error = rows.right["field of values, upper"][kept], rows.error[kept]
    low = high - rows.right["field of values, lower"][kept]
    margin = torch.minimum(error - low, high - error)
    note = f"on average E(J) = {float(error.mean()):.3g} in [{float(low.mean()):.3g}, {float(high.mean()):.3g}]"
    note += "" if bool(kept.all()) else f"; {int((~kept).sum())} of {len(kept)} samples have λ_min(S) ≤ -1"
    scale = 1 + float(torch.maximum(low.abs(), high.abs()).max())
    return Finding(float(margin.min()), 0.0, _ROUNDING * scale, ">=", note)


@MAP_CHECKS.add("symmetry-index", "s = E tr(J²) / E|J|_F² lies in [-1, 1]", proof="symmetry_index")
def symmetry_index(measured: MeasuredMap) -> Finding:
    """The index of `noise_kl` against dense Jacobians where these hold all samples, else its range alone."""
    index = measured.stein.symmetry_index
    if measured.method == "l2":
        raise NotApplicable("method l2 does not look at J")
    if math.isnan(index) and not bool(measured.probed_frobenius.any()):
        raise NotApplicable("J = 0")
    rows = measured.rows_or_none
    if rows is not None and len(rows.trace) == len(measured.x) and measured.method == "exact":
        expected = float(rows.trace_square.sum() / rows.frobenius.square().sum())
        return Finding(index, expected, measured.resolution)
    # A probe's |J'v|^2 estimates |J|_F^2, so the quotient of two estimates may leave [-1, 1] by their error.
    return Finding(abs(index), 1.0, 0.1 if measured.stein.probes else measured.resolution, "<=")


MAP_CHECKS.add(
    "l2-verdict",
    "the verdict on the L2 term: its ratio is E tr(J²) / E|f|², and its words hold for E[|f|²/2 + E(J)]",
    proof="second_order",
    kind="statistical",
)(l2_verdict)


# --- Lipschitz constants and injectivity ------------------------------------------------------------------------


@MAP_CHECKS.add(
    "local-norms", "|J(x)|₂ by products is that of the dense Jacobian, at every sample", proof="estimates_certificates"
)
def local_norms(measured: MeasuredMap) -> Finding:
    """The largest relative deviation from the largest singular value of the dense Jacobian."""
    norm = measured.rows.norm
    deviation = (measured.norms[: len(norm)] - norm).abs() / (norm + 1e-12)
    return Finding(float(deviation.max()), 0.0, max(2e-3, measured.resolution))


@MAP_CHECKS.add("lipschitz-order", "sampled ≤ ascended ≤ certified Lipschitz constant", proof="estimates_certificates")
def lipschitz_order(measured: MeasuredMap) -> Finding:
    """The ascended estimate between the sampled maximum and the certificate."""
    sampled, ascended = float(measured.norms.max()), measured.lower.value
    tolerance = max(2e-3, measured.resolution) * (sampled + 1e-12)
    if isinstance(measured.certificate, str):
        if measured.certifiable:
            raise NotCertifiedError(measured.certificate)
        note = f"sampled {sampled:.4g} ≤ ascended; no certificate: {measured.certificate}"
        return Finding(ascended, sampled, tolerance, ">=", note, certified=False)
    certified = measured.certificate.value
    note = f"sampled {sampled:.4g} ≤ ascended {ascended:.4g} ≤ certified {rounded_up(certified)}"
    if sampled > ascended + tolerance:
        return Finding(sampled, ascended, tolerance, "<=", note)
    return Finding(ascended, certified, tolerance, "<=", note)


@MAP_CHECKS.add(
    "lemma-5-inverse",
    "for L < 1 the iteration x ← y - f(x) inverts T(x) = x + f(x)",
    proof="lemma_5_diffeomorphism",
)
def lemma_5_inverse(measured: MeasuredMap) -> Finding:
    """The largest distance of the recovered from the true noise after as many steps as the rate L asks for."""
    constant = _contraction(measured)
    f, x = measured.first(min(64, measured.pass_rows))
    target = 1e-10 if measured.value.dtype == torch.float64 else 1e-5
    steps = max(2, min(2000, math.ceil(math.log(target) / math.log(max(constant, 1e-6)))))
    with torch.no_grad():
        y = x + f(x)
        found = y.clone()
        for _ in range(steps):
            found = y - f(found)
    error = (found - x).flatten(1).norm(dim=1)
    start = (y - x).flatten(1).norm(dim=1).max()
    eps = torch.finfo(measured.value.dtype).eps
    rounding = (
        (64 if eps > 1e-5 else 1e3 if eps > 1e-10 else 1e4) * eps * float(y.abs().max()) * math.sqrt(measured.dim)
    )
    tolerance = constant**steps * float(start) + rounding / (1 - constant)
    note = f"{steps} steps at rate L = {constant:.4g}"
    _not_refuted(measured, float(error.max()) - tolerance, constant)
    return Finding(float(error.max()), 0.0, tolerance, note=note, certified=measured.certified_constant is not None)


@MAP_CHECKS.add("lemma-5-bilipschitz", "(1-L)|x-x'| ≤ |T(x)-T(x')| ≤ (1+L)|x-x'|", proof="lemma_5_diffeomorphism")
def lemma_5_bilipschitz(measured: MeasuredMap) -> Finding:
    """The largest relative change of a distance under T beyond the rounding of f, over pairs far and close."""
    constant = _contraction(measured)
    f, x = measured.first(min(256, measured.pass_rows))
    unit = 8 * torch.finfo(measured.value.dtype).eps
    change = 0.0
    for size in (0.0, 1.0, 1e-3):
        other = x.flip(0) if size == 0 else x + size * torch.randn(
            x.shape, dtype=x.dtype, generator=measured.generator(f"pairs/{size}")
        ).to(x.device)  # fmt: skip
        with torch.no_grad():
            here, there = f(x).double(), f(other).double()
        distance = (x - other).double().flatten(1).norm(dim=1)
        moved = (x.double() - other.double() + here - there).flatten(1).norm(dim=1)
        # The map itself is rounded, in half precision by more than close points lie apart.
        rounding = unit * (here.flatten(1).norm(dim=1) + there.flatten(1).norm(dim=1))
        kept = distance > 0
        if bool(kept.any()):
            relative = ((moved - distance).abs() - rounding) / distance
            change = worst(change, float(relative[kept].max()))
    tolerance = 1e-6 if measured.value.dtype == torch.float64 else 1e-2
    _not_refuted(measured, change - constant - tolerance, constant)
    return Finding(change, constant, tolerance, "<=", certified=measured.certified_constant is not None)


@MAP_CHECKS.add(
    "injectivity",
    "T is injective, so that eq. 53 is the KL and not a lower bound of it",
    proof="non_injective",
)
def injectivity(measured: MeasuredMap) -> Finding:
    """The share of samples of the rarer orientation sign det(I + J): zero for an injective T."""
    status = measured.stein.injective
    rows = measured.rows_or_none
    if status == "violated":
        reversed_at = None if rows is None else 100 * float((rows.sign < 0).double().mean())
        share = "" if reversed_at is None else f" (negative at {reversed_at:.1f} % of the samples)"
        raise NotApplicable(f"det(I+J) changes sign{share}: T folds, the exact value is a lower bound of the KL")
    if rows is None:
        if status != "certified":
            raise NotApplicable("no certificate, and no determinants in so many dimensions")
        return Finding(0.0, 0.0, 0.0)
    negative = float(((1 - rows.sign) / 2).mean())
    note = "" if status == "certified" else "no change of orientation seen; that proves nothing"
    return Finding(negative if negative <= 0.5 else 1 - negative, 0.0, 0.0, note=note, certified=status == "certified")


# --- estimators -------------------------------------------------------------------------------------------------


@MAP_CHECKS.add(
    "arnoldi",
    "Arnoldi's estimate of E(J) has the exact mean, up to its stated bias",
    proof="arnoldi_bias",
    kind="statistical",
)
def arnoldi(measured: MeasuredMap) -> Finding:
    """The mean difference of the two integrands on the same samples."""
    _need_exact(measured)
    if measured.dim < 2:
        raise NotApplicable("d = 1: one product is the Jacobian")
    f, x = measured.first(min(256, len(measured.rows.norm)))
    count = len(x)
    if float(measured.rows.norm[:count].max()) >= 1:
        raise NotApplicable(f"local norm {float(measured.rows.norm[:count].max()):.3g} is not below 1")
    estimate = noise_kl(f, x, method="arnoldi", probes=2, generator=measured.generator("arnoldi"), check=False)
    difference = estimate.per_sample - measured.stein.per_sample[:count]
    mean, stderr = mean_and_stderr(difference)
    bias = _WITHIN * estimate.bias_estimate
    if estimate.bias_bound is not None and not estimate.bias_bound >= bias:  # near norm 1 the proved bound says nothing
        bias = estimate.bias_bound
    floor = _floor(measured, measured.rows.frobenius[:count].square(), measured.stein.per_sample)
    radius = confidence_radius(stderr, count) + bias + floor
    return Finding(mean, 0.0, radius, note=f"{estimate.num_vjp / count:.3g} products per sample")


def _need_exact(measured: MeasuredMap) -> None:
    if measured.method != "exact":
        raise NotApplicable(f"method {measured.method}: the integrand is an estimate at every sample")


def _zero(residual: Tensor, measured: MeasuredMap, scale: Tensor) -> Finding:
    tolerance = measured.resolution * (1 + float(scale.abs().max()) + float(measured.half_square.max()))
    return Finding(float(residual.abs().max()), 0.0, tolerance)


def _floor(measured: MeasuredMap, *scales: Tensor) -> float:
    """What rounding of the map, in the type that it computes in, may add to the mean of figures of these sizes."""
    unit = torch.finfo(measured.value.dtype).eps
    return _ROUNDING + unit * sum(float(scale.abs().mean()) for scale in scales)


def _contracting(measured: MeasuredMap) -> tuple[RowStatistics, Tensor]:
    rows = measured.rows
    kept = ~(rows.norm >= 1)  # written so that a NaN stays, and fails
    if not bool(kept.any()):
        raise NotApplicable(f"local norm {float(rows.norm.min()):.3g} or more at every sample: L < 1 is needed")
    return rows, kept


def _contraction(measured: MeasuredMap) -> float:
    constant = measured.certified_constant
    if constant is None:
        seen: float = measured.lower.value
        if seen >= 1:
            raise NotApplicable(f"the ascended norm {seen:.4g} shows that L is not below 1")
        return seen
    if constant >= 1:
        raise NotApplicable(f"certified L = {rounded_up(constant)} is not below 1")
    return constant


def _not_refuted(measured: MeasuredMap, excess: float, constant: float) -> None:
    """An estimate of L that is too small refutes the estimate, not the lemma; NaN refutes nothing, and fails."""
    if excess > 0 and measured.certified_constant is None:
        raise NotApplicable(f"L is larger than its ascended estimate {constant:.4g}")


def _ratio(value: Tensor, bound: Tensor) -> Tensor:
    """`value / bound`, and 0 where the value vanishes or is so small that its digits have underflowed."""
    return torch.where(value.abs() < UNDERFLOWN, torch.zeros_like(value), value / bound)


def _share(value: Tensor, bound: Tensor, measured: MeasuredMap) -> Finding:
    share = float(_ratio(value.abs(), bound).max())
    mean, limit = float(value.abs().mean()), float(bound.mean())
    loose = f", {limit / mean:.3g} times looser" if mean > 0 else ""
    note = f"share of the bound used; on average {mean:.3g} under {limit:.3g}{loose}"
    skipped = int((~measured.rows.contracting).sum())
    note += f"; {skipped} samples of local norm ≥ 1 left out" if skipped else ""
    return Finding(share, 1.0, _ROUNDING, "<=", note)
