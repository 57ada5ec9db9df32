"""Hypothesis strategies of maps, matrices, noise and tilted laws.

Strategies draw sizes, spectra and seeds, so that failures shrink to small, simple cases;
all tensors are float64 on the CPU. `E(A)` is not always non-negative (skew A): no property may assume it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError:
    raise ImportError("hnkit.testing needs hypothesis: pip install 'hnkit[testing]'") from None

from hnkit.errors import InputError
from hnkit.lipschitz.certify import Scaled, Sum, certified_bounds
from hnkit.tilt import kl_gaussians

__all__ = [
    "MATRIX_KINDS",
    "TiltedGaussian",
    "lipschitz_maps",
    "matrices",
    "noise",
    "tilted_gaussians",
]

T = TypeVar("T")
MatrixKind = Literal["general", "symmetric", "skew", "normal", "nilpotent", "low-rank"]
MATRIX_KINDS: tuple[MatrixKind, ...] = ("general", "symmetric", "skew", "normal", "nilpotent", "low-rank")

_SEEDS = st.integers(0, 2**32 - 1)


def _strategy(value: T | SearchStrategy[T]) -> SearchStrategy[T]:
    return value if isinstance(value, SearchStrategy) else st.just(value)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


def _orthogonal(seed: int, dim: int) -> Tensor:
    """An orthogonal matrix; seed 0 is the identity, so that failures shrink to diagonal cases."""
    if seed == 0:
        return torch.eye(dim, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(_normal(seed, dim, dim))[0]
    return basis


@st.composite
def matrices(
    draw: st.DrawFn,
    dim: int | SearchStrategy[int] = st.integers(1, 6),  # noqa: B008
    norm: float | SearchStrategy[float] = st.floats(0, 0.99),  # noqa: B008
    kind: MatrixKind | SearchStrategy[MatrixKind] = st.sampled_from(MATRIX_KINDS),  # noqa: B008
) -> Tensor:
    """Real square matrices of a prescribed spectral norm.

    Args:
        draw: supplied by hypothesis.
        dim: d, or a strategy for it.
        norm: `|A|_2`, reached up to rounding, or a strategy for it.
        kind: one of `MATRIX_KINDS`: general, symmetric, skew, normal (complex spectrum), nilpotent, low-rank (rank
            below d); or a strategy for it. A skew or nilpotent 1 x 1 matrix is 0, whatever the norm asked for.

    Returns:
        A strategy for `(d, d)` float64 tensors.
    """
    d, size, which = draw(_strategy(dim)), draw(_strategy(norm)), draw(_strategy(kind))
    if which not in MATRIX_KINDS:
        raise InputError(f"unknown matrix kind {which!r}: accepted are {', '.join(MATRIX_KINDS)}")
    if not 0 <= size < math.inf or d < 1:
        raise InputError(f"dim = {d}, norm = {size}: give a positive dimension and a finite norm of at least 0")
    spectrum = torch.tensor(draw(st.lists(st.floats(0, 1), min_size=d, max_size=d)), dtype=torch.float64)
    spectrum[0] = 1.0
    seeds = [draw(_SEEDS), draw(_SEEDS)]
    A = _BUILDERS[which](spectrum, seeds)
    found = float(torch.linalg.matrix_norm(A, 2))
    return A * (size / found) if found > 0 else A


def _general(spectrum: Tensor, seeds: list[int]) -> Tensor:
    d = spectrum.numel()
    return _orthogonal(seeds[0], d) * spectrum @ _orthogonal(seeds[1], d)


def _signs(seed: int, count: int) -> Tensor:
    return torch.where(torch.rand(count, generator=_generator(seed)) < 0.5, -1.0, 1.0).double()


def _symmetric(spectrum: Tensor, seeds: list[int]) -> Tensor:
    Q = _orthogonal(seeds[0], spectrum.numel())
    return Q * (spectrum * _signs(seeds[1], spectrum.numel())) @ Q.T


def _rotations(spectrum: Tensor, cosines: Tensor, seed: int) -> Tensor:
    """Orthogonal similarity of scaled rotations `s_k R(angle_k)` of planes, and of 0 or `s cos` in an odd rest."""
    d = spectrum.numel()
    blocks = torch.diag(spectrum * cosines)
    for k in range(0, d - 1, 2):
        s, c = spectrum[k], cosines[k]
        sine = s * torch.sqrt(1 - c * c)
        blocks[k : k + 2, k : k + 2] = torch.stack([s * c, -sine, sine, s * c]).reshape(2, 2)
    Q = _orthogonal(seed, d)
    return Q @ blocks @ Q.T


def _skew(spectrum: Tensor, seeds: list[int]) -> Tensor:
    return _rotations(spectrum, torch.zeros_like(spectrum), seeds[0])


def _normal_matrix(spectrum: Tensor, seeds: list[int]) -> Tensor:
    cosines = 2 * torch.rand(spectrum.numel(), generator=_generator(seeds[1]), dtype=torch.float64) - 1
    return _rotations(spectrum, cosines, seeds[0])


def _nilpotent(spectrum: Tensor, seeds: list[int]) -> Tensor:
    Q = _orthogonal(seeds[0], spectrum.numel())
    return Q @ (spectrum[:, None] * _normal(seeds[1], spectrum.numel(), spectrum.numel())).triu(1) @ Q.T


def _low_rank(spectrum: Tensor, seeds: list[int]) -> Tensor:
    d = spectrum.numel()
    keep = torch.arange(d) < (max(1, d // 2) if d > 1 else 0)
    return _general(torch.where(keep, spectrum, torch.zeros_like(spectrum)), seeds)


_BUILDERS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "general": _general,
    "symmetric": _symmetric,
    "skew": _skew,
    "normal": _normal_matrix,
    "nilpotent": _nilpotent,
    "low-rank": _low_rank,
}


@st.composite
def noise(
    draw: st.DrawFn,
    shape: tuple[int, ...] | SearchStrategy[tuple[int, ...]],
    rows: int | SearchStrategy[int] = 8,
) -> Tensor:
    """Batches of standard normal noise, from seeds.

    Args:
        draw: supplied by hypothesis.
        shape: the shape of one sample, or a strategy for it.
        rows: n, or a strategy for it.

    Returns:
        A strategy for `(n, *shape)` float64 tensors.
    """
    return _normal(draw(_SEEDS), draw(_strategy(rows)), *draw(_strategy(shape)))


@st.composite
def lipschitz_maps(
    draw: st.DrawFn,
    shape: tuple[int, ...] | SearchStrategy[tuple[int, ...]] = (4,),
    constant: float | SearchStrategy[float] = st.floats(0.01, 0.95),  # noqa: B008
) -> nn.Module:
    """Noise maps with a certified Lipschitz constant: linear, MLP, residual, gradient and (for images) convolutional.

    `lipschitz_upper(f).value` is at most the constant asked for, and within 1e-9 of it.

    Args:
        draw: supplied by hypothesis.
        shape: the shape of one noise sample, or a strategy for it; three axes (channels, height, width) add
            convolutional maps.
        constant: the certified constant, at least 0, or a strategy for it.

    Returns:
        A strategy for float64 modules in eval mode, without trainable parameters.
    """
    sample_shape, size = draw(_strategy(shape)), draw(_strategy(constant))
    if not 0 <= size < math.inf:
        raise InputError(f"constant = {size}: give a finite Lipschitz constant of at least 0")
    kinds = ["linear", "mlp", "residual", "gradient"] + ["convolution"] * (len(sample_shape) == 3)
    kind, seed = draw(st.sampled_from(kinds)), draw(_SEEDS)
    activations: list[Callable[[], nn.Module]] = [nn.Tanh, nn.SiLU, nn.GELU, nn.ReLU, _softplus]
    activation = draw(st.sampled_from(activations))
    body = _body(kind, sample_shape, activation, seed).double().requires_grad_(False).eval()
    return Scaled(body, size / certified_bounds(body).norm * (1 - 1e-12))


def _softplus() -> nn.Module:
    """Softplus with a threshold above which torch's shortcut is exact in float64: the default one has a step."""
    return nn.Softplus(threshold=40.0)


def _body(kind: str, shape: tuple[int, ...], activation: Callable[[], nn.Module], seed: int) -> nn.Module:
    if kind == "convolution":
        inner, outer = nn.Conv2d(shape[0], 3, 3, padding=1), nn.Conv2d(3, shape[0], 3, padding=1)
        return _randomise(nn.Sequential(inner, activation(), outer), seed)
    dim = math.prod(shape)
    if kind == "linear":
        core: nn.Module = _randomise(nn.Linear(dim, dim), seed)
    else:
        first, last = nn.Linear(dim, dim + 2), nn.Linear(dim + 2, dim)
        core = _randomise(nn.Sequential(first, activation(), last), seed)
        if kind == "gradient":
            with torch.no_grad():
                last.weight.copy_(first.weight.T)
        if kind == "residual":
            core = Sum(nn.Identity(), core)
    return nn.Sequential(nn.Flatten(), core, nn.Unflatten(1, shape))


def _randomise(module: nn.Module, seed: int) -> nn.Module:
    generator = _generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@dataclass(frozen=True, eq=False)
class TiltedGaussian:
    """The tilt of standard normal noise by a concave quadratic reward, with everything known in closed form.

    Generator `g(x) = x`, reward `r(y) = -y'Hy/2 + b'y` at temperature 1: the tilted noise law is `N(S b, S)`,
    `S = (I + H)^-1`. The L2 loss is minimised by `x + f(x) = S (x + b)`, whose law `N(S b, S^2)` has lost spread.

    Args:
        precision: H, `(d, d)`, symmetric positive semidefinite, float64.
        linear: b, `(d,)`, float64.
    """

    precision: Tensor
    linear: Tensor

    @property
    def dim(self) -> int:
        """Number of noise entries d."""
        return self.linear.numel()

    @property
    def covariance(self) -> Tensor:
        """`S = (I + H)^-1`, `(d, d)`."""
        inverse: Tensor = torch.linalg.inv(torch.eye(self.dim, dtype=torch.float64) + self.precision)
        return (inverse + inverse.T) / 2

    @property
    def mean(self) -> Tensor:
        """`S b`, `(d,)`."""
        return self.covariance @ self.linear

    def generate(self, x: Tensor) -> Tensor:
        """The identity."""
        return x

    def reward(self, y: Tensor) -> Tensor:
        """`-y'Hy/2 + b'y`, `(n,)`."""
        return -0.5 * ((y @ self.precision.to(y)) * y).sum(1) + y @ self.linear.to(y)

    def log_z(self) -> float:
        """`log E[exp r(x)] = (b'Sb - log det(I + H)) / 2`, nats."""
        return 0.5 * float(self.linear @ self.mean + torch.linalg.slogdet(self.covariance).logabsdet)

    def optimal_map(self) -> nn.Module:
        """`f(x) = (S^1/2 - I) x + S b`: the law of `x + f(x)` is the tilted law."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return self._affine(vectors * values.sqrt() @ vectors.T)

    def l2_map(self) -> nn.Module:
        """`f(x) = (S - I) x + S b`: the minimiser of the L2 loss."""
        return self._affine(self.covariance)

    def kl_optimal(self) -> float:
        """`KL(N(S b, S) || N(0, I))`, nats."""
        zero, identity = torch.zeros(self.dim, dtype=torch.float64), torch.eye(self.dim, dtype=torch.float64)
        return kl_gaussians(self.mean, self.covariance, zero, identity)

    def l2_gap(self) -> float:
        """`KL(N(S b, S^2) || N(S b, S)) = sum_i (s_i - 1 - log s_i) / 2`, nats."""
        return kl_gaussians(self.mean, self.covariance @ self.covariance, self.mean, self.covariance)

    def _affine(self, slope: Tensor) -> nn.Module:
        layer = nn.Linear(self.dim, self.dim, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(slope - torch.eye(self.dim, dtype=torch.float64))
            layer.bias.copy_(self.mean)
        return layer.requires_grad_(False)


@st.composite
def tilted_gaussians(
    draw: st.DrawFn,
    dim: int | SearchStrategy[int] = st.integers(1, 5),  # noqa: B008
    strength: float | SearchStrategy[float] = st.floats(0, 4),  # noqa: B008
) -> TiltedGaussian:
    """Quadratic tilts of standard normal noise, rank-deficient ones among them.

    Args:
        draw: supplied by hypothesis.
        dim: d, or a strategy for it.
        strength: `|H|_2`, or a strategy for it.

    Returns:
        A strategy for `TiltedGaussian`.
    """
    d, size = draw(_strategy(dim)), draw(_strategy(strength))
    if not 0 <= size < math.inf or d < 1:
        raise InputError(f"dim = {d}, strength = {size}: give a positive dimension and a finite norm of at least 0")
    spectrum = torch.tensor(draw(st.lists(st.floats(0, 1), min_size=d, max_size=d)), dtype=torch.float64)
    Q = _orthogonal(draw(_SEEDS), d)
    precision = Q * (size * spectrum) @ Q.T
    return TiltedGaussian((precision + precision.T) / 2, 0.5 * _normal(draw(_SEEDS), d))
