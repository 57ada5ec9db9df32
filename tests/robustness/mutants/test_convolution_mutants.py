"""Small errors in `hnkit/convolution.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math

import pytest
import torch

import hnkit.linalg.convolution
from hnkit.linalg.convolution import _grid, convolution_norm_bound, spectral_norm_bound

EPS = torch.finfo(torch.float64).eps


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 200), (200, 5), (40, 40)])
def test_the_margin_of_a_matrix_grows_with_its_longer_side(shape):
    """`1 + 32 max(m, n) eps`, seen at a matrix of one entry, whose singular value 3 has no rounding."""
    A = torch.zeros(shape, dtype=torch.float64)
    A[1, 2] = 3.0
    assert (spectral_norm_bound(A) / 3 - 1) / EPS == pytest.approx(32 * max(shape), rel=0.01)


def test_the_margin_of_a_convolution_grows_with_its_taps():
    """`1e-11` of the norm, and `64 eps` for each tap times the tap norms of the largest group.

    One tap `diag(2, 1)` in the first group: the symbol is that matrix at every frequency, but for a phase, and the sum
    of the norms of the taps is `sqrt 5`. Nine small taps in the second group.
    """
    weight = torch.full((4, 2, 3, 3), 0.05, dtype=torch.float64)
    weight[:2] = 0
    weight[0, 0, 0, 0], weight[1, 1, 0, 0] = 2.0, 1.0
    bound = convolution_norm_bound(weight, (1, 1), (1, 1), groups=2)
    rounding = bound * math.cos(math.pi / 32) - 2 * (1 + 1e-11)  # 1/sqrt(cos(pi/32)) for each of two axes
    assert rounding / EPS == pytest.approx(64 * 9 * math.sqrt(5), rel=0.01)


def test_no_graph_is_recorded_of_a_bound():
    def refuse(tensor):
        raise AssertionError("a tensor is kept for a backward pass")

    parameter = torch.nn.Parameter(torch.ones(2, 2, 3, 3))
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        assert convolution_norm_bound(parameter, (1, 1), (1, 1)) >= 18
        assert spectral_norm_bound(torch.nn.Parameter(torch.ones(2, 2))) >= 2


@pytest.mark.parametrize(("stride", "dilation"), [((1,), (1, 1)), ((1, 1), (1,)), ((1, 1, 1), (1, 1))])
def test_every_axis_needs_a_stride_and_a_dilation(stride, dilation):
    with pytest.raises(ValueError, match="zip"):
        convolution_norm_bound(torch.ones(1, 1, 2, 2), stride, dilation)


@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.0, 0.0, -1.0], [0.5, 2.0, 0.5, 0.1]])
def test_filters_that_are_largest_at_frequency_zero_one_half_and_one_quarter(weight):
    """Their norms are `|sum_k w_k i^(mk)|` at the largest of these frequencies, m / 4."""
    largest = max(abs(sum(w * 1j ** (m * k) for k, w in enumerate(weight))) for m in range(4))
    bound = convolution_norm_bound(f64([weight]), (1,), (1,))
    assert largest <= bound <= 1.0025 * largest


@pytest.mark.parametrize(
    ("degrees", "work", "points"),
    [
        ([2, 2], 1e5, [64, 64]),  # 3.1e6 operations a point, 1.3e10 in all
        ([2, 2], 2e5, [32, 32]),  # 2.5e10 at 32 points a degree, 6.2e9 at 16
        ([2, 2], 1e6, [16, 16]),  # 3.1e10 at 16, 7.7e9 at 8
        ([2, 2], 1e7, [8, 8]),  # too much at 8: 4 points a degree it is, whatever they cost
        ([2, 3, 1], 1e12, [8, 12, 4]),
        ([20, 20], 1, [320, 320]),  # tiny problems cost 1e5 each: 4.1e10 at 32, 1.0e10 at 16
        ([0, 2], 1, [1, 64]),  # one tap along an axis: its symbol is constant there
        ([0, 2], 1e12, [1, 8]),
    ],
)
def test_the_grid_gets_coarser_where_it_would_cost_more_than_2e10_operations(degrees, work, points):
    assert _grid(degrees, work) == points


@pytest.mark.parametrize(("out", "inner"), [(4, 2), (2, 4)])
@pytest.mark.parametrize(("chunk", "held"), [(1, 1), (150, 6), (10**6, 33)])
def test_the_frequencies_of_half_the_circle_are_taken_in_chunks(monkeypatch, out, inner, chunk, held):
    """Three groups of `out x inner` channels, 3 taps: 64 points, of which 33 are not conjugates of others.

    A chunk of 150 entries has room for 6 symbols of 24. The eigenvalue problems are those of the smaller side.
    """
    symbols, sides, work = [], [], []
    einsum, eigvalsh, grid = torch.einsum, torch.linalg.eigvalsh, hnkit.linalg.convolution._grid

    def watched_einsum(*arguments):
        result = einsum(*arguments)
        symbols.append(result.numel() // 24)
        return result

    def watched_eigvalsh(matrix):
        sides.append(matrix.shape[-1])
        return eigvalsh(matrix)

    def watched_grid(degrees, operations):
        work.append(operations)
        return grid(degrees, operations)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * out, inner, 3, dtype=torch.float64, generator=generator)
    expected = convolution_norm_bound(weight, (1,), (1,), groups=3)
    monkeypatch.setattr(torch, "einsum", watched_einsum)
    monkeypatch.setattr(torch.linalg, "eigvalsh", watched_eigvalsh)
    monkeypatch.setattr(hnkit.linalg.convolution, "_grid", watched_grid)
    monkeypatch.setattr(hnkit.linalg.convolution, "_CHUNK", chunk)
    assert convolution_norm_bound(weight, (1,), (1,), groups=3) == pytest.approx(expected, rel=1e-14)
    assert max(symbols) == held
    assert sum(symbols) == 33
    assert set(sides) == {2}
    assert work == [3 * out * inner * 2]  # a Gram matrix of side 2 for each group
