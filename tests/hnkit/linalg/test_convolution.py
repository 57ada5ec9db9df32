"""Norm bounds of matrices and convolutions: outward rounding, frequencies, strides, dilations and groups."""

from __future__ import annotations

import pytest
import torch

import hnkit.linalg.convolution
from hnkit.linalg.convolution import _grid, convolution_norm_bound, spectral_norm_bound
from tests.hnkit.functions import f64

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("shape", [(5, 200), (200, 5), (40, 40)])
def test_the_margin_of_a_matrix_grows_with_its_longer_side(shape):
    """Seen at a matrix of one entry, whose singular value 3 has no rounding."""
    A = torch.zeros(shape, dtype=torch.float64)
    A[1, 2] = 3.0
    assert (spectral_norm_bound(A) / 3 - 1) / EPS == pytest.approx(8 * max(shape), rel=0.01)


@pytest.mark.parametrize("scale", [1.0, 1e-170, 1e150])
@pytest.mark.parametrize(("out", "inner"), [(1, 1), (2, 3), (40, 40), (5, 300)])
def test_the_margin_of_a_convolution_covers_rounding_at_its_own_scale(out, inner, scale):
    """One tap is a matrix at every frequency, so that nothing but rounding is between the bound and its norm."""
    W = torch.randn(out, inner, dtype=torch.float64, generator=torch.Generator().manual_seed(out))
    norm = float(torch.linalg.svdvals(W)[0])
    W = scale * W[..., None]
    bound = convolution_norm_bound(torch.cat([W, 0.01 * W]), (1,), (1,), groups=2) / scale
    assert (
        2 * EPS * (out + inner) < bound / norm - 1 < 64 * (out + inner) * min(out, inner) * EPS + 128 * EPS * (1 + out)
    )


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
