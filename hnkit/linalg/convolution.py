"""True bounds of operator norms: matrices, and convolutions on inputs of every size.

The norm of a convolution layer is not the norm of its kernel reshaped to a matrix. On an infinite grid a convolution
with taps `W_k` is diagonalised by the Fourier transform, and its norm is `sup_t |P(t)|_2` with the symbol
`P(t) = sum_k W_k exp(i k.t)`. A zero-padded layer is a compression of it (restrict, convolve, restrict), a circular
one is `P` on a grid of frequencies: both have at most that norm, whatever the image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hnkit.bounds import solver_margin
from hnkit.maps import slices

_EPS = torch.finfo(torch.float64).eps
_WORK = 2e10  # floating-point operations spent on one layer at most, before the grid of frequencies gets coarser
_POINT = 1e5  # what one frequency costs beside them
_CHUNK = 2**21  # complex entries of the symbol held at once


def spectral_norm_bound(matrix: Tensor) -> float:
    """`|A|_2` from the singular values in float64, moved outward by the error of the solver.

    The matrix is brought near size 1 before by a power of two.
    """
    if matrix.numel() == 0:
        return 0.0
    scaled, exponent = _near_one(matrix)
    norm = float(torch.linalg.svdvals(scaled)[0])
    return _scaled_up(norm * (1 + solver_margin(max(matrix.shape))), exponent)


def _near_one(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor in float64 over a power of two near its largest entry, exactly but for what that makes negligible."""
    tensor = tensor.detach().double()
    exponent = math.frexp(float(tensor.abs().max()))[1]
    return torch.ldexp(
        torch.ldexp(tensor, torch.tensor(-exponent // 2)), torch.tensor(-exponent - -exponent // 2)
    ), exponent


def _scaled_up(bound: float, exponent: int) -> float:
    """`bound 2^exponent`, rounded up; infinite where it leaves the range."""
    try:
        return math.nextafter(math.ldexp(bound, exponent), math.inf) if bound > 0 else 0.0
    except OverflowError:
        return math.inf


def convolution_norm_bound(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int = 1) -> float:
    """Upper bound of the norm of a convolution, zero-padded or circular, on inputs of every size.

    Stride s turns the layer into one of stride 1 whose input channels are the s interleaved parts of the input
    (polyphase form), dilation into zero taps. The supremum over frequencies is enclosed from a grid: per axis,
    `t -> |P(t) v|^2` is a real trigonometric polynomial of degree n = taps - 1, and by the Riesz inequality its
    maximum is at most `1 / cos(pi n / N)` times its maximum over N > 2n equally spaced points. Axes multiply.

    Args:
        weight: `(out, in / groups, k_1, ..., k_m)`.
        stride: per axis.
        dilation: per axis.
        groups: the channels form this many independent convolutions.

    Returns:
        The bound; with the default grid at most 0.25 % per axis above the supremum for small layers.

    Source:
        M. Riesz, Jahresber. DMV 23 (1914); H. Ehlich and K. Zeller, Math. Z. 86 (1964), DOI 10.1007/BF01111276.
    """
    if weight.numel() == 0:
        return 0.0
    scaled, exponent = _near_one(weight)
    taps = _polyphase(_dilate(scaled, dilation), stride)
    out, inner = taps.shape[0] // groups, taps.shape[1]
    grouped = taps.reshape(groups, out, inner, *taps.shape[2:])
    degrees = [size - 1 for size in taps.shape[2:]]
    points = _grid(degrees, groups * out * inner * min(out, inner))
    factor = math.prod(1 / math.sqrt(math.cos(math.pi * n / N)) for n, N in zip(degrees, points, strict=True))
    largest = _largest_on_grid(grouped, points)
    # Rounding of the sums over taps: absolute, by the sum of their norms.
    taps_norm = float(grouped.flatten(3).norm(dim=(1, 2)).sum(-1).max())
    bound = (largest + 64 * math.prod(taps.shape[2:]) * _EPS * taps_norm) * factor * (1 + 64 * _EPS)
    return _scaled_up(bound, exponent)


def _dilate(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """Put `dilation - 1` zero taps between neighbours."""
    sizes = [(k - 1) * step + 1 for k, step in zip(weight.shape[2:], dilation, strict=True)]
    spread = weight.new_zeros(*weight.shape[:2], *sizes)
    spread[(slice(None), slice(None), *(slice(None, None, step) for step in dilation))] = weight
    return spread


def _polyphase(weight: Tensor, stride: Sequence[int]) -> Tensor:
    """The stride-1 kernel over the interleaved parts of the input: `(out, in * prod(stride), ceil(k / stride)...)`."""
    out, inner = weight.shape[:2]
    axes = len(stride)
    sizes = [-(-k // s) for k, s in zip(weight.shape[2:], stride, strict=True)]
    padded = weight.new_zeros(out, inner, *(q * s for q, s in zip(sizes, stride, strict=True)))
    padded[tuple(slice(0, k) for k in weight.shape)] = weight
    split = padded.reshape(out, inner, *(part for q, s in zip(sizes, stride, strict=True) for part in (q, s)))
    order = [0, 1, *(3 + 2 * a for a in range(axes)), *(2 + 2 * a for a in range(axes))]
    return split.permute(order).reshape(out, inner * math.prod(stride), *sizes)


def _grid(degrees: Sequence[int], work: int) -> list[int]:
    """Points per axis: 32 per degree while the eigenvalue problems stay affordable, never below 4."""
    for density in (32, 16, 8):
        points = [max(1, density * n) for n in degrees]
        if (30 * work + _POINT) * math.prod(points) <= _WORK:
            return points
    return [max(1, 4 * n) for n in degrees]


def _largest_on_grid(grouped: Tensor, points: Sequence[int]) -> float:
    """Largest singular value of the symbol over the grid; `grouped` is `(groups, out, in, *taps)`."""
    groups, out, inner = grouped.shape[:3]
    flat = grouped.flatten(3).to(torch.complex128)
    taps = torch.cartesian_prod(*(torch.arange(k) for k in grouped.shape[3:])).reshape(flat.shape[-1], -1)
    # P(-t) is the conjugate of P(t): half of the last axis is enough.
    axes = [torch.arange(N) / N for N in points]
    axes[-1] = axes[-1][: points[-1] // 2 + 1]
    frequencies = torch.cartesian_prod(*(axis.double() for axis in axes)).reshape(-1, len(points))
    largest = 0.0
    step = max(1, _CHUNK // (groups * out * inner))
    for part in slices(frequencies.shape[0], step):
        angles = 2 * math.pi * frequencies[part] @ taps.double().T
        phases = torch.polar(torch.ones_like(angles), angles).to(flat.device)
        symbol = torch.einsum("goik,fk->fgoi", flat, phases)
        gram = symbol @ symbol.mH if out <= inner else symbol.mH @ symbol
        # The product and the eigenvalues are those of a matrix within (out + in) eps |P|_F^2 times a small number.
        margin = 8 * (out + inner + 8) * _EPS * gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        top = float((torch.linalg.eigvalsh(gram)[..., -1] + margin).max())
        largest = max(largest, top)
    return math.sqrt(max(largest, 0.0))
