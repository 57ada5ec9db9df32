"""Linear generator, quadratic or linear reward: every law is Gaussian and every optimum is an affine map (item e).

With `g(x) = W x + w` and `r(y) = -y'Q y/2 + q'y` the tilt is `r(g(x))/alpha = -x'H x/2 + b'x + c0`,
`H = W'Q W/alpha`, `b = W'(q - Q w)/alpha`, and with `S = (I + H)^-1` the tilted noise law is `N(S b, S)`. Along an
eigenvector of `S` with eigenvalue `s` the slope of `T` is `sqrt(s)` at the exact optimum, `s` at the L2 optimum and
`2 s/(1 + s)`, the harmonic mean of 1 and `s`, at the second-order optimum; the mean is `S b` at all three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.tilt import NoiseLaw, kl_gaussians
from hnkit.toy.problem import Toy, float64, require_alpha, standard_normal


@dataclass(frozen=True, eq=False)
class LinearGaussian(Toy):
    """`y = W x + w`, `r(y) = -y'Q y/2 + q'y`, `x ~ N(0, I_d)`.

    Args:
        weight: `W`, `(m, d)`, of any rank; the output laws live on the affine subspace `w + range W`.
        curvature: `Q`, `(m, m)`, symmetric. `I + W'QW/alpha` must be positive definite, or `Z*` is infinite;
            `Q >= 0` (a concave reward) always is fine, `Q = 0` is the linear reward.
        slope: `q`, `(m,)`.
        offset: `w`, `(m,)`; default 0.
        alpha: temperature.
        name: the name in reports.

    Source:
        THEORY item e; arXiv 2508.09968, eq. 5 and 11.
    """

    weight: Tensor
    curvature: Tensor
    slope: Tensor
    offset: Tensor | None = None
    alpha: float = 1.0
    name: str = field(default="linear-gaussian", kw_only=True)

    def __post_init__(self) -> None:
        require_alpha(self.alpha)
        W, Q, q = float64(self.weight), float64(self.curvature), float64(self.slope)
        if W.dim() != 2 or Q.shape != (W.shape[0],) * 2 or q.shape != W.shape[:1]:
            raise InputError(
                f"W, Q, q of shapes {tuple(W.shape)}, {tuple(Q.shape)}, {tuple(q.shape)}: give (m, d), (m, m), (m,)"
            )
        w = torch.zeros_like(q) if self.offset is None else float64(self.offset)
        if w.shape != q.shape:
            raise InputError(f"an offset of shape {tuple(w.shape)}: give {tuple(q.shape)}")
        if not all(bool(torch.isfinite(part).all()) for part in (W, Q, q, w)):
            raise InputError("W, Q, q or the offset is not finite: give finite entries")
        if float((Q - Q.mT).abs().max()) > 1e-12 * (1 + float(Q.abs().max())):
            raise InputError("the curvature Q is not symmetric: give (Q + Q')/2")
        for attribute, value in (("weight", W), ("curvature", Q), ("slope", q), ("offset", w)):
            object.__setattr__(self, attribute, value)
        if float(self._spectrum[0].min()) <= -1.0:
            raise InputError(
                "I + W'QW/alpha is not positive definite, so Z* is infinite: raise alpha or make Q less negative"
            )

    @property
    def statement(self) -> str:
        """One line: generator, reward, dimension."""
        reward = "linear" if not bool(self.curvature.any()) else "quadratic"
        m, d = self.weight.shape
        return f"y = W x + w, W {m} x {d} of rank {self._rank}, {reward} reward, alpha = {self.alpha:g}"

    @property
    def dim(self) -> int:
        """Dimension `d` of the noise."""
        return int(self.weight.shape[1])

    @property
    def injective(self) -> bool:
        """Whether `W` has full column rank."""
        return self._rank == self.dim

    @property
    def unavailable(self) -> frozenset[str]:  # type: ignore[override]
        """`alternatives` exist only when `W` has a kernel."""
        return frozenset({"alternatives"}) if self.injective else frozenset()

    # The tilt in noise coordinates: -x'Hx/2 + b'x + c0.

    @cached_property
    def _w(self) -> Tensor:
        assert self.offset is not None
        return self.offset

    @cached_property
    def hessian(self) -> Tensor:
        """`H = W'QW/alpha`, `(d, d)`."""
        H = self.weight.mT @ self.curvature @ self.weight / self.alpha
        return 0.5 * (H + H.mT)

    @cached_property
    def gradient(self) -> Tensor:
        """`b = W'(q - Qw)/alpha`, `(d,)`."""
        return self.weight.mT @ (self.slope - self.curvature @ self._w) / self.alpha

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        h, V = torch.linalg.eigh(self.hessian)
        return h, V

    def _function_of_h(self, values: Tensor) -> Tensor:
        """The symmetric matrix with the eigenvectors of `H` and the given eigenvalues."""
        V = self._spectrum[1]
        return (V * values) @ V.mT

    @cached_property
    def covariance(self) -> Tensor:
        """`S = (I + H)^-1`, the covariance of the tilted noise law."""
        return self._function_of_h(1 / (1 + self._spectrum[0]))

    @cached_property
    def mean(self) -> Tensor:
        """`S b`, the mean of the tilted noise law."""
        return self.covariance @ self.gradient

    @cached_property
    def _singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U` (m, k), singular values (k,), `V'` (k, d) of `W`, of the numerical rank `k`."""
        U, values, Vh = torch.linalg.svd(self.weight, full_matrices=False)
        cut = max(self.weight.shape) * torch.finfo(torch.float64).eps * float(values[0])
        k = int((values > cut).sum())
        return U[:, :k], values[:k], Vh[:k]

    @property
    def _rank(self) -> int:
        return int(self._singular[1].numel())

    def generate(self, x: Tensor) -> Tensor:
        """`W x + w`, `(n, m)`."""
        return x @ self.weight.to(x).mT + self._w.to(x)

    def reward(self, y: Tensor) -> Tensor:
        """`-y'Qy/2 + q'y`, `(n,)`."""
        return -0.5 * ((y @ self.curvature.to(y)) * y).sum(1) + y @ self.slope.to(y)

    def log_z(self) -> float:
        """`(log det S + b'S b)/2 + r(w)/alpha`."""
        constant = float(self.reward(self._w[None])) / self.alpha
        return 0.5 * float(self.gradient @ self.mean - torch.log1p(self._spectrum[0]).sum()) + constant

    def log_z_check(self) -> tuple[float, float]:
        """Adaptive quadrature in output coordinates: one integral for each principal axis of the output law."""
        U, values, _ = self._singular
        quadratic = (U * values).mT @ self.curvature @ (U * values)
        curvatures, axes = np.linalg.eigh(quadratic.numpy())
        slopes = axes.T @ ((U * values).mT @ (self.slope - self.curvature @ self._w)).numpy()
        total = float(self.reward(self._w[None])) / self.alpha
        error = 1e-14 * (1 + abs(total))
        for h, b in zip(curvatures / self.alpha, slopes / self.alpha, strict=True):
            peak, width = b / (1 + h), 1 / math.sqrt(1 + h)
            top = b * peak - 0.5 * (1 + h) * peak**2

            def integrand(t: float, h: float = h, b: float = b, top: float = top) -> float:
                return math.exp(b * t - 0.5 * (1 + h) * t * t - top) / math.sqrt(2 * math.pi)

            value, bound = quad(integrand, peak - 12 * width, peak + 12 * width, epsabs=0, epsrel=1e-12, limit=200)
            total += top + math.log(float(value))
            error += float(bound) / float(value) + 1e-14 * (1 + abs(top))
        return float(total), float(error)

    def log_p0_star(self, x: Tensor) -> Tensor:
        """Log density of `N(S b, S)`."""
        h, V = self._spectrum
        centred = (x - self.mean.to(x)) @ V.to(x)
        precision = (1 + h).to(x)
        log_density: Tensor = torch.log(precision).sum() - (centred.square() * precision).sum(1)
        return 0.5 * log_density - self._half_log_2pi(self.dim)

    def sample_p0_star(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples of `N(S b, S)`, through the Cholesky factor of `S`."""
        factor = torch.linalg.cholesky(self.covariance)
        samples: Tensor = self.mean + standard_normal(n, self.dim, generator) @ factor.mT
        return samples

    @staticmethod
    def _half_log_2pi(dim: int) -> float:
        return 0.5 * dim * math.log(2 * math.pi)

    def _output_density(self, y: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        """Log density of `g_# N(mean, covariance)` with respect to Lebesgue measure on `w + range W`."""
        U, values, Vh = (part.to(y) for part in self._singular)
        centred = y - self._w.to(y)
        z = centred @ U / values
        off = (centred - centred @ U @ U.mT).norm(dim=1) > 1e-9 * (1 + centred.norm(dim=1))
        factor = torch.linalg.cholesky(Vh @ covariance.to(y) @ Vh.mT)
        white = torch.linalg.solve_triangular(factor, (z - Vh @ mean.to(y)).mT, upper=False)
        log_volume = factor.diagonal().log().sum() + values.log().sum()
        density = -0.5 * white.square().sum(0) - log_volume - self._half_log_2pi(z.shape[1])
        return torch.where(off, -math.inf, density)

    def log_p_base(self, y: Tensor) -> Tensor:
        """Log density of `N(w, WW')` on `w + range W`; minus infinity off that subspace."""
        return self._output_density(y, torch.zeros(self.dim), torch.eye(self.dim))

    def log_p_star(self, y: Tensor) -> Tensor:
        """Log density of `N(w + W S b, W S W')` on `w + range W`; minus infinity off that subspace."""
        return self._output_density(y, self.mean, self.covariance)

    # Optima: affine maps T x = K x + S b with symmetric K.

    def _map(self, slopes: Tensor) -> nn.Linear:
        layer = nn.Linear(self.dim, self.dim, dtype=torch.float64).requires_grad_(False)
        layer.weight.copy_(self._function_of_h(slopes - 1))
        assert layer.bias is not None
        layer.bias.copy_(self.mean)
        return layer

    def _slopes(self, kind: str) -> Tensor:
        h = self._spectrum[0]
        return {"exact": (1 + h).rsqrt(), "l2": 1 / (1 + h), "second-order": 2 / (2 + h)}[kind]

    def optimal_map(self) -> nn.Linear:
        """`f(x) = (S^1/2 - I) x + S b`, a frozen linear layer."""
        return self._map(self._slopes("exact"))

    def l2_map(self) -> nn.Linear:
        """`f(x) = (S - I) x + S b`: its law is `N(S b, S^2)`."""
        return self._map(self._slopes("l2"))

    def second_order_map(self) -> nn.Linear:
        """The minimiser of `E[|f|^2/2 + tr(J^2)/2] - E[r(g(x + f(x)))]/alpha` with symmetric slope.

        For `f(x) = J x + c` that loss is convex in `(J, c)`; its stationarity condition `J + J' + H (I + J) = 0` has
        the solution `J = -(2I + H)^-1 H`, so along an eigenvector of `H` with eigenvalue `h` the slope of `T` is
        `2/(2 + h) = 2s/(1 + s)`, and `c = S b`. Skew matrices on the kernel of `H` may be added at no cost: in general
        `E[|f|^2 + tr(J^2)] = E[(x.f - tr J)^2]` vanishes for every field that preserves `p0` to first order, a
        rotation say. The solution given here is the one of least norm.
        """
        return self._map(self._slopes("second-order"))

    def _gap_of_slopes(self, kind: str) -> float:
        ratio = self._slopes(kind).square() * (1 + self._spectrum[0])
        return 0.5 * float((ratio - 1 - torch.log(ratio)).sum())

    def kl_optimal(self) -> float:
        """`(tr S + |S b|^2 - d - log det S)/2`."""
        s = 1 / (1 + self._spectrum[0])
        return 0.5 * float((s - 1 - torch.log(s)).sum() + self.mean.square().sum())

    def l2_gap(self) -> float:
        """`KL(N(Sb, S^2) || N(Sb, S)) = sum_i (s_i - 1 - log s_i)/2`."""
        return self._gap_of_slopes("l2")

    def second_order_gap(self) -> float:
        """`sum_i (u_i - 1 - log u_i)/2` with `u_i = 4 s_i/(1 + s_i)^2`."""
        return self._gap_of_slopes("second-order")

    def gap_of_affine(self, slope: Tensor, offset: Tensor) -> float:
        """`KL(N(c, K K') || N(S b, S))` for `T x = K x + c`, nats; infinite for singular `K`.

        Args:
            slope: `K`, `(d, d)`.
            offset: `c`, `(d,)`.
        """
        slope, offset = float64(slope), float64(offset)
        if slope.shape != (self.dim,) * 2 or offset.shape != (self.dim,):
            d, given = self.dim, (tuple(slope.shape), tuple(offset.shape))
            raise InputError(f"K, c of shapes {given[0]}, {given[1]}: give ({d}, {d}), ({d},)")
        return kl_gaussians(offset, slope @ slope.mT, self.mean, self.covariance)

    def alternatives(self) -> list[NoiseLaw]:
        """Laws that differ from `p0*` on the kernel of `W` alone, where `p0*` is standard normal."""
        if self.injective:
            return super().alternatives()
        Vh = torch.linalg.svd(self.weight, full_matrices=True).Vh
        kernel = Vh[self._rank :].mT
        direction, zero = kernel[:, 0], torch.zeros(self.dim, dtype=torch.float64)
        projection = torch.outer(direction, direction)
        identity = torch.eye(self.dim, dtype=torch.float64)

        def law(name: str, scale: float, shift: float) -> NoiseLaw:
            stretch = identity + (scale - 1) * projection
            mean = self.mean + shift * direction
            kl = kl_gaussians(mean, stretch @ self.covariance @ stretch, zero, identity)

            def sample(n: int, generator: torch.Generator) -> Tensor:
                moved: Tensor = self.sample_p0_star(n, generator) @ stretch + shift * direction
                return moved

            return NoiseLaw(name, sample, kl)

        return [
            law("shifted by 1 in the kernel of W", 1.0, 1.0),
            law("halved in the kernel of W", 0.5, 0.0),
            law("doubled in the kernel of W", 2.0, 0.0),
        ]


def _rotation(dim: int, seed: int) -> Tensor:
    matrix = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotation: Tensor = torch.linalg.qr(matrix).Q
    return rotation


def linear_gaussian(dim: int = 6, alpha: float = 1.0) -> LinearGaussian:
    """The default: full-rank `W`, curvatures of the tilt from 0.25 to 4, so `S` has eigenvalues from 0.8 to 0.2."""
    W = _rotation(dim, 1) * torch.linspace(0.5, 1.5, dim, dtype=torch.float64)
    left = _rotation(dim, 2)
    inverse = torch.linalg.inv(W)
    target = (left * torch.logspace(math.log10(0.25), math.log10(4), dim, dtype=torch.float64)) @ left.mT
    Q = inverse.mT @ target @ inverse
    offset = torch.linspace(-0.5, 0.5, dim, dtype=torch.float64)
    centre = W @ torch.cos(torch.arange(dim, dtype=torch.float64)) + offset
    Q = 0.5 * (Q + Q.mT)
    return LinearGaussian(W, Q, Q @ centre, offset, alpha)


def linear_gaussian_low_rank(alpha: float = 2.0) -> LinearGaussian:
    """`d = 8`, `m = 3`, rank 2: a generator with a six-dimensional kernel and outputs on a plane."""
    left, right = _rotation(3, 3)[:, :2], _rotation(8, 4)[:, :2]
    W = left @ torch.diag(torch.tensor([1.5, 0.7], dtype=torch.float64)) @ right.mT
    Q = torch.tensor([[2.0, 0.5, 0.0], [0.5, 3.0, -0.4], [0.0, -0.4, 1.0]], dtype=torch.float64)
    q = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)
    offset = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64)
    return LinearGaussian(W, Q, q, offset, alpha, name="linear-gaussian-low-rank")


def linear_reward(alpha: float = 0.5) -> LinearGaussian:
    """`d = 4`, `m = 2`, a linear reward: the tilt is a translation, and the L2 optimum is the exact optimum."""
    W = _rotation(4, 5)[:2] * torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
    q = torch.tensor([0.4, -0.3], dtype=torch.float64)
    return LinearGaussian(W, torch.zeros(2, 2), q, torch.ones(2), alpha, name="linear-reward")


__all__ = ["LinearGaussian", "linear_gaussian", "linear_gaussian_low_rank", "linear_reward"]
