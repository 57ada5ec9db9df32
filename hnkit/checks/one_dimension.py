"""The KL of a map of the line by quadrature and by masses of intervals, whether the map folds or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hnkit.errors import NotApplicable
from hnkit.figures.measured_map import MeasuredMap
from hnkit.kl.divergence import noise_kl
from hnkit.maps import selects_rows

_REACH = 8.5


def binned_kl(measured: MeasuredMap, bins: int) -> tuple[float, float]:
    """The KL by the integrand at the middles of bins of [-8.5, 8.5], and by the masses that the map moves.

    Raises:
        NotApplicable: T is not increasing.
    """
    line = _Line.of(measured, bins)
    if not bool((line.moved.diff() > 0).all()):
        raise NotApplicable("T is not increasing, so it is not injective")
    mass, image = _normal_masses(line.edges), _normal_masses(line.moved)
    kept = (mass > 1e-300) & (image > 1e-300)
    return float((mass * line.integrand(line.middles)).sum()), float((mass * (mass.log() - image.log()))[kept].sum())


def folded_kl(measured: MeasuredMap, bins: int) -> tuple[float, float, float]:
    """`E[eq. 53]` and `H(X | TX)` by the integrand at middles and their preimages; and the KL by moved masses.

    The law of TX has at y the density `p0(y) sum exp(ell(x))` over the preimages x of y, so that `H(X | TX)` is the
    mean of `log sum exp(ell(x')) - ell(x)` over the preimages x' of Tx. The KL is that of the masses of the intervals
    between the images of the edges, which needs values of the map alone. The edges crowd towards the turns of T, where
    the density of TX is an inverse root.

    Raises:
        NotApplicable: T is monotone, so nothing folds; or it jumps, or moves mass beyond double precision.
    """
    line, pieces = _Line.of(measured, bins).crowded()
    mass = _normal_masses(line.edges)
    own, images = line.integrand(line.middles), line.values(line.middles)
    total = torch.full_like(own, -torch.inf)
    for start, stop in pieces:
        edges, moved = line.edges[start : stop + 1], line.moved[start : stop + 1]
        inside = (images >= moved.min()) & (images <= moved.max())
        here = torch.zeros_like(inside)
        here[start:stop] = True  # a middle is its own preimage in its own piece
        points = torch.where(here, line.middles, _inverse(images, edges, moved))[inside | here]
        total[inside | here] = torch.logaddexp(total[inside | here], line.integrand(points))
    lower, entropy = float((mass * own).sum()), float((mass * (total - own)).sum())
    ends = line.moved.sort().values
    below = torch.zeros_like(ends)
    for start, stop in pieces:
        edges, moved = line.edges[start : stop + 1], line.moved[start : stop + 1]
        reached = torch.special.ndtr(_inverse(ends, edges, moved))
        first, last = torch.special.ndtr(edges[[0, -1]])
        below += reached - first if bool(moved[-1] > moved[0]) else last - reached
    image, base = below.diff(), _normal_masses(ends)
    kept = (image > 1e-14) & (base > 1e-300)
    lost = float(image[(image > 1e-14) & ~kept].sum())
    if lost > 1e-6:
        raise NotApplicable(f"T moves a mass of {lost:.2g} to where N(0, 1) has none in double precision")
    return lower, entropy, float((image * (image.log() - base.log()))[kept].sum())


@dataclass(frozen=True)
class _Line:
    """A map of the line on the edges of equal bins."""

    measured: MeasuredMap
    edges: Tensor
    moved: Tensor

    @classmethod
    def of(cls, measured: MeasuredMap, bins: int) -> _Line:
        if measured.dim != 1:
            raise NotApplicable(f"d = {measured.dim}")
        if selects_rows(measured.f):
            raise NotApplicable("the rows have conditions of their own")
        if torch.finfo(measured.value.dtype).eps > 1e-6:
            raise NotApplicable(f"bins need float32 or better; the map computes in {measured.value.dtype}")
        line = cls(measured, torch.linspace(-_REACH, _REACH, bins + 1, dtype=torch.float64), torch.zeros(0))
        return cls(measured, line.edges, line.values(line.edges))

    @property
    def middles(self) -> Tensor:
        return (self.edges[1:] + self.edges[:-1]) / 2

    def _rows(self, points: Tensor) -> Tensor:
        return points.reshape(-1, *self.measured.x.shape[1:]).to(self.measured.x)

    def values(self, points: Tensor) -> Tensor:
        """`x + f(x)`."""
        with torch.no_grad():
            return points + self.measured.f(self._rows(points)).double().flatten().cpu()

    def integrand(self, points: Tensor) -> Tensor:
        """Eq. 53 at each point."""
        estimate = noise_kl(
            self.measured.f, self._rows(points), method="exact", form="change-of-variables", check=False, certify=False
        )
        return estimate.per_sample.cpu()

    def crowded(self) -> tuple[_Line, list[tuple[int, int]]]:
        """Edges that crowd where T turns and where it takes the values of its turns; and its pieces, as ranges of them.

        Raises:
            NotApplicable: T is monotone, or jumps.
        """
        rising = self.moved.diff() > 0
        turns = ((rising[1:] != rising[:-1]).nonzero().flatten() + 1).tolist()
        if not turns:
            raise NotApplicable("T is monotone: no preimage is left open, and H(X | TX) = 0")
        corners = torch.tensor([self._turn(turn, bool(rising[turn - 1])) for turn in turns], dtype=torch.float64)
        values = self.values(corners)
        bins = len(rising)
        s = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        steps = s**3 * (10 - 15 * s + 6 * s**2)  # flat to second order at both ends
        parts: list[Tensor] = []
        pieces: list[tuple[int, int]] = []
        for (start, stop), (low, high) in zip(
            pairwise([0, *turns, bins]), pairwise([-_REACH, *corners.tolist(), _REACH]), strict=True
        ):
            edges, moved = self.edges[start : stop + 1], self.moved[start : stop + 1]
            taken = values[(values > moved.min()) & (values < moved.max())]
            inner = _inverse(taken, edges, moved)
            inner = inner[(inner > low) & (inner < high)].sort().values
            first = bins * len(parts)
            parts += [a + (b - a) * steps[:-1] for a, b in pairwise([low, *inner.tolist(), high])]
            pieces.append((first, bins * len(parts)))
        edges = torch.cat([*parts, torch.tensor([_REACH], dtype=torch.float64)])
        line = _Line(self.measured, edges, self.values(edges))
        if bool(((line.moved.diff().abs() > 0.05) & (edges.diff() < 1e-5)).any()):
            raise NotApplicable("T jumps, so that it is not locally Lipschitz")
        return line, pieces

    def _turn(self, edge: int, top: bool) -> float:
        """Where T turns, within the two bins beside an edge, by narrowing a grid of 33 points."""
        low, high = float(self.edges[edge - 1]), float(self.edges[edge + 1])
        for _ in range(8):
            grid = torch.linspace(low, high, 33, dtype=torch.float64)
            values = self.values(grid)
            best = int((values if top else -values).argmax())
            low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 32)])
        return (low + high) / 2


def _inverse(values: Tensor, edges: Tensor, moved: Tensor) -> Tensor:
    """Where a monotone piece takes these values, between its edges linearly; its nearer end where it does not."""
    import numpy as np

    if bool(moved[0] > moved[-1]):
        edges, moved = edges.flip(0), moved.flip(0)
    return torch.from_numpy(np.interp(values.numpy(), moved.numpy(), edges.numpy()))


def _normal_masses(edges: Tensor) -> Tensor:
    """Mass of `N(0, 1)` between neighbouring edges, accurate in both tails."""
    low, high = edges[:-1], edges[1:]
    right = low > 0
    upper = torch.where(right, -low, high)
    lower = torch.where(right, -high, low)
    # erfc keeps the digits of a tail, which torch's ndtr rounds to 0 from -8.3 on.
    mass: Tensor = (torch.erfc(-upper / math.sqrt(2)) - torch.erfc(-lower / math.sqrt(2))) / 2
    return mass
