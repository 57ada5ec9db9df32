"""Rules of single layers: constants in closed form, outward rounding, what they say, and gradient maps."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from hnkit import InputError
from hnkit.lipschitz.certify import JacobianBounds, Scaled, Sum, certified_bounds, certify_injective, times
from tests.hnkit.functions import f64

F64 = torch.float64
EPS = torch.finfo(F64).eps


def layer(*rows):
    W = f64(*rows)
    module = nn.Linear(W.shape[1], W.shape[0], bias=False).double()
    with torch.no_grad():
        module.weight.copy_(W)
    return module


def gradient_map(W, activation, sign=1.0):
    """`+-W' s(W x)`."""
    return nn.Sequential(layer(*W), activation, layer(*(sign * f64(*W).T).tolist()))


def prelu(*slopes):
    module = nn.PReLU(len(slopes))
    with torch.no_grad():
        module.weight.copy_(torch.tensor(slopes))
    return module


def ones(module):
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    return module


def impulse(kernel, **settings):
    """A convolution whose kernel is one tap 1, so that its norm is that of its padding."""
    module = nn.Conv1d(1, 1, kernel, bias=False, **settings).double()
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0, 0, 0] = 1.0
    return module


# --- arithmetic and text ----------------------------------------------------------------------------------------------

FACTORS = [0.0, 1.0, 0.1, 0.3, 2.0, 3.0, 7.3, 1e-200]


@pytest.mark.parametrize(("a", "b"), list(itertools.product(FACTORS, FACTORS)))
@pytest.mark.parametrize("toward", [math.inf, -math.inf])
def test_a_product_of_bounds_is_rounded_outward_and_exact_for_factors_0_and_1(a, b, toward):
    exact, found = Fraction(a) * Fraction(b), times(a, b, toward)
    if {a, b} & {0.0, 1.0}:
        assert Fraction(found) == exact
    else:
        assert (found > exact) if toward > 0 else (found < exact)
        assert found == pytest.approx(a * b, rel=4 * EPS, abs=1e-320)


@pytest.mark.parametrize("c", [0.1, 0.3, 0.7, -0.1, -0.3, -0.7, 5.1, 0.0, 1.0])
def test_a_scaled_map_has_its_range_scaled_and_rounded_outward(c):
    bounds, exact = certified_bounds(Scaled(nn.SiLU(), c)), Fraction(c)
    ends = sorted((exact * Fraction(-0.09983932013), exact * Fraction(1.09983932013)))
    assert Fraction(bounds.lower) <= ends[0]
    assert Fraction(bounds.upper) >= ends[1]
    assert Fraction(bounds.norm) >= abs(exact) * Fraction(1.09983932013)
    assert (bounds.lower, bounds.upper) == pytest.approx((float(ends[0]), float(ends[1])), rel=4 * EPS, abs=0)
    assert bounds.norm == pytest.approx(abs(c) * 1.09983932013, rel=4 * EPS, abs=0)


def test_a_range_that_vanishes_in_floating_point_keeps_its_signs():
    bounds = certified_bounds(gradient_map([[1e-170]], nn.SiLU()))
    assert bounds.lower < 0 < bounds.upper


def test_a_sum_of_modules_is_the_sum_of_all_its_terms():
    x = f64([0.5, -2.0])
    total = Sum(nn.Identity(), Scaled(nn.ReLU(), 10.0), layer([3.0, 0.0], [0.0, 100.0]))
    assert total(x).tolist() == [[0.5 + 5.0 + 1.5, -2.0 + 0.0 - 200.0]]


@pytest.mark.parametrize(
    ("module", "how"),
    [
        (nn.ReLU(), "ReLU 1"),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), "ReLU '0' 1 x Tanh '1' 1"),
        (Sum(nn.Identity(), nn.Sigmoid()), "(Identity 'terms.0' 1 + Sigmoid 'terms.1' 0.25)"),
        (Scaled(nn.Tanh(), 0.5), "0.5 * Tanh 'module' 1"),
        (
            gradient_map([[2.0]], nn.Tanh()),
            "Linear '0' 2.001 x Tanh '1' 1 x Linear '2' 2.001 (W' s(W x + b): symmetric Jacobian)",  # rounded up
        ),
    ],
    ids=str,
)
def test_bounds_say_once_which_layers_they_come_from(module, how):
    assert certified_bounds(module).how == how


def test_a_map_may_declare_the_constant_0():
    class Constant:
        def lipschitz_upper(self):
            return 0

    assert certified_bounds(Constant()).norm == 0


@pytest.mark.parametrize("kind", [nn.Linear, lambda a, b: nn.Conv1d(a, b, 1), lambda a, _: nn.PReLU(a)])
def test_one_weight_that_is_not_finite_is_enough(kind):
    module = kind(3, 3)
    with torch.no_grad():
        module.weight.view(-1)[1] = math.nan
    with pytest.raises(InputError, match="not real and finite"):
        certified_bounds(module)


@pytest.mark.parametrize(
    "module", [nn.CELU(0.0), nn.CELU(-1.0), nn.Softplus(beta=0.0), nn.Softplus(threshold=19), nn.Softplus()]
)
def test_activations_that_jump_or_have_no_constant_are_refused(module):
    with pytest.raises(InputError, match="use "):
        certified_bounds(module)


# --- stated constants -------------------------------------------------------------------------------------------------

ROOT3, ROOT8 = math.sqrt(3), math.sqrt(8)
STATED = {
    "a product of norms": (nn.Sequential(layer([2.0]), nn.ReLU(), layer([0.0]), nn.Tanh()), 0, 0, 0),
    "two scalings": (nn.Sequential(layer([0.0, 2.0], [2.0, 0.0]), layer([3.0, 0.0], [0.0, 1.0])), 6, -6, 6),
    "linear and tanh": (nn.Sequential(layer([2.0]), nn.Tanh()), 2, -2, 2),
    "softmax": (nn.Softmax(dim=1), 0.5, 0, 0.5),
    "softmin": (nn.Softmin(dim=1), 0.5, -0.5, 0),
    "prelu with slopes on both sides of 1": (prelu(0.5, 3.0, -2.0), 3, -2, 3),
    "prelu above 1": (prelu(3.0, 4.0), 4, 1, 4),
    "prelu below 1": (prelu(0.25, 0.5), 1, 0.25, 1),
    "average pool in space": (nn.AvgPool3d(2), 1 / ROOT8, -1 / ROOT8, 1 / ROOT8),
    "max pool in the plane": (nn.MaxPool2d(3, stride=2), 2, -2, 2),
    "max pool in space": (nn.MaxPool3d(2, stride=1), ROOT8, -ROOT8, ROOT8),
    "average pool on a line, ragged": (nn.AvgPool1d(3, stride=2, ceil_mode=True), 2**0.5, -(2**0.5), 2**0.5),
    "average pool, padded on one axis": (nn.AvgPool2d(3, 1, (1, 0), count_include_pad=False), 3, -3, 3),
    "upsample in the plane": (nn.UpsamplingNearest2d(scale_factor=4), 4, -4, 4),
    "upsample at most in space": (nn.Upsample(scale_factor=2), ROOT8, -ROOT8, ROOT8),
    "upsample by 1": (nn.Upsample(scale_factor=1), 1, -1, 1),
    "upsample by 1 and 2": (nn.Upsample(scale_factor=(1, 2)), 2**0.5, -(2**0.5), 2**0.5),
    "circular padding of a plane": (ones(nn.Conv2d(1, 1, 1, padding=1, padding_mode="circular")), 3, -3, 3),
    "replicating one axis": (ones(nn.Conv2d(1, 1, 1, padding=(0, 1), padding_mode="replicate")), ROOT3, -ROOT3, ROOT3),
    "reflecting one axis": (ones(nn.Conv2d(1, 1, 1, padding=(2, 0), padding_mode="reflect")), ROOT3, -ROOT3, ROOT3),
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_constants_known_in_closed_form(name):
    module, norm, lower, upper = STATED[name]
    bounds = certified_bounds(module)
    assert (bounds.norm, bounds.lower, bounds.upper) == pytest.approx((norm, lower, upper), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    ("module", "copies"),
    [
        (impulse(1, padding="same", padding_mode="replicate"), 1),
        (impulse(3, padding="same", padding_mode="replicate"), 3),
        (impulse(4, padding="same", padding_mode="replicate"), 5),
        (impulse(7, padding="same", padding_mode="replicate"), 7),
        (impulse(3, dilation=2, padding="same", padding_mode="replicate"), 5),
        (impulse(3, padding="valid", padding_mode="replicate"), 1),
        (impulse(3, padding=1, padding_mode="circular"), 1),
        (impulse(3, padding=2, padding_mode="circular"), 3),
        (impulse(3, padding="same", padding_mode="circular"), 1),
        (impulse(2, padding="valid", padding_mode="circular"), 1),
    ],
    ids=str,
)
def test_padding_multiplies_by_the_root_of_its_copies(module, copies):
    """Replicating p times repeats the edge of a row of one entry 2p + 1 times; circular padding repeats three times."""
    assert certified_bounds(module).norm == pytest.approx(copies**0.5, rel=0.01)


def dense(module, *shape):
    x = torch.zeros(shape, dtype=F64)
    return torch.autograd.functional.jacobian(lambda z: module(z[None]).flatten(), x).flatten(1)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.AvgPool2d((3, 1), stride=1, padding=(1, 0), count_include_pad=False), (1, 3, 1)),
        (impulse(3, padding=2, padding_mode="circular"), (1, 2)),
        (ones(nn.Conv2d(1, 1, 1, padding=1, padding_mode="circular").double()), (1, 1, 1)),
    ],
    ids=str,
)
def test_layers_whose_norm_exceeds_the_naive_one_stay_below_their_bound(module, shape):
    """Windows that leave the padding out, entries padded more than once."""
    assert 1 < float(torch.linalg.matrix_norm(dense(module, *shape), 2)) <= certified_bounds(module).norm


@pytest.mark.parametrize("k", [47, 55, 83])
def test_an_entry_is_copied_once_more_where_single_precision_moves_a_coordinate(k):
    """Scaled by a little less than k, an entry is copied k + 1 times; along one axis that is the norm squared."""
    module = nn.Upsample(scale_factor=(k - 1e-7,))
    copies = int(torch.bincount(module(torch.arange(6.0)[None, None]).long().flatten()).max())
    assert copies == k + 1
    assert certified_bounds(module).norm >= math.sqrt(copies)


# --- linear layers and gradient maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2.0**-30, 1.0, 2.0**30])
@pytest.mark.parametrize("d", [2, 100])
def test_the_margin_of_a_linear_layer_covers_rounding_at_its_own_scale(size, d):
    """The symmetric part of a skew matrix is 0; LAPACK is off by d eps |A| at most."""
    K = torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(0))
    K = size * (K - K.T)
    bounds, norm = certified_bounds(layer(*K.tolist())), float(torch.linalg.matrix_norm(K, 2))
    assert -64 * d * EPS * norm < bounds.lower <= -d * EPS * norm
    assert 64 * d * EPS * norm > bounds.upper >= d * EPS * norm


W = [[2.0, 0.0], [0.0, 0.1], [0.0, 0.0]]  # W'W = diag(4, 0.01)


@pytest.mark.parametrize(
    ("activation", "least", "most"),
    [
        (nn.Tanh(), 0.0, 1.0),
        (nn.Sigmoid(), 0.0, 0.25),
        (nn.LeakyReLU(0.2), 0.0, 1.0),
        (nn.LeakyReLU(3.0), 0.0, 3.0),
        (nn.LeakyReLU(-0.5), -0.5, 1.0),
        (Scaled(nn.LeakyReLU(0.2), -1.0), -1.0, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_range_of_a_gradient_map_with_any_number_of_hidden_entries(activation, least, most, sign):
    """`W' D W` with slopes in D lies between `|W|^2` times the least of them and 0, and the largest and 0."""
    bounds = certified_bounds(gradient_map(W, activation, sign))
    lower, upper = sorted((4 * sign * least, 4 * sign * most))
    assert (bounds.lower, bounds.upper) == pytest.approx((lower, upper), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    "between",
    [nn.Dropout().eval(), nn.Sequential(), nn.Flatten(), nn.Sequential(nn.Identity(), nn.Dropout().eval())],
    ids=str,
)
def test_layers_that_only_regroup_do_not_hide_a_gradient_map(between):
    plain = gradient_map(W, nn.Tanh())
    assert certified_bounds(nn.Sequential(plain[0], between, plain[1], between, plain[2])).lower == 0


def test_four_layers_are_no_gradient_map():
    """`-W' tanh(W x)` folds for W = 2."""
    folding = nn.Sequential(layer([2.0]), nn.Tanh(), layer([2.0]), layer([-1.0]))
    assert certify_injective(folding).status == "unknown"
    assert certified_bounds(folding).lower == pytest.approx(-4)


def test_the_middle_of_a_gradient_map_acts_entry_by_entry():
    turned = nn.Sequential(
        layer(*W), layer([0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]), layer(*f64(*W).T.tolist())
    )
    bounds = certified_bounds(turned)
    assert "symmetric Jacobian" not in bounds.how
    assert bounds.lower == -bounds.norm


def test_slopes_of_either_sign_give_the_norm():
    assert JacobianBounds.from_slopes(-3.0, 2.0).norm == 3
    assert JacobianBounds.from_slopes(-3.0, -2.0).norm == 3
    assert JacobianBounds.from_slopes(-1.0, 2.0).norm == 2
