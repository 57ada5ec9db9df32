"""Small errors in `hnkit/ball.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import hnkit.linalg.enclosures
from hnkit import InputError
from hnkit.linalg.enclosures import Enclosure, certify_bounds

flint = pytest.importorskip("flint")
arb = flint.arb


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def holds(enclosure, truth):
    """The truth is in the interval, and the interval is narrow."""
    slack = 1e-14 * abs(float(truth))
    near = enclosure.lower - slack <= truth <= enclosure.upper + slack
    return near and enclosure.upper - enclosure.lower <= slack + 1e-30 * (abs(truth) > 1e-100)


# --- the inequalities -------------------------------------------------------------------------------------------------

MATRICES = {
    "expanding": [[0.5, 0.2, 0.0], [-0.1, 0.3, 0.1], [0.0, 0.25, 0.4]],
    "contracting": [[-0.5, 0.2, 0.0], [-0.1, -0.3, 0.1], [0.0, 0.25, -0.4]],
    "turning": [[0.0, 0.6, 0.0], [-0.6, 0.0, 0.3], [0.0, -0.3, 0.0]],
    "two by two": [[0.2, 0.7], [-0.1, 0.3]],
}


def both_sides(A, lipschitz=None):
    """The six inequalities in 50 digits."""
    h = lambda s: -mpmath.log(1 - s) - s  # noqa: E731
    M = mpmath.matrix(A.tolist())
    d = M.rows
    trace = lambda X: mpmath.fsum(X[i, i] for i in range(X.rows))  # noqa: E731
    square = lambda X: mpmath.fsum(x * x for x in X)  # noqa: E731
    E = lambda X: trace(X) - mpmath.log(abs(mpmath.det(mpmath.eye(d) + X)))  # noqa: E731
    S, K = (M + M.T) / 2, (M - M.T) / 2
    sigma = list(mpmath.svd_r(M, compute_uv=False))
    L = max(sigma) if lipschitz is None else mpmath.mpf(lipschitz)
    ratio = h(L) / L**2 if L else mpmath.mpf(1) / 2
    least = min(mpmath.eigsy(S, eigvals_only=True))
    return {
        "theorem 7": (abs(E(M)), d * h(L)),
        "frobenius": (abs(E(M)), square(M) * ratio),
        "singular values": (abs(E(M)), mpmath.fsum(h(s) for s in sigma)),
        "second order": (abs(E(M) - trace(M * M) / 2), square(M) * (ratio - mpmath.mpf(1) / 2)),
        "field of values, upper": (E(M), E(S)),
        "field of values, lower": (E(S) - E(M), square(K) / (2 * (1 + least) ** 2)),
    }


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("lipschitz", [None, 0.9375, 0.0])
def test_both_sides_of_each_inequality_are_enclosed(name, lipschitz):
    """Also for a constant claimed wrongly, 0: then h(L)/L^2 is 1/2."""
    A = f64(*MATRICES[name])
    with mpmath.workdps(50):
        c = certify_bounds(A, lipschitz=lipschitz)
        for bound, (left, right) in both_sides(A, lipschitz).items():
            assert holds(c.bounds[bound].value, left), bound
            assert holds(c.bounds[bound].bound, right), bound
            assert c.bounds[bound].verdict == ("holds" if left <= right else "fails")
            assert c.bounds[bound].note == ""


@pytest.mark.parametrize("slope", [-3.0, -1.5])
def test_a_map_that_turns_space_inside_out_has_the_logarithm_of_the_absolute_determinant(slope):
    c = certify_bounds(f64([slope]))
    assert holds(c.log_abs_det, math.log(abs(1 + slope)))
    assert c.bounds["field of values, upper"].verdict == "not applicable"
    assert c.bounds["field of values, upper"].note == "needs lambda_min of the symmetric part above -1"


@pytest.mark.parametrize("claim", [None, 1.0, 0.5])
def test_a_norm_of_exactly_one_is_not_below_one(claim):
    theorem7 = certify_bounds(f64([1.0]), lipschitz=claim).bounds["theorem 7"]
    assert theorem7.verdict == "not applicable"
    assert theorem7.note.endswith("below 1")


def test_a_hypothesis_that_few_bits_cannot_decide_is_undecided_until_more_do():
    """lambda_min is -1 + 2^-54; a skew part keeps I + A far from singular."""
    b = 0.5 - 2.0**-54
    A = f64([-0.5, b + 0.25], [b - 0.25, -0.5])
    names = ["field of values, upper", "field of values, lower"]
    coarse, fine = (certify_bounds(A, max_precision=bits) for bits in (40, 128))
    assert [coarse.bounds[name].verdict for name in names] == ["undecided", "undecided"]
    assert coarse.bounds[names[0]].note == "needs lambda_min of the symmetric part above -1, which is not decided"
    assert [fine.bounds[name].verdict for name in names] == ["holds", "holds"]


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_entries_of_any_sign_and_beside_zeros_may_be_tiny_or_huge(size):
    """For size 1, A'A has trace 17 and determinant 36, and the symmetric part trace -5 and determinant 5."""
    c = certify_bounds(size * f64([-3.0, 0.0], [-2.0, -2.0]), max_precision=128)
    assert holds(c.spectral_norm, size * math.sqrt((17 + math.sqrt(17**2 - 4 * 36)) / 2))
    assert holds(c.lambda_min, size * (-2.5 - math.sqrt(1.25)))


@pytest.mark.parametrize(("most", "used"), [(20, 20), (64, 64), (128, 128), (300, 256)])
def test_the_precision_starts_at_128_bits_doubles_and_stays_within_the_most_allowed(most, used):
    """The bound is attained, so no precision decides it."""
    assert certify_bounds(-0.7 * torch.eye(2, dtype=torch.float64), max_precision=most).precision == used


def test_one_entry_that_is_not_finite_is_enough():
    with pytest.raises(InputError, match="not finite"):
        certify_bounds(f64([0.1, math.nan], [0.0, 0.2]))


def test_the_largest_dimension_is_accepted():
    assert hnkit.linalg.enclosures._checked(torch.zeros(256, 256)).shape == (256, 256)


def test_an_enclosure_prints_twenty_digits():
    with flint.ctx.workprec(128):
        assert str(Enclosure.of(arb(1) / 3)).startswith("[0.33333333333333333333 +/-")


# --- the function h(s)/s^2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [128, 4096])
@pytest.mark.parametrize("s", [0.0, 2.0**-500, 2.0**-60, 2.0**-31, 2.0**-21, 2.0**-20, 3 * 2.0**-21, 1e-3, 0.25, 0.999])
def test_the_ratio_is_enclosed_and_keeps_all_but_24_bits(s, bits):
    """From s = 2^-20 down a series is summed: what is left of it, s^62 / 64 at most, is all that is lost."""
    with flint.ctx.workprec(bits), mpmath.workprec(2 * bits + 1100):
        found, x = hnkit.linalg.enclosures._ratio(arb, arb(s)), mpmath.mpf(s)
        truth = (-mpmath.log(1 - x) - x) / x**2 if s else mpmath.mpf(1) / 2
        low, high = (mpmath.mpf(end.mid().str(2000, radius=False)) for end in (found.lower(), found.upper()))
        narrow = mpmath.mpf(2) ** (24 - bits) + (x**62 / 64 * (1 + 2 * x + 1e-6) if s <= 2.0**-20 else 0)
        assert low - mpmath.mpf(10) ** -1900 <= truth <= high + mpmath.mpf(10) ** -1900
        assert high - low <= narrow


@pytest.mark.parametrize("top", [0.5, 0.9])
def test_the_ratio_of_a_ball_down_to_zero_contains_that_of_every_member(top):
    found = hnkit.linalg.enclosures._ratio(arb, arb(top / 2, top / 2))
    for s in (1e-9, top / 2, top):
        assert found.lower() <= (-math.log1p(-s) - s) / s**2 - 1e-7 * (s < 1e-6) + 1e-12
        assert found.upper() >= (-math.log1p(-s) - s) / s**2 - 1e-7 * (s < 1e-6) - 1e-12


@pytest.mark.parametrize("ball", [arb(0), arb(1e-6), arb(0, 1e-6), arb(-1e-7, 1e-6), arb(1e-7, 1e-6), arb(4)])
def test_the_root_of_a_ball_contains_the_root_of_every_member_that_is_not_negative(ball):
    root, least, most = hnkit.linalg.enclosures._root(arb, ball), max(0.0, float(ball.lower())), float(ball.upper())
    assert float(root.lower()) == pytest.approx(math.sqrt(least), abs=1e-9)
    assert float(root.upper()) == pytest.approx(math.sqrt(most), abs=1e-9)


# --- eigenvalues ------------------------------------------------------------------------------------------------------


def ball_matrix(rows):
    return flint.arb_mat([[arb(entry) for entry in row] for row in rows])


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.0, 1.2])
@pytest.mark.parametrize(
    ("rows", "truths"),
    [
        ([[3.0]], [3.0]),
        ([[-2.0]], [-2.0]),
        ([[1.0, 0.125], [0.125, 2.0]], [1.5 - math.hypot(0.5, 0.125), 1.5 + math.hypot(0.5, 0.125)]),
        ([[1.0, 0.75], [0.75, 1.0]], [0.25, 1.75]),
    ],
)
def test_eigenvalues_are_enclosed_whatever_basis_they_are_read_from(rows, truths, scale, monkeypatch):
    """No eigenvectors at all, and columns that are too short or too long."""
    d = len(rows)
    monkeypatch.setattr(
        hnkit.linalg.enclosures,
        "_refined",
        lambda *_: ball_matrix([[scale * (i == j) for j in range(d)] for i in range(d)]),
    )
    for found, truth in zip(hnkit.linalg.enclosures._eigenvalues(flint, ball_matrix(rows)), truths, strict=True):
        assert not found.is_finite() or found.lower() - 1e-12 <= truth <= found.upper() + 1e-12


def test_a_basis_far_from_orthogonal_proves_nothing(monkeypatch):
    monkeypatch.setattr(hnkit.linalg.enclosures, "_refined", lambda *_: ball_matrix([[3.0, 0.0], [0.0, 3.0]]))
    assert not any(
        found.is_finite()
        for found in hnkit.linalg.enclosures._eigenvalues(flint, ball_matrix([[1.0, 0.0], [0.0, 2.0]]))
    )


@pytest.mark.parametrize(
    ("first", "second", "off", "member", "truths"),
    [
        ((1.0, 0.5), (1.2, 0.0), 0.0, (1.4, 1.2), (1.2, 1.4)),
        ((1.0, 0.1), (1.2, 0.0), 0.2 / math.sqrt(2), (1.1, 1.2), (1.0, 1.3)),
    ],
)
def test_eigenvalues_of_every_member_of_a_matrix_of_balls(first, second, off, member, truths, monkeypatch):
    """Entries of unlike radius: the members need not be sorted as the midpoints are."""
    assert sum(member) == pytest.approx(sum(truths))
    assert member[0] * member[1] - off**2 == pytest.approx(math.prod(truths))
    monkeypatch.setattr(hnkit.linalg.enclosures, "_refined", lambda *_: ball_matrix([[1.0, 0.0], [0.0, 1.0]]))
    M = flint.arb_mat([[arb(*first), off], [off, arb(*second)]])
    for found, truth in zip(hnkit.linalg.enclosures._eigenvalues(flint, M), truths, strict=True):
        assert found.lower() - 1e-9 <= truth <= found.upper() + 1e-9


def householder(d):
    """A symmetric orthogonal matrix of rationals, exact in binary for d = 4; all its entries differ from 0."""
    return [[arb(int(i == j)) - arb(2) / d for j in range(d)] for i in range(d)]


# Eigenvalues that double precision takes for one: sums of powers of two given by (sign, exponent), and their least gap.
CLUSTERS = {
    "four": (100, [[(1, 0), (k, -100)] for k in (2, 0, 3, 1)]),
    "two among others": (100, [[(1, 0)], [(3, 0)], [(1, 0), (1, -100)], [(5, 0)]]),
    "two rather near": (66, [[(1, 0)], [(3, 0)], [(1, 0), (1, -66)], [(5, 0)]]),
    "two pairs": (90, [[(1, 0)], [(-1, 0)], [(1, 0), (1, -90)], [(-1, 0), (-1, -80)]]),
    "one within another": (120, [[(1, 0)], [(1, 0), (1, -60)], [(1, 0), (1, -60), (1, -120)], [(2, 0)]]),
    "none": (400, [[(1, 0)], [(3, 0)], [(-2, 0)], [(5, 0)]]),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_eigenvalues_closer_than_a_float_can_tell_are_told_apart(name):
    with flint.ctx.workprec(512):
        gap, terms = CLUSTERS[name]
        values = [sum((sign * arb(2) ** power for sign, power in each), arb(0)) for each in terms]
        H = flint.arb_mat(householder(4))
        D = flint.arb_mat([[values[i] if i == j else 0 for j in range(4)] for i in range(4)])
        found = hnkit.linalg.enclosures._eigenvalues(flint, H * D * H)
        for ball, truth in zip(found, sorted(values, key=lambda value: value.mid()), strict=True):
            assert ball.contains(truth)
            assert ball.rad() < arb(2) ** (-gap - 6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_cluster_with_equal_diagonal_is_turned(sign):
    """`[[1, e], [e, 1]]` has eigenvalues 1 - e and 1 + e, and double precision sees the identity."""
    with flint.ctx.workprec(256):
        e = sign * arb(2) ** -100
        found = hnkit.linalg.enclosures._eigenvalues(flint, flint.arb_mat([[1, e], [e, 1]]))
        for ball, truth in zip(found, (1 - abs(e), 1 + abs(e)), strict=True):
            assert ball.contains(truth)
            assert ball.rad() < arb(2) ** -140


@pytest.mark.parametrize("size", [1e-40, 1e-9, 1.0, 1e40])
@pytest.mark.parametrize("rows", [[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.125], [0.125, 1.0625]], [[3.0, 1.0], [1.0, -2.0]]])
@pytest.mark.parametrize("start", [[[1.0, 0.0], [0.0, 1.0]], [[0.6, -0.8], [0.8, 0.6]]])
def test_the_refinement_finds_the_eigenvectors_from_any_basis(rows, start, size):
    """What is left off the diagonal, and of `I - Q'Q`, is rounding, whatever the size of the matrix."""
    with flint.ctx.workprec(128):
        M, Q = ball_matrix(rows) * arb(size), ball_matrix(start)
        Q = hnkit.linalg.enclosures._refined(flint, M, Q)
        N, R = Q.transpose() * M * Q, hnkit.linalg.enclosures._defect(flint, Q)
        assert abs(N[0, 1]) < arb(size) * arb(2) ** -110
        assert all(abs(R[i, j]) < arb(2) ** -110 for i in range(2) for j in range(2))
