"""The checks of `verify-bound` on hypernetworks that are deployed with injected noise.

Everything is read off what is deployed, `NoiseInjection.moved`, at chosen arguments, and compared with Gaussian
formulas and quadrature that share nothing with it. A map is tried at the shares 0.1, 0.5 and 0.9, or at its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hnkit.checks.check import Finding, Registry, mean_finding, worst
from hnkit.errors import NotApplicable, NotCertifiedError
from hnkit.figures.measured_map import MeasuredMap
from hnkit.injection import NoiseInjection, injected_bound
from hnkit.maps import slices
from hnkit.tilt import affine_coefficients, kl_gaussians

INJECTED_CHECKS = Registry()

_SHARES = (0.1, 0.5, 0.9)
_SEEN = 1e-11
"""Size of f below which the law of what moves by it says nothing of it."""
_POINTS = 512
"""Of the coarser quadrature in one dimension, over the noise and over its images."""


def _tried(measured: MeasuredMap) -> Sequence[NoiseInjection]:
    own = measured.injection
    return [own] if own is not None else [NoiseInjection(share) for share in _SHARES]


def _coefficients(injection: NoiseInjection) -> tuple[float, float, float]:
    """What `moved` multiplies the noise, the delta and the fresh noise by."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    arguments = ((one, zero, zero), (zero, one, zero), (zero, zero, one))
    of_x, of_delta, of_eps = (float(injection.moved(*each)) for each in arguments)
    return of_x, of_delta, of_eps


def _worst_of(findings: Sequence[Finding]) -> Finding:
    """The finding with the least slack, one that is not a number first."""
    return min(findings, key=lambda finding: finding.slack if finding.slack == finding.slack else -math.inf)


@INJECTED_CHECKS.add(
    "injected-noise-law",
    "x̂ = a(x + f) + √(1-a²) ε has E|x̂ - √(1-s)(x + f)|² = s d for the injected share s = 1 - a²",
    proof="injected_noise",
    kind="statistical",
)
def injected_noise_law(measured: MeasuredMap) -> Finding:
    """The squared distance of draws of the deployed noise from their centres; the worst of the shares."""
    findings = []
    for injection in _tried(measured):
        delta = injection.clipped(measured.value.double())
        eps = torch.randn(delta.shape, dtype=torch.float64, generator=measured.generator("injected noise")).to(delta)
        x = measured.x.double()
        centre = math.sqrt(1 - injection.share) * (x + delta)
        squares = (injection.moved(x, delta, eps) - centre).flatten(1).square().sum(1)
        findings.append(mean_finding(squares / measured.dim, injection.share, note=f"s = {injection.share:g}"))
    return _worst_of(findings)


@INJECTED_CHECKS.add(
    "injected-noise-pair",
    "a²|f|²/2(1-a²) is KL(x̂ given x || a x + √(1-a²) ε given x), at every sample",
    proof="injected_noise",
)
def injected_noise_pair(measured: MeasuredMap) -> Finding:
    """The terms of the bound against the divergence of two Gaussians whose means and spread `moved` itself gives."""
    deviations, size = [], 0.0
    for injection in _tried(measured):
        x, delta = measured.x.double(), injection.clipped(measured.value.double())
        still = torch.zeros_like(x)
        apart = injection.moved(x, delta, still) - injection.moved(x, still, still)
        expected = apart.flatten(1).square().sum(1) / (2 * _coefficients(injection)[2] ** 2)
        deviations.append(float((injection.nats(measured.value.double()) - expected).abs().max()))
        size = worst(size, float(expected.max()))
    return Finding(worst(*deviations), 0.0, 1e-9 * (1 + size))


@INJECTED_CHECKS.add(
    "injected-noise-affine",
    "for f(x) = Ax + c the law of x̂ is N(a c, a²(I+A)(I+A)' + (1-a²) I)",
    proof="injected_noise",
)
def injected_noise_affine(measured: MeasuredMap) -> Finding:
    """Mean and covariance of the deployed law against the closed form, and those of f = 0 against N(0, I)."""
    K, c = _affine(measured)
    identity = torch.eye(len(c), dtype=torch.float64)
    deviations = []
    for injection in _tried(measured):
        share = injection.share
        mean, covariance = _deployed_law(injection, K, c)
        expected = (1 - share) * K @ K.mT + share * identity
        _, plain = _deployed_law(injection, identity, torch.zeros_like(c))
        deviations += [
            float((mean - math.sqrt(1 - share) * c).abs().max()),
            float((covariance - expected).abs().max()),
            float((plain - identity).abs().max()),
        ]
    scale = 1 + float((K @ K.mT).abs().max()) + float(c.abs().max())
    return Finding(worst(*deviations), 0.0, 1e-9 * scale)


@INJECTED_CHECKS.add(
    "injected-noise-bound",
    "KL(N(a c, a²(I+A)(I+A)' + (1-a²) I) || N(0, I)) ≤ a²(|A|_F² + |c|²)/2(1-a²)",
    proof="injected_noise",
)
def injected_noise_bound(measured: MeasuredMap) -> Finding:
    """The exact KL of an affine map's deployed law as a share of the bound; its mean over ±√d e_i is the true one."""
    K, c = _affine(measured)
    dim = len(c)
    identity = torch.eye(dim, dtype=torch.float64)
    points = math.sqrt(dim) * torch.cat([identity, -identity])
    shares, tolerance = [], 1e-9
    for injection in _tried(measured):
        bound = float(injection.nats(points @ (K - identity).mT + c).mean())
        cost = kl_gaussians(*_deployed_law(injection, K, c), torch.zeros_like(c), identity)
        if bound > dim * _SEEN**2:  # x + f(x) holds f to this size times the root of its digits
            shares.append(cost / bound)
            tolerance = max(tolerance, 64 * dim * torch.finfo(torch.float64).eps / math.sqrt(bound))
        else:
            shares.append(0.0 if cost < 1e-12 else math.inf)
    return Finding(worst(*shares), 1.0, tolerance, "<=", "share of the bound that the exact KL is, at most")


@INJECTED_CHECKS.add(
    "injected-noise-tight",
    "for a constant f the KL of x̂ is 1 - a² times the bound, which it therefore reaches as a → 0",
    proof="injected_noise",
)
def injected_noise_tight(measured: MeasuredMap) -> Finding:
    """A constant map, at the delta of the first sample, against the KL of a shifted Gaussian."""
    deviations, size = [], 0.0
    for injection in _tried(measured):
        c = injection.clipped(measured.value.double()[:1])
        still = torch.zeros_like(c)
        cost = 0.5 * float(injection.moved(still, c, still).square().sum())
        deviations.append(abs(cost - injection.share * float(injection.nats(c))))
        size = worst(size, cost)
    return Finding(worst(*deviations), 0.0, 1e-9 * (1 + size))


@INJECTED_CHECKS.add(
    "injected-noise-estimate",
    "the estimate of the bound is the mean of a²|f|²/2(1-a²), under its certificates, and these under the ceiling",
    proof="injected_noise",
)
def injected_noise_estimate(measured: MeasuredMap) -> Finding:
    """The record of the bound, clipped at the longest delta, against the mean of the squares; the worst deviation."""
    squares = measured.value.double().flatten(1).square().sum(1).tolist()
    radius = math.sqrt(max(squares)) or 1.0
    deviations, size = [], 0.0
    for injection in _tried(measured):
        longest = min(radius, injection.max_delta or radius)
        factor = (1 - injection.share) / (2 * injection.share)
        expected = factor * math.fsum(min(square, longest**2) for square in squares) / len(squares)
        clipped = injected_bound(measured.value, NoiseInjection(injection.share, longest))
        smooth = injected_bound(measured.value, NoiseInjection(injection.share), lipschitz=1.0)
        if clipped.certified is None or smooth.certified is None or clipped.ceiling is None:
            raise NotCertifiedError("a clipped map, or a Lipschitz one, has no certificate")
        deviations += [
            abs(clipped.nats.value - expected),
            clipped.nats.value - clipped.certified,
            smooth.nats.value - smooth.certified,
            clipped.certified - clipped.ceiling,
            abs(clipped.ceiling - factor * longest**2),
        ]
        size = worst(size, factor * radius**2)
    return Finding(worst(0.0, *deviations), 0.0, 1e-9 * (1 + size))


@INJECTED_CHECKS.add(
    "injected-noise-one-dimensional",
    "for d = 1 and any f, the KL of x̂ by quadrature over its density is at most the bound",
    proof="injected_noise",
)
def injected_noise_one_dimensional(measured: MeasuredMap) -> Finding:
    """The largest share of the bound that the KL is, over the shares; halving the step says how well that is known."""
    if measured.dim != 1:
        raise NotApplicable(f"d = {measured.dim}")
    if torch.finfo(measured.value.dtype).eps > 1e-6:
        raise NotApplicable(f"quadrature needs float32 or better; the map computes in {measured.value.dtype}")
    found: list[tuple[float, float]] = []
    for injection in _tried(measured):
        coarse, (cost, bound) = (quadrature(measured, injection, _POINTS * more) for more in (1, 2))
        if bound > 1e-6:
            error = abs(cost - coarse[0]) + abs(bound - coarse[1])
            found.append((cost / bound, (2 * error + 1e-7) / bound))
    if not found:
        raise NotApplicable("f = 0")
    share, error = max(found, key=lambda each: each[0] if each[0] == each[0] else math.inf)
    return Finding(share, 1.0, worst(error, 1e-4), "<=", "share of the bound that the KL is, at most")


def quadrature(measured: MeasuredMap, injection: NoiseInjection, points: int) -> tuple[float, float]:
    """The KL of the deployed law from N(0, 1), and its bound, by midpoint sums over the noise and over its images.

    The density of `x_hat` is the mixture of normals around `moved(x, f(x), 0)`, of the width of the fresh noise.

    Args:
        measured: a map in one dimension.
        injection: how it is deployed.
        points: nodes of each of the two sums.
    """
    x, width = _midpoints(-9.0, 9.0, points)
    shape = (-1, *measured.x.shape[1:])
    with torch.no_grad():
        values = measured.f(x.reshape(shape).to(measured.x)).double().cpu().reshape(-1, 1)
    mass = width * _normal(x)
    centre = injection.moved(x[:, None], injection.clipped(values), torch.zeros(len(x), 1, dtype=torch.float64))[:, 0]
    spread = _coefficients(injection)[2]
    # The images are looked at where they are: a far tail of the noise may be sent anywhere.
    seen = centre[mass > 1e-14]
    z, step = _midpoints(float(seen.min()) - 8 * spread, float(seen.max()) + 8 * spread, points)
    density = torch.zeros_like(z)
    for part in slices(len(x), 512):
        density += (mass[part, None] * _normal((z[None] - centre[part, None]) / spread)).sum(0) / spread
    kept = density > 1e-300
    logs = density[kept].log() + 0.5 * z[kept].square() + 0.5 * math.log(2 * math.pi)
    cost = float((density[kept] * logs).sum()) * step
    return cost, float((mass * injection.nats(values)).sum())


def _midpoints(low: float, high: float, count: int) -> tuple[Tensor, float]:
    width = (high - low) / count
    return low + width * (torch.arange(count, dtype=torch.float64) + 0.5), width


def _normal(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _affine(measured: MeasuredMap) -> tuple[Tensor, Tensor]:
    """`(K, c)` with `x + f(x) = K x + c`, for a float64 map of vectors that is not clipped."""
    if measured.x.dim() != 2 or measured.value.dtype != torch.float64:
        raise NotApplicable("tried on float64 maps of vectors alone")
    if measured.injection is not None and measured.injection.max_delta is not None:
        raise NotApplicable("a clipped map is not affine")
    affine = affine_coefficients(measured.f, measured.dim)
    if affine is None:
        raise NotApplicable("the map is not affine")
    return affine


def _deployed_law(injection: NoiseInjection, K: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what `moved` makes of `x + f(x) = K x + c`, from its values at unit vectors."""
    identity, zero = torch.eye(len(c), dtype=torch.float64), torch.zeros(len(c), len(c), dtype=torch.float64)
    delta = (K - identity).mT
    mean = injection.moved(zero[:1], c[None], zero[:1])[0]
    slope = injection.moved(identity, delta, zero)
    fresh = injection.moved(zero, zero, identity)
    return mean, slope.mT @ slope + fresh.mT @ fresh
