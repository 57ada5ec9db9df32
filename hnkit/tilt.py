"""Reward-tilted laws: what a problem with a known answer offers, and how far a map is from the optimum, in nats.

For a generator `g`, a reward `r` and a temperature `alpha > 0`, the tilted noise law is
`p0*(x) = p0(x) exp(r(g(x))/alpha) / Z*` with `p0 = N(0, I)`, and the tilted output law is `p* = g_# p0*`. A noise
hypernetwork `f` moves `p0` to the law of `T(x) = x + f(x)`; the best it can do is `p0*`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hnkit.bounds import log_gap
from hnkit.errors import InputError, NonFiniteError
from hnkit.injection import Generators, NoiseInjection, deployed_noise
from hnkit.internal.stats import Estimate, mean_and_stderr
from hnkit.maps import NoiseMap, at_rows

if TYPE_CHECKING:
    from hnkit.kl.divergence import Form, Method


@dataclass(frozen=True)
class NoiseLaw:
    """A law `q` of the noise with the tilted output law, `g_# q = p*`, that need not be `p0*` itself."""

    name: str
    sample: Callable[[int, torch.Generator], Tensor]
    """`(n, generator) -> (n, *noise_shape)` samples of `q`."""
    kl: float
    """`KL(q || p0)`, nats."""


@runtime_checkable
class TiltedProblem(Protocol):
    """A generator and a reward whose tilted laws are known.

    Members that make no sense for a problem are listed in `unavailable` and raise `InputError`. Densities are natural
    logarithms; tensors are float64; `n` is the number of samples. Equations are those of arXiv 2508.09968.
    """

    @property
    def name(self) -> str:
        """The name it is listed under."""
        ...

    @property
    def statement(self) -> str:
        """One line: the generator, the reward and the dimension."""
        ...

    @property
    def alpha(self) -> float:
        """Temperature of the tilt."""
        ...

    @property
    def injective(self) -> bool:
        """Whether `g` is injective; if not, many noise laws have the output law `p*` (Theorem 3, part 2)."""
        ...

    @property
    def unavailable(self) -> frozenset[str]:
        """Names of members that raise `InputError` for this problem."""
        ...

    @property
    def discontinuous(self) -> frozenset[str]:
        """Names of the maps that jump somewhere (`"l2_map"`): Stein's identity does not hold for them."""
        ...

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of one noise sample."""
        ...

    def generate(self, x: Tensor) -> Tensor:
        """Outputs `y = g(x)` of noise `(n, *noise_shape)`."""
        ...

    def reward(self, y: Tensor) -> Tensor:
        """Rewards `(n,)` of outputs."""
        ...

    def log_z(self) -> float:
        """`log Z* = log E[exp(r(g(x))/alpha)]` in closed form or by quadrature (eq. 21)."""
        ...

    def log_z_check(self) -> tuple[float, float]:
        """`log Z*` by a route that shares no formula with `log_z`, and the absolute error it may have."""
        ...

    def log_p0_star(self, x: Tensor) -> Tensor:
        """Log density `(n,)` of the tilted noise law (eq. 5)."""
        ...

    def sample_p0_star(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` samples of the tilted noise law."""
        ...

    def log_p_base(self, y: Tensor) -> Tensor:
        """Log density `(n,)` of the base output law `g_# p0`, with respect to the measure of `log_p_star`."""
        ...

    def log_p_star(self, y: Tensor) -> Tensor:
        """Log density `(n,)` of the tilted output law `p*` (eq. 3)."""
        ...

    def sample_p_star(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` samples of the tilted output law."""
        ...

    def optimal_map(self) -> NoiseMap:
        """An `f` with `(id + f)_# p0 = p0*`: continuous, injective, piecewise C1."""
        ...

    def l2_map(self) -> NoiseMap:
        """The minimiser of the L2 loss (eq. 11): `x + f(x) = argmax_u r(g(u))/alpha - |u - x|^2/2`."""
        ...

    def kl_optimal(self) -> float:
        """`KL(p0* || p0)`, nats."""
        ...

    def l2_gap(self) -> float:
        """`KL(law of x + l2_map(x) || p0*)`, nats; infinite when that law has mass on a null set."""
        ...

    def alternatives(self) -> list[NoiseLaw]:
        """Other noise laws with the output law `p*`; each has a larger `KL(. || p0)` than `p0*`."""
        ...

    def with_alpha(self, alpha: float) -> TiltedProblem:
        """The same generator and reward at another temperature."""
        ...


def log_standard_normal(x: Tensor) -> Tensor:
    """Log density of `N(0, I_d)`, `-|x|^2/2 - d log(2 pi)/2`, per row.

    Args:
        x: `(n, *shape)`, `d` the number of entries of a row.

    Returns:
        `(n,)`, nats.
    """
    rows = x.flatten(1)
    return -0.5 * rows.square().sum(1) - 0.5 * rows.shape[1] * math.log(2 * math.pi)


def kl_gaussians(mean0: Tensor, covariance0: Tensor, mean1: Tensor, covariance1: Tensor) -> float:
    """`KL(N(mean0, covariance0) || N(mean1, covariance1))`, nats.

    With `C1 = L L'` and `M = L^-1 C0 L^-T` of eigenvalues `1 + e_i` it is
    `(|L^-1 (mean0 - mean1)|^2 + sum_i e_i - log(1 + e_i)) / 2`, which does not cancel when the laws nearly agree.

    Args:
        mean0: `(d,)`.
        covariance0: `(d, d)`, symmetric; singular gives infinity.
        mean1: `(d,)`.
        covariance1: `(d, d)`, symmetric positive definite.

    Raises:
        InputError: `covariance1` is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(covariance1.double())
    if int(info) != 0:
        raise InputError("kl_gaussians: the second covariance is not positive definite: give one that is")
    half = torch.linalg.solve_triangular(factor, covariance0.double(), upper=False)
    relative = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    identity = torch.eye(relative.shape[0], dtype=torch.float64)
    excess = torch.linalg.eigvalsh(0.5 * (relative + relative.mT) - identity)
    if float(excess.min()) <= -1.0:
        return math.inf
    shift = torch.linalg.solve_triangular(factor, (mean0 - mean1).double()[:, None], upper=False)
    return 0.5 * float(shift.square().sum() + log_gap(-excess).sum())


def affine_coefficients(f: NoiseMap, dim: int, *, tolerance: float = 1e-9) -> tuple[Tensor, Tensor] | None:
    """`(K, c)` with `x + f(x) = K x + c`, read off at 0 and the unit vectors; `None` if `f` is not affine there.

    Affinity is tested at 32 further points (fixed, of norm about `sqrt(d)`).

    Args:
        f: batch-first map on rows of shape `(dim,)`, float64.
        dim: dimension `d`.
        tolerance: largest deviation at the test points, relative to `1 + max |x + f(x)|`.

    Returns:
        `K` of shape `(d, d)` and `c` of shape `(d,)`, or `None`.
    """
    identity = torch.eye(dim, dtype=torch.float64)
    probes = torch.randn(32, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = torch.cat([torch.zeros(1, dim, dtype=torch.float64), identity, probes])
    with torch.no_grad():
        images = points + f(points)
    offset = images[0]
    slope = (images[1 : dim + 1] - offset).mT
    misfit = (images[dim + 1 :] - (probes @ slope.mT + offset)).abs().max()
    if not float(misfit) <= tolerance * (1 + float(images.abs().max())):
        return None
    return slope, offset


@dataclass(frozen=True)
class GapEstimate:
    """How far `T_# p0` is from the tilted noise law `p0*`, nats, with its Monte Carlo error.

    Attributes:
        value: mean of `KL integrand - r/alpha + log Z*`.
        stderr: standard error of `value`, from paired per-sample terms; `nan` for one sample.
        kl: mean of the KL integrand alone, `KL(T_# p0 || p0)`.
        reward: mean reward `E[r(g(T x))]`.
        certified: `T` is certified injective and the KL is exact, so `value` estimates the gap itself.
        kind: `"gap"` (certified), `"lower bound"` (exact log-determinant, injectivity not certified: item g) or
            `"approximation"` (a KL that is itself approximate; the sign of its error is not known).
        per_sample: `(n,)`, the integrand.
    """

    value: float
    stderr: float
    kl: float
    reward: float
    certified: bool
    kind: str
    per_sample: Tensor


def optimality_gap(
    problem: TiltedProblem,
    f: NoiseMap,
    x: Tensor,
    *,
    method: Method = "exact",
    form: Form = "change-of-variables",
    **options: Any,
) -> GapEstimate:
    """Distance of a map from the optimum, in nats: `KL(p0^phi || p0*) = J_noise(f) + log Z* >= 0`.

    `J_noise(f) = KL(p0^phi || p0) - E[r(g(x + f(x)))]/alpha` (Gibbs variational principle). With the
    change-of-variables form the integrand is `log p0(x) - log|det(I + J)| - log p0*(x + f(x))`: at the optimal map it
    vanishes at every `x`, so the estimate has no variance there. If `T` is not injective this is a lower bound.

    Args:
        problem: generator, reward and `log Z*`.
        f: batch-first map.
        x: `(n, *noise_shape)` samples of `N(0, I)`, float64; with a `budget` the first of them, as many as it pays for.
        method: the method of `noise_kl`; anything but `"exact"` makes the result an approximation.
        form: `"change-of-variables"` or `"stein"`; the same mean for smooth `f`, another variance.
        **options: further options, which are passed to `noise_kl`.

    Returns:
        The estimate with its standard error.

    Raises:
        InputError: `x` has another shape than the problem's noise.
        NonFiniteError: the reward is not finite; the message names the sample.

    Source:
        THEORY items f and g; arXiv 2508.09968, Proposition 4 and eq. 53.
    """
    from hnkit.kl.divergence import noise_kl

    if x.dim() == 0 or tuple(x.shape[1:]) != problem.noise_shape or x.shape[0] == 0:
        raise InputError(
            f"noise of shape {tuple(x.shape)} for the problem {problem.name!r}: "
            f"give (n, {', '.join(map(str, problem.noise_shape))}) with n >= 1"
        )
    kl = noise_kl(f, x, method=method, form=form, **options)
    inner, used = at_rows(f, x, kl.samples)  # a budget may pay for the first samples only
    with torch.no_grad():
        reward = problem.reward(problem.generate(used + inner(used))).double()
    bad = ~torch.isfinite(reward)
    if bool(bad.any()):
        raise NonFiniteError(f"the reward of {problem.name!r} is not finite at sample {int(bad.nonzero()[0])}")
    per_sample = kl.per_sample.double() - reward / problem.alpha + problem.log_z()
    value, stderr = mean_and_stderr(per_sample)
    certified = method == "exact" and kl.injective == "certified"
    kind = "gap" if certified else "lower bound" if method == "exact" else "approximation"
    if kind == "approximation":
        # the probes' error is part of kl.stderr and is not seen in the spread of per_sample alone
        stderr = max(stderr, kl.stderr) if math.isfinite(kl.stderr) else stderr
    return GapEstimate(value, stderr, kl.value, float(reward.mean()), certified, kind, per_sample)


def injected_gap(
    problem: TiltedProblem, injection: NoiseInjection, delta: Tensor, x: Tensor, generator: Generators
) -> Estimate:
    """Bound of the distance from the optimum where noise is injected: KL bound - E[r(g(x_hat))]/alpha + log Z*.

    Its mean is at least `KL(law of x_hat || p0*)` for any hypernetwork; the estimate has the Monte Carlo error it says.

    Args:
        problem: generator, reward and `log Z*`.
        injection: how the hypernetwork is deployed.
        delta: `(n, *noise_shape)` values of f at `x`.
        x: `(n, *noise_shape)` samples of `N(0, I)`.
        generator: the generator of the fresh noise, or one for each row.

    Source: `proofs/injected_noise`, `proofs/optimality_gap`.
    """
    moved, _ = deployed_noise(injection, x.double(), delta.double(), generator)
    with torch.no_grad():
        reward = problem.reward(problem.generate(moved)).double()
    return Estimate.of(injection.nats(delta.double()) - reward / problem.alpha + problem.log_z())


def log_z_monte_carlo(problem: TiltedProblem, n: int, generator: torch.Generator) -> tuple[float, float]:
    """Plain Monte Carlo estimate of `log Z* = log E[exp(r(g(x))/alpha)]` and its standard error (delta method).

    Args:
        problem: generator and reward.
        n: number of samples of `N(0, I)`, at least 1.
        generator: source of randomness.

    Returns:
        `(value, stderr)`, nats; the logarithm of a mean is biased low by about `stderr^2 / 2`.
    """
    if n < 1:
        raise InputError(f"{n} samples: give at least 1")
    x = torch.randn(n, *problem.noise_shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        exponent = problem.reward(problem.generate(x)) / problem.alpha
    largest = exponent.max()
    mean, stderr = mean_and_stderr((exponent - largest).exp())
    return float(largest) + math.log(mean), stderr / mean
