"""Ball arithmetic against mpmath, attained bounds, and violations by one unit in the last place."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch

from hnkit import InputError
from hnkit.bounds import frobenius_bound, singular_value_bound, theorem7_bound
from hnkit.linalg import enclosures
from hnkit.linalg.enclosures import Enclosure, certify_bounds
from tests.hnkit.functions import f64

flint = pytest.importorskip("flint")
arb = flint.arb
F64 = torch.float64
mpmath.mp.dps = 60


def random_matrix(kind, d, norm, seed=0):
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(d, d, generator=g, dtype=F64)
    Q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=F64))[0]
    A = {
        "general": G,
        "symmetric": G + G.T,
        "skew": G - G.T,
        "orthogonal": Q,
        "nilpotent": G.triu(1),
        "low rank": G[:, :1] @ G[:1],
        "identity": -torch.eye(d, dtype=F64),
    }[kind]
    return A * (norm / torch.linalg.matrix_norm(A, 2))


KINDS = ["general", "symmetric", "skew", "orthogonal", "nilpotent", "low rank", "identity"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [1e-9, 0.3, 0.95])
def test_enclosures_contain_the_truth_and_are_narrow(kind, norm):
    A = random_matrix(kind, 5, norm)
    M = mpmath.matrix(A.tolist())
    trace = mpmath.fsum(M[i, i] for i in range(5))
    log_det = mpmath.log(abs(mpmath.det(mpmath.eye(5) + M)))
    sigma = sorted(mpmath.svd_r(M, compute_uv=False))[-1]
    least = min(mpmath.eigsy((M + M.T) / 2, eigvals_only=True))
    c = certify_bounds(A)
    for enclosure, truth in (
        (c.error, trace - log_det),
        (c.trace, trace),
        (c.log_abs_det, log_det),
        (c.frobenius_norm, mpmath.norm(M)),
        (c.spectral_norm, sigma),
        (c.lambda_min, least),
    ):
        assert enclosure.lower <= truth + mpmath.mpf(10) ** -45
        assert truth <= enclosure.upper + mpmath.mpf(10) ** -45
        assert enclosure.upper - enclosure.lower <= 1e-15 * max(abs(float(truth)), norm)
    assert c.ok


@pytest.mark.parametrize("kind", ["general", "symmetric", "skew", "nilpotent", "low rank"])
@pytest.mark.parametrize("norm", [1e-12, 0.5, 0.9])
def test_strict_bounds_are_proved(kind, norm):
    verdicts = {name: bound.verdict for name, bound in certify_bounds(random_matrix(kind, 4, norm)).bounds.items()}
    assert set(verdicts.values()) == {"holds"}


def test_attained_bounds_are_undecided_never_fails():
    c = certify_bounds(-0.7 * torch.eye(3, dtype=F64))
    assert {c.bounds[name].verdict for name in ("theorem 7", "frobenius", "singular values")} == {"undecided"}
    assert c.precision == 1024
    assert c.ok
    assert certify_bounds(-0.7 * torch.eye(3, dtype=F64), max_precision=256).precision == 256


def test_symmetry_makes_the_field_of_values_an_equality():
    c = certify_bounds(random_matrix("symmetric", 4, 0.5))
    for side in ("upper", "lower"):
        assert c.bounds[f"field of values, {side}"].note == "A is symmetric: equality"
    claimed = certify_bounds(
        random_matrix("symmetric", 4, 0.5), reported={"field of values, upper": 0.999 * c.error.lower}
    )
    assert claimed.bounds["field of values, upper"].verdict == "fails"
    almost = random_matrix("symmetric", 4, 0.5)
    almost[0, 1] = math.nextafter(float(almost[0, 1]), 1)
    assert {bound.verdict for bound in certify_bounds(almost).bounds.values()} == {"holds"}


def test_zero_is_exact():
    c = certify_bounds(torch.zeros(3, 3))
    assert (c.error.lower, c.error.upper) == (0.0, 0.0)
    assert {bound.verdict for bound in c.bounds.values()} == {"holds"}


@pytest.mark.parametrize("kind", ["general", "identity"])
@pytest.mark.parametrize("name", ["theorem 7", "frobenius", "singular values"])
def test_a_reported_bound_too_small_by_one_ulp_is_refuted(kind, name):
    """`|E|` lies strictly between two neighbouring floats: the upper one is a bound, the lower one is not."""
    A = random_matrix(kind, 4, 0.6)
    M = mpmath.matrix(A.tolist())
    error = abs(mpmath.fsum(M[i, i] for i in range(4)) - mpmath.log(abs(mpmath.det(mpmath.eye(4) + M))))
    near = float(error)
    above = near if near >= error else math.nextafter(near, math.inf)
    below = math.nextafter(above, -math.inf)
    assert below < error < above
    assert certify_bounds(A, reported={name: above}).bounds[name].verdict == "holds"
    refuted = certify_bounds(A, reported={name: below})
    assert refuted.bounds[name].verdict == "fails"
    assert not refuted.ok
    assert refuted.bounds[name].note == "against the reported float"


def test_a_claimed_constant_too_small_by_one_ulp_is_refuted():
    A = torch.diag(torch.tensor([0.3, -0.8, 0.1], dtype=F64))
    assert certify_bounds(A, lipschitz=math.nextafter(0.8, 1)).bounds["norm"].verdict == "holds"
    assert certify_bounds(A, lipschitz=math.nextafter(0.8, 0)).bounds["norm"].verdict == "fails"
    rotated = random_matrix("general", 6, 0.8)
    sigma = max(mpmath.svd_r(mpmath.matrix(rotated.tolist()), compute_uv=False))
    near = float(sigma)
    above = near if near >= sigma else math.nextafter(near, math.inf)
    assert certify_bounds(rotated, lipschitz=above).bounds["norm"].verdict == "holds"
    assert certify_bounds(rotated, lipschitz=math.nextafter(above, 0)).bounds["norm"].verdict == "fails"


def test_the_floats_of_hnkit_bounds_are_proved_for_a_generic_matrix():
    A = random_matrix("general", 12, 0.9, seed=2)
    L = math.nextafter(certify_bounds(A).spectral_norm.upper, 1)
    c = certify_bounds(
        A,
        lipschitz=L,
        reported={
            "theorem 7": theorem7_bound(12, L),
            "frobenius": frobenius_bound(float(torch.linalg.matrix_norm(A)), L),
            "singular values": float(singular_value_bound(A)),
        },
    )
    assert all(bound.verdict == "holds" for bound in c.bounds.values())


def test_hypotheses_that_are_not_met_are_named():
    c = certify_bounds(torch.tensor([[0.0, 3.0], [-3.0, 0.0]]))
    assert c.bounds["theorem 7"].verdict == "not applicable"
    assert c.bounds["theorem 7"].note == "needs the spectral norm below 1"
    assert c.bounds["field of values, lower"].verdict == "holds"
    assert c.bounds["field of values, upper"].verdict == "holds"
    folded = certify_bounds(-3 * torch.eye(2))
    assert folded.bounds["field of values, upper"].verdict == "not applicable"
    assert folded.error.lower <= -6 - 2 * math.log(2) <= folded.error.upper
    singular = certify_bounds(-torch.eye(2))
    assert (singular.error.lower, singular.error.upper) == (-math.inf, math.inf)
    assert singular.ok
    claimed = certify_bounds(0.5 * torch.eye(2), lipschitz=1.5)
    assert claimed.bounds["theorem 7"].verdict == "not applicable"
    assert claimed.bounds["norm"].verdict == "holds"


def test_tiny_matrices_raise_the_precision_by_themselves():
    A = random_matrix("general", 3, 1e-40)
    c = certify_bounds(A)
    assert c.precision > 128
    assert all(bound.verdict == "holds" for bound in c.bounds.values())
    assert 0 < abs(c.error.upper) < 1e-79


def test_an_enclosure_that_reaches_both_sides_of_zero_is_no_point():
    """lambda_min of `[[1/2, b], [b, 1/2]]` is `2^-54` for `b = 1/2 - 2^-54`, which 40 bits cannot tell from 0."""
    b = 0.5 - 2.0**-54
    c = certify_bounds(torch.tensor([[0.5, b], [b, 0.5]], dtype=F64), max_precision=40)
    assert c.lambda_min.lower < 0 < 2.0**-54 < c.lambda_min.upper


@pytest.mark.parametrize("norm", [1e-300, 1e-160, 1e-80, 1e80, 1e155, 1e300])
@pytest.mark.parametrize("kind", ["general", "low rank"])
def test_no_size_of_the_entries_is_too_small_or_too_large(kind, norm):
    """Squares of squares of these norms overflow or vanish in double precision."""
    one, c = (certify_bounds(random_matrix(kind, 3, size), max_precision=128) for size in (1.0, norm))
    M = mpmath.matrix(random_matrix(kind, 3, norm).tolist())
    truths = max(mpmath.svd_r(M / norm, compute_uv=False)), min(mpmath.eigsy((M + M.T) / (2 * norm), eigvals_only=True))
    for found, usual, truth in zip(
        (c.spectral_norm, c.lambda_min), (one.spectral_norm, one.lambda_min), truths, strict=True
    ):
        assert found.lower <= truth * norm <= found.upper
        assert found.upper - found.lower <= 1e-15 * norm
        assert float(found.ball.rad()) <= 16 * norm * float(usual.ball.rad())


def test_clusters_and_moderate_size():
    d = 40
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=g, dtype=F64))[0] for _ in range(2))
    A = U @ torch.diag(torch.tensor([0.9] * 10 + [0.5] * 30, dtype=F64)) @ V
    c = certify_bounds(A, max_precision=128)
    assert c.spectral_norm.upper - c.spectral_norm.lower < 1e-13
    assert c.spectral_norm.lower <= 0.9 + 1e-14
    assert c.spectral_norm.upper >= 0.9 - 1e-14
    assert c.bounds["theorem 7"].verdict == "holds"


def test_float32_entries_are_exact():
    A = torch.full((1, 1), 0.1)
    c = certify_bounds(A)
    assert c.trace.lower <= float(A) <= c.trace.upper
    assert not c.trace.lower <= 0.1 <= c.trace.upper


def test_enclosures_print_and_compare():
    c = certify_bounds(torch.full((1, 1), 0.5))
    assert str(c.error).startswith("[0.0945348918918")
    assert isinstance(c.error, Enclosure)


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
    assert enclosures._checked(torch.zeros(256, 256)).shape == (256, 256)


def test_an_enclosure_prints_twenty_digits():
    with flint.ctx.workprec(128):
        assert str(Enclosure.of(arb(1) / 3)).startswith("[0.33333333333333333333 +/-")


# --- the function h(s)/s^2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [128, 4096])
@pytest.mark.parametrize("s", [0.0, 2.0**-500, 2.0**-60, 2.0**-31, 2.0**-21, 2.0**-20, 3 * 2.0**-21, 1e-3, 0.25, 0.999])
def test_the_ratio_is_enclosed_and_keeps_all_but_24_bits(s, bits):
    """From s = 2^-20 down a series is summed: what is left of it, s^62 / 64 at most, is all that is lost."""
    with flint.ctx.workprec(bits), mpmath.workprec(2 * bits + 1100):
        found, x = enclosures._ratio(arb, arb(s)), mpmath.mpf(s)
        truth = (-mpmath.log(1 - x) - x) / x**2 if s else mpmath.mpf(1) / 2
        low, high = (mpmath.mpf(end.mid().str(2000, radius=False)) for end in (found.lower(), found.upper()))
        narrow = mpmath.mpf(2) ** (24 - bits) + (x**62 / 64 * (1 + 2 * x + 1e-6) if s <= 2.0**-20 else 0)
        assert low - mpmath.mpf(10) ** -1900 <= truth <= high + mpmath.mpf(10) ** -1900
        assert high - low <= narrow


@pytest.mark.parametrize("top", [0.5, 0.9])
def test_the_ratio_of_a_ball_down_to_zero_contains_that_of_every_member(top):
    found = enclosures._ratio(arb, arb(top / 2, top / 2))
    for s in (1e-9, top / 2, top):
        assert found.lower() <= (-math.log1p(-s) - s) / s**2 - 1e-7 * (s < 1e-6) + 1e-12
        assert found.upper() >= (-math.log1p(-s) - s) / s**2 - 1e-7 * (s < 1e-6) - 1e-12


@pytest.mark.parametrize("ball", [arb(0), arb(1e-6), arb(0, 1e-6), arb(-1e-7, 1e-6), arb(1e-7, 1e-6), arb(4)])
def test_the_root_of_a_ball_contains_the_root_of_every_member_that_is_not_negative(ball):
    root, least, most = enclosures._root(arb, ball), max(0.0, float(ball.lower())), float(ball.upper())
    assert float(root.lower()) == pytest.approx(math.sqrt(least), abs=1e-9)
    assert float(root.upper()) == pytest.approx(math.sqrt(most), abs=1e-9)


# --- eigenvalues ------------------------------------------------------------------------------------------------------


def ball_matrix(rows):
    return flint.arb_mat([[arb(entry) for entry in row] for row in rows])


@pytest.mark.parametrize(
    ("rows", "truths"),
    [
        ([[3.0]], [3.0]),
        ([[-2.0]], [-2.0]),
        ([[1.0, 0.125], [0.125, 2.0]], [1.5 - math.hypot(0.5, 0.125), 1.5 + math.hypot(0.5, 0.125)]),
        ([[1.0, 0.75], [0.75, 1.0]], [0.25, 1.75]),
        ([[2.0, 0.0], [0.0, 1.0]], [1.0, 2.0]),
    ],
)
def test_eigenvalues_are_enclosed_in_ascending_order(rows, truths):
    for found, truth in zip(enclosures._eigenvalues(flint, ball_matrix(rows)), truths, strict=True):
        assert found.lower() - 1e-12 <= truth <= found.upper() + 1e-12
        assert found.rad() < 1e-13


@pytest.mark.parametrize("radius", [2.0**-40, 2.0**-20, 2.0**-6, 0.25])
@pytest.mark.parametrize("seed", range(5))
def test_eigenvalues_of_every_member_of_a_matrix_of_balls(radius, seed):
    """Enclosures that are given hold for members at the ends of the balls; wide balls may leave them unknown."""
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(4, 4, generator=g, dtype=F64)
    middle = middle + middle.T
    found = enclosures._eigenvalues(
        flint, flint.arb_mat([[arb(entry, radius) for entry in row] for row in middle.tolist()])
    )
    if radius < 1e-3:
        assert all(ball.is_finite() for ball in found)
    for _ in range(20):
        signs = torch.randint(-1, 2, (4, 4), generator=g).double().triu()
        member = middle + radius * (signs + signs.triu(1).T)
        for ball, truth in zip(found, torch.linalg.eigvalsh(member).tolist(), strict=True):
            assert not ball.is_finite() or ball.lower() - 1e-12 <= truth <= ball.upper() + 1e-12


@pytest.mark.parametrize("bits", [53, 128, 512])
@pytest.mark.parametrize("gap", [0.0, 2.0**-100, 2.0**-60, 2.0**-40, 2.0**-20, 0.1])
def test_enclosures_of_eigenvalues_overlap_only_where_they_are_identical(bits, gap):
    """And hold as many eigenvalues as they come in copies: clusters of 1, 2, 3 and 6 at distances that few bits tell.

    The matrix `H D H` with the rational Householder matrix H of dimension 16 is exact in binary for the larger gaps,
    so that Arb's own eigenvectors of its multiple eigenvalues are useless.
    """
    with flint.ctx.workprec(bits):
        values = [arb(1) + k * arb(gap) for k in range(6)] + [arb(2)] * 3 + [arb(-1), arb(-1) + arb(gap)]
        values += [arb(k) for k in range(4, 9)]
        H = flint.arb_mat(householder(16))
        D = flint.arb_mat([[values[i] if i == j else 0 for j in range(16)] for i in range(16)])
        found = enclosures._eigenvalues(flint, H * D * H)
        finite = [ball.is_finite() for ball in found]
        assert all(finite) or (not any(finite) and 0 < gap < 0.1)
        for ball, truth in zip(found, sorted(values, key=lambda value: value.mid()), strict=True):
            assert not ball.is_finite() or ball.overlaps(truth)
        assert not all(finite) or max(float(ball.rad()) for ball in found) < 1e-9
        for one, other in itertools.combinations(found, 2):
            assert not all(finite) or not one.overlaps(other) or one.mid() == other.mid()


@pytest.mark.parametrize(
    ("values", "most"), [([-0.75] * 8 + [0.5] * 8, 0.75), ([-0.25] * 2 + [-0.5] * 14, 0.5), ([0.0] * 15 + [0.5], 0.5)]
)
def test_exact_multiple_eigenvalues_decide_bounds(values, most):
    """`H diag(values) H`, exact in float64."""
    H = torch.eye(16, dtype=F64) - 2 / 16
    A = H @ torch.diag(torch.tensor(values, dtype=F64)) @ H
    c = certify_bounds(A, max_precision=256)
    assert c.spectral_norm.lower <= most <= c.spectral_norm.upper
    assert c.spectral_norm.upper - c.spectral_norm.lower < 1e-15
    assert c.bounds["theorem 7"].verdict == "holds"
    assert c.lambda_min.lower <= min(values) <= c.lambda_min.upper


def test_eigenvalues_that_arb_does_not_tell_apart_are_unknown(monkeypatch):
    """No enclosure is picked from among some that overlap in part, nor where Arb gives up."""

    class Answer:
        def __init__(self, *balls):
            self.balls = balls

        def eig(self, *, multiple):
            assert multiple
            if not self.balls:
                raise ValueError("failed to isolate eigenvalues")
            return [flint.acb(ball) for ball in self.balls]

    def eigenvalues(*balls):
        monkeypatch.setattr(flint, "acb_mat", lambda M: Answer(*balls))
        return enclosures._eigenvalues(flint, ball_matrix([[1.0, 0.0], [0.0, 1.0]]))

    assert [float(ball.mid()) for ball in eigenvalues(arb(2, 0.5), arb(1, 0.25))] == [1.0, 2.0]
    assert all(ball.is_finite() for ball in eigenvalues(arb(1, 0.5), arb(1, 0.5)))
    for balls in ((), (arb(1, 0.5), arb(1.25, 0.5)), (arb(1, 0.5), arb(1, 0.25)), (arb(1), arb("nan"))):
        assert not any(ball.is_finite() for ball in eigenvalues(*balls))


def test_unknown_eigenvalues_leave_what_needs_them_undecided(monkeypatch):
    monkeypatch.setattr(enclosures, "_eigenvalues", lambda flint, M: [flint.arb("nan")] * M.nrows())
    c = certify_bounds(random_matrix("general", 3, 0.5), max_precision=128)
    assert (c.spectral_norm.lower, c.spectral_norm.upper) == (-math.inf, math.inf)
    assert {bound.verdict for bound in c.bounds.values()} == {"undecided"}
    assert math.isfinite(c.error.upper)


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
        found = enclosures._eigenvalues(flint, H * D * H)
        for ball, truth in zip(found, sorted(values, key=lambda value: value.mid()), strict=True):
            assert ball.contains(truth)
            assert ball.rad() < arb(2) ** (-gap - 6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_cluster_with_equal_diagonal_is_turned(sign):
    """`[[1, e], [e, 1]]` has eigenvalues 1 - e and 1 + e, and double precision sees the identity."""
    with flint.ctx.workprec(256):
        e = sign * arb(2) ** -100
        found = enclosures._eigenvalues(flint, flint.arb_mat([[1, e], [e, 1]]))
        for ball, truth in zip(found, (1 - abs(e), 1 + abs(e)), strict=True):
            assert ball.contains(truth)
            assert ball.rad() < arb(2) ** -140


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certify_bounds(torch.ones(2, 3)), r"shape \(2, 3\)"),
        (lambda: certify_bounds(torch.ones(257, 257)), r"1 <= d <= 256"),
        (lambda: certify_bounds(torch.full((2, 2), math.nan)), "not finite"),
        (lambda: certify_bounds(torch.eye(2, dtype=torch.int64)), "int64"),
        (lambda: certify_bounds([[0.1]]), "list"),
        (lambda: certify_bounds(torch.eye(2), reported={"weyl": 1.0}), "unknown bound 'weyl': accepted are theorem 7"),
        (lambda: certify_bounds(torch.eye(2), reported={"frobenius": math.inf}), "frobenius = inf"),
        (lambda: certify_bounds(torch.eye(2), lipschitz=math.nan), "lipschitz = nan"),
        (lambda: certify_bounds(torch.eye(2), lipschitz="a"), "lipschitz = 'a' is no real number"),
        (lambda: certify_bounds(torch.eye(2), reported={"frobenius": None}), "frobenius = None is no real number"),
        (lambda: certify_bounds(torch.eye(2, device="meta")), "meta"),
        (lambda: certify_bounds(torch.eye(2).to_sparse()), "sparse"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_without_flint_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "flint", None)
    with pytest.raises(InputError, match=r"pip install 'hnkit\[certify\]'"):
        certify_bounds(torch.eye(2))
