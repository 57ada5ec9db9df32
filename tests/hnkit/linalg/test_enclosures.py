"""Ball arithmetic against mpmath, attained bounds, and violations by one unit in the last place."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from hnkit import InputError
from hnkit.bounds import frobenius_bound, singular_value_bound, theorem7_bound
from hnkit.linalg.enclosures import Enclosure, certify_bounds

pytest.importorskip("flint")
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


def test_eigenvalues_closer_than_a_float_can_tell_keep_their_order():
    import flint

    from hnkit.linalg.enclosures import _eigenvalues

    with flint.ctx.workprec(256):
        exact = [flint.arb(1) + k * flint.arb(2) ** -100 for k in (2, 0, 3, 1)]
        M = flint.arb_mat(4, 4, [exact[i] if i == j else 0 for i in range(4) for j in range(4)])
        found = _eigenvalues(flint, M)
        for k, value in enumerate(found):
            assert value.contains(flint.arb(1) + k * flint.arb(2) ** -100)
            assert value.rad() < flint.arb(2) ** -200


def test_float32_entries_are_exact():
    A = torch.full((1, 1), 0.1)
    c = certify_bounds(A)
    assert c.trace.lower <= float(A) <= c.trace.upper
    assert not c.trace.lower <= 0.1 <= c.trace.upper


def test_enclosures_print_and_compare():
    c = certify_bounds(torch.full((1, 1), 0.5))
    assert str(c.error).startswith("[0.0945348918918")
    assert isinstance(c.error, Enclosure)


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
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_without_flint_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "flint", None)
    with pytest.raises(InputError, match=r"pip install 'hnkit\[certify\]'"):
        certify_bounds(torch.eye(2))
