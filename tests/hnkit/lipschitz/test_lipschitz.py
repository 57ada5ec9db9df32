"""Lipschitz figures against dense SVDs, brute-force Jacobians and constants known in closed form."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import nn

from hnkit import InputError
from hnkit.jacobian import RowJacobian
from hnkit.linalg.convolution import convolution_norm_bound, spectral_norm_bound
from hnkit.lipschitz import (
    JacobianBounds,
    certify_injective,
    leading_singular,
    lipschitz_lower,
    lipschitz_upper,
    local_lipschitz,
    local_norms,
    register,
)
from hnkit.lipschitz.certify import Scaled, Sum, certified_bounds
from tests.hnkit.functions import Once, noise, with_values

F64 = torch.float64


def linear(A):
    return lambda x: (x.flatten(1) @ A.T.to(x)).reshape(x.shape)


# --- local norms ------------------------------------------------------------------------------------------------------

D = 60
SPECTRA = {
    "gaussian": lambda: noise(D, D) / 10,
    "orthogonal": lambda: with_values([0.7] * D)[0],
    "gap": lambda: with_values([0.9] + [0.3] * (D - 1))[0],
    "twin": lambda: with_values([0.9, 0.9, *torch.linspace(0.1, 0.8, D - 2).tolist()])[0],
    "cluster": lambda: with_values([0.9 - 1e-6 * k for k in range(6)] + torch.linspace(0.1, 0.89, D - 6).tolist())[0],
    "nilpotent": lambda: torch.diag(torch.full((D - 1,), 0.8, dtype=F64), 1),
    "rank one": lambda: torch.outer(noise(D), noise(D, seed=1)) / D,
    "skew": lambda: noise(D, D) - noise(D, D).T,
    "tiny": lambda: 1e-200 * noise(D, D),
    "huge": lambda: 1e200 * noise(D, D),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_local_norm_is_the_largest_singular_value(name):
    A = SPECTRA[name]()
    x = noise(3, D, seed=5)
    expected = float(torch.linalg.svdvals(A)[0])
    assert local_lipschitz(linear(A), x).tolist() == pytest.approx([expected] * 3, rel=1e-5)
    tight = local_norms(linear(A), x, tolerance=1e-9, cycles=60)
    assert tight.value.tolist() == pytest.approx([expected] * 3, rel=1e-9)
    assert float(tight.residual.max()) <= 1e-9
    # the value never exceeds the norm, and the residual is that of the returned vectors
    assert float(tight.value.max()) <= expected * (1 + 1e-13)
    pulled = tight.left @ A
    rest = (pulled - tight.value.unsqueeze(1) * tight.right) / expected
    assert torch.linalg.vector_norm(rest, dim=1).tolist() == pytest.approx(tight.residual.tolist(), abs=1e-12)


def test_local_norm_of_zero_and_constant_maps_is_exactly_zero():
    x = noise(4, D)
    assert local_lipschitz(linear(torch.zeros(D, D)), x).tolist() == [0.0] * 4
    assert local_lipschitz(lambda x: torch.ones_like(x), x).tolist() == [0.0] * 4


@pytest.mark.parametrize("d", [1, 2, 3, 17])
def test_krylov_route_in_low_dimensions(d):
    A = noise(d, d, seed=d)
    x = noise(2, d)
    result = leading_singular(RowJacobian(linear(A), x), noise(2, d, seed=9), tolerance=1e-12)
    assert result.value.tolist() == pytest.approx([float(torch.linalg.svdvals(A)[0])] * 2, rel=1e-12)
    assert local_lipschitz(linear(A), x).tolist() == pytest.approx(result.value.tolist(), rel=1e-9)


def test_rows_have_their_own_jacobians():
    net = nn.Sequential(nn.Linear(30, 64), nn.Tanh(), nn.Linear(64, 30)).double()
    x = 3 * noise(5, 30)
    x[2] = 40.0  # saturated: a nearly vanishing Jacobian beside ordinary ones
    jacobians = torch.func.vmap(torch.func.jacrev(net))(x)
    expected = torch.linalg.matrix_norm(jacobians, 2)
    assert local_lipschitz(net, x).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_image_shapes_float32_and_repeatability():
    net = nn.Conv2d(3, 3, 3, padding=1)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.matrix_norm(jacobian(net, x[:1])[0].double(), 2)
    first = local_lipschitz(net, x)
    assert first.dtype == F64
    assert first.tolist() == pytest.approx([float(expected)] * 2, rel=1e-5)
    assert torch.equal(first, local_lipschitz(net, x))
    other = local_lipschitz(net, x, generator=torch.Generator().manual_seed(7))
    assert other.tolist() == pytest.approx(first.tolist(), rel=1e-5)


def test_unconverged_rows_raise_with_their_residual():
    """No product resolves 1e-17: the residual is measured, so that the recurrence cannot claim it."""
    A = SPECTRA["cluster"]()
    with pytest.raises(InputError, match=r"sample \d did not converge: relative residual .* tolerance 1e-17"):
        local_lipschitz(linear(A), noise(2, D), tolerance=1e-17)


def test_half_precision_reaches_its_own_tolerance():
    A = SPECTRA["gap"]()
    x = noise(2, D).to(torch.bfloat16)
    assert local_lipschitz(linear(A), x).tolist() == pytest.approx([0.9] * 2, rel=0.05)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, 1.0, math.nan])
def test_bad_tolerances_are_named(tolerance):
    with pytest.raises(InputError, match="tolerance"):
        local_lipschitz(linear(torch.eye(3)), noise(2, 3), tolerance=tolerance)


# --- lower bounds -----------------------------------------------------------------------------------------------------


def test_ascent_finds_the_constant_of_a_sine():
    f = lambda x: 0.3 * torch.sin(2 * x)  # noqa: E731  Lipschitz constant 0.6
    x = noise(6, 3)
    sampled, ascended = lipschitz_lower(f, x, ascent_steps=0), lipschitz_lower(f, x, ascent_steps=30)
    assert sampled.kind == "sampled"
    assert ascended.kind == "lower"
    expected = float((0.6 * torch.cos(2 * x).abs()).max())
    assert sampled.value == pytest.approx(expected, rel=1e-9)
    assert sampled.value < ascended.value <= 0.6 * (1 + 1e-12)
    assert ascended.value == pytest.approx(0.6, rel=1e-5)


def test_ascent_climbs_far_above_the_samples():
    bump = lambda x: 0.9 * torch.exp(-((x - 4) ** 2).sum(1, keepdim=True) / 8) * (x - 4)  # noqa: E731
    x = noise(40, 4)
    sampled, ascended = (lipschitz_lower(bump, x, ascent_steps=k).value for k in (0, 60))
    assert sampled < 0.75
    assert ascended == pytest.approx(0.9, rel=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_sampled_below_ascended_below_certified(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(20, 40), nn.SiLU(), nn.Linear(40, 20)).double()
    x = noise(32, 20, seed=seed)
    sampled = lipschitz_lower(net, x, ascent_steps=0).value
    few, many = (lipschitz_lower(net, x, ascent_steps=k).value for k in (2, 25))
    assert sampled <= few <= many <= lipschitz_upper(net).value
    assert many > 1.02 * sampled


def test_ascent_on_locally_constant_jacobians_keeps_the_samples_value():
    x = noise(8, 20)
    for f in (nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20)).double(), linear(noise(20, 20))):
        assert lipschitz_lower(f, x).value == lipschitz_lower(f, x, ascent_steps=0).value


@pytest.mark.parametrize("option", [{"ascent_steps": -1}, {"starts": 0}])
def test_bad_ascent_options_are_named(option):
    with pytest.raises(InputError, match=next(iter(option))):
        lipschitz_lower(torch.sin, noise(2, 3), **option)


# --- certified constants: every rule against brute force --------------------------------------------------------------


def jacobian(module, x):
    """Dense Jacobians by one reverse pass per output entry, sharing nothing with hnkit."""
    rows = []
    for row in x:
        J = torch.autograd.functional.jacobian(lambda z: module(z[None]), row)
        rows.append(J.reshape(-1, row.numel()))
    return torch.stack(rows)


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(),
    nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardswish(), nn.SiLU(), nn.Mish(), nn.SELU(), nn.CELU(0.5), nn.GELU(),
    nn.GELU(approximate="tanh"), nn.LeakyReLU(0.2), nn.LeakyReLU(2.0), nn.LeakyReLU(-3.0), nn.PReLU(init=-1.5),
    nn.ELU(), nn.ELU(2.5), nn.Softplus(threshold=40.0), nn.Softplus(beta=3.0, threshold=40.0),
]  # fmt: skip


@pytest.mark.parametrize("module", ACTIVATIONS, ids=str)
def test_slopes_of_activations_are_bounds_and_sharp(module):
    module = module.double()
    x = torch.cat([torch.linspace(-18, 18, 360_001, dtype=F64), torch.tensor([-3 + 1e-9, 3 - 1e-9], dtype=F64)])
    x.requires_grad_()
    (slope,) = torch.autograd.grad(module(x[:, None]).sum(), x)
    bounds = certified_bounds(module)
    assert bounds.elementwise
    assert bounds.lower <= float(slope.min())
    assert float(slope.max()) <= bounds.upper * (1 + 1e-14)
    assert bounds.norm == pytest.approx(float(slope.abs().max()), rel=1e-6)
    assert (bounds.lower, bounds.upper) == pytest.approx((float(slope.min()), float(slope.max())), abs=3e-3)


def test_smooth_activation_constants_in_30_digits(monkeypatch):
    monkeypatch.setattr(mpmath.mp, "dps", 30)
    c = mpmath.mpf("0.044715")
    cases = [  # function, near its steepest rise, near its steepest fall
        (nn.SiLU(), lambda x: x / (1 + mpmath.exp(-x)), 2.4, -2.4),
        (nn.GELU(), lambda x: x * mpmath.ncdf(x), 1.4, -1.4),
        (nn.Mish(), lambda x: x * mpmath.tanh(mpmath.log(1 + mpmath.exp(x))), 1.5, -2.26),
        (
            nn.GELU(approximate="tanh"),
            lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + c * x**3))),
            1.4,
            -1.4,
        ),
    ]
    for module, function, rise, fall in cases:
        bounds = certified_bounds(module)
        for start, stated, sign in ((rise, bounds.upper, 1), (fall, bounds.lower, -1)):
            peak = mpmath.findroot(lambda t, g=function: mpmath.diff(g, t, 2), start, tol=1e-20)
            excess = sign * (stated - mpmath.diff(function, peak))
            assert 0 <= excess < 1e-9, module


CONVOLUTIONS = [
    (nn.Conv1d(2, 3, 3, padding=1), (2, 9)),
    (nn.Conv1d(2, 3, 4, padding=3, stride=2), (2, 11)),
    (nn.Conv1d(2, 2, 3, padding=4, dilation=3), (2, 13)),
    (nn.Conv1d(4, 6, 3, padding=1, groups=2), (4, 7)),
    (nn.Conv1d(3, 3, 5, padding="same", groups=3), (3, 9)),
    (nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), (2, 5)),
    (nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", stride=2), (1, 3)),
    (nn.Conv1d(1, 1, 3, padding=4, padding_mode="circular"), (1, 4)),
    (nn.Conv1d(2, 2, 4, padding="same", padding_mode="circular"), (2, 6)),
    (nn.Conv1d(2, 2, 3, padding=2, padding_mode="reflect"), (2, 3)),
    (nn.Conv1d(2, 2, 3, padding=3, padding_mode="replicate"), (2, 1)),
    (nn.Conv1d(1, 1, 3, padding="same", padding_mode="replicate"), (1, 1)),
    (nn.Conv2d(3, 2, 3, padding=1), (3, 6, 5)),
    (nn.Conv2d(2, 4, (1, 4), stride=(1, 2), padding=(0, 2)), (2, 3, 8)),
    (nn.Conv2d(2, 5, 2, stride=2), (2, 6, 6)),
    (nn.Conv2d(3, 3, 1), (3, 4, 4)),
    (nn.Conv3d(1, 2, 3, padding=1), (1, 3, 4, 3)),
    (nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1), (2, 6)),
    (nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 4)),
    (nn.ConvTranspose1d(2, 2, 3, dilation=2), (2, 5)),
]  # fmt: skip
POOLS = [
    (nn.AvgPool1d(2), (2, 8)),
    (nn.AvgPool2d(3, stride=1, padding=1), (1, 6, 6)),
    (nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), (1, 5, 5)),
    (nn.AvgPool2d(3, stride=2, ceil_mode=True), (1, 6, 6)),
    (nn.AvgPool2d(2, divisor_override=1), (1, 4, 4)),
    (nn.AvgPool3d(2), (1, 4, 4, 4)),
    (nn.MaxPool1d(2), (2, 8)),
    (nn.MaxPool2d(3, stride=1, padding=1), (1, 5, 5)),
    (nn.MaxPool1d(2, stride=1, dilation=2), (1, 8)),
    (nn.Upsample(scale_factor=2), (1, 3, 3)),
    (nn.Upsample(scale_factor=(3.0, 1.5)), (1, 4, 4)),
    (nn.UpsamplingNearest2d(scale_factor=4), (1, 2, 2)),
    (nn.PixelShuffle(2), (4, 2, 2)),
    (nn.PixelUnshuffle(2), (1, 4, 4)),
    (nn.ChannelShuffle(2), (4, 2, 2)),
    (nn.ZeroPad2d(1), (1, 3, 3)),
    (nn.ConstantPad1d((-1, 2), 3.0), (2, 4)),
]  # fmt: skip
LAYERS = [
    (nn.Linear(5, 7), (5,)),
    (nn.Linear(4, 4, bias=False), (3, 4)),
    (nn.Identity(), (3,)),
    (nn.Dropout(0.5).eval(), (3,)),
    (nn.Softmax(dim=1), (6,)),
    (nn.Softmin(dim=-1), (6,)),
    (nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Unflatten(1, (2, 4))), (2, 4)),
    (Sum(nn.Identity(), nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))), (4,)),
    (Scaled(Sum(nn.Linear(4, 4), nn.Tanh()), -0.3), (4,)),
    (nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1)), (2, 4, 4)),
    (nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)).eval(), (5,)),
]  # fmt: skip


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS + POOLS + LAYERS, ids=lambda v: str(v)[:70])
def test_certified_constants_bound_every_jacobian(module, shape):
    module = module.double()
    with torch.no_grad():  # adversarial weights: all of one sign add up at frequency zero
        for case in range(3):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(case)).abs())
                if case:
                    parameter.mul_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)).sign())
            with torch.enable_grad():
                J = jacobian(module, 2 * noise(4, *shape, seed=case))
            bounds = certified_bounds(module)
            largest = float(torch.linalg.matrix_norm(J, 2).max())
            assert largest <= bounds.norm * (1 + 1e-12)
            assert lipschitz_upper(module).value == bounds.norm
            if J.shape[1] == J.shape[2]:
                eigenvalues = torch.linalg.eigvalsh((J + J.mT) / 2)
                assert bounds.lower - 1e-12 <= float(eigenvalues.min())
                assert float(eigenvalues.max()) <= bounds.upper + 1e-12


TIGHT = [
    (nn.Conv1d(2, 3, 3, padding=1), (2, 100)),
    (nn.Conv1d(2, 3, 4, padding=2, stride=2), (2, 128)),
    (nn.Conv1d(4, 4, 5, padding=4, dilation=2, groups=2), (4, 128)),
    (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 12, 12)),
    (nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1), (2, 64)),
    (nn.AvgPool1d(3, stride=1, padding=1), (1, 100)),
]


@pytest.mark.parametrize(("module", "shape"), TIGHT, ids=str)
def test_convolution_bounds_are_tight_on_large_inputs(module, shape):
    torch.manual_seed(0)
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    J = jacobian(module, noise(1, *shape))
    assert float(torch.linalg.matrix_norm(J, 2).max()) >= 0.985 * lipschitz_upper(module).value


def test_circular_convolution_norm_is_the_fft_maximum():
    torch.manual_seed(1)
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    size = 96  # all grid frequencies of the default density, 32 * 2 = 64, are not among these
    symbol = torch.fft.fft2(layer.weight.detach(), s=(size, size)).permute(2, 3, 0, 1)
    exact = float(torch.linalg.matrix_norm(symbol, 2).max())
    assert exact <= lipschitz_upper(layer).value <= 1.006 * exact


def test_the_reshaped_kernel_would_not_be_a_bound():
    """The mistake this replaces: the norm of the kernel as an `out x (in k k)` matrix lies below the layer's norm."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.constant_(layer.weight, 1.0)
    norm = float(torch.linalg.matrix_norm(jacobian(layer, noise(1, 1, 12, 12))[0], 2))
    assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == 3
    assert 8 < norm <= lipschitz_upper(layer).value == pytest.approx(9, rel=0.006)


@pytest.mark.parametrize("density", [32, 16, 8, 4])
def test_coarser_grids_keep_the_bound(density, monkeypatch):
    """Between grid points the symbol may be larger: the correction factor must cover it at every density."""
    monkeypatch.setattr("hnkit.linalg.convolution._grid", lambda degrees, work: [max(1, density * n) for n in degrees])
    for seed in range(20):
        weight = noise(2, 2, 5, seed=seed)
        symbol = torch.fft.fft(weight, n=4096).permute(2, 0, 1)
        sup = float(torch.linalg.matrix_norm(symbol, 2).max())
        bound = convolution_norm_bound(weight, (1,), (1,))
        assert sup <= bound <= sup / math.cos(math.pi / density) ** 0.5 * (1 + 1e-6)


def test_spectral_norm_is_rounded_outward():
    for seed in range(30):
        A = noise(12, 9, seed=seed)
        exact = max(mpmath.svd_r(mpmath.matrix(A.tolist()), compute_uv=False))
        assert exact <= spectral_norm_bound(A) <= exact * (1 + 1e-12)


def test_operator_norms_scale_with_the_weights():
    for scale in (1e-12, 1e-3, 1e6):
        weight = noise(3, 2, 3, 3)
        bound = convolution_norm_bound(weight, (1, 1), (1, 1))
        assert convolution_norm_bound(scale * weight, (1, 1), (1, 1)) == pytest.approx(scale * bound, rel=1e-12)
        assert spectral_norm_bound(scale * weight[:, 0, 0]) <= scale * spectral_norm_bound(weight[:, 0, 0]) * 1.000001
    assert spectral_norm_bound(torch.full((1, 1), -3.0)) == pytest.approx(3.0)
    assert spectral_norm_bound(torch.zeros(0, 3)) == 0.0
    assert convolution_norm_bound(torch.zeros(2, 2, 3), (1,), (1,)) == 0.0


@pytest.mark.parametrize(
    ("module", "norm", "lower", "upper"),
    [
        (nn.Identity(), 1, 1, 1),
        (nn.Dropout().eval(), 1, 1, 1),
        (nn.Sequential(), 1, 1, 1),
        (nn.PixelShuffle(2), 1, -1, 1),
        (Scaled(nn.Tanh(), -2.0), 2, -2, 0),
        (Sum(nn.Identity(), Scaled(nn.Sigmoid(), 4.0)), 2, 1, 2),
        (nn.AvgPool2d(3, stride=2, ceil_mode=True), 2, -2, 2),
        (nn.AvgPool2d(4), 0.25, -0.25, 0.25),
        (nn.MaxPool1d(3, stride=2), math.sqrt(2), -math.sqrt(2), math.sqrt(2)),
        (nn.MaxPool1d(3, dilation=2), math.sqrt(3), -math.sqrt(3), math.sqrt(3)),
        (nn.Upsample(scale_factor=(2, 3)), math.sqrt(8), -math.sqrt(8), math.sqrt(8)),
        (nn.Conv1d(1, 1, 1, padding=1, padding_mode="reflect"), math.sqrt(3), -math.sqrt(3), math.sqrt(3)),
        (nn.Conv1d(1, 1, 1, padding=2, padding_mode="replicate"), math.sqrt(5), -math.sqrt(5), math.sqrt(5)),
        (nn.Conv1d(1, 1, 1, padding=2, padding_mode="circular"), math.sqrt(3), -math.sqrt(3), math.sqrt(3)),
    ],
    ids=str,
)
def test_stated_constants(module, norm, lower, upper):
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    bounds = certified_bounds(module)
    assert (bounds.norm, bounds.lower, bounds.upper) == pytest.approx((norm, lower, upper), rel=1e-9, abs=1e-300)


def test_bounds_that_vanish_in_floating_point_are_not_zero():
    """The slopes of -1e-400 tanh lie in [-1e-400, 0], which no float but 0 is nearest to."""
    bounds = certified_bounds(Scaled(Scaled(nn.Tanh(), 1e-200), -1e-200))
    assert bounds.norm > 0 > bounds.lower
    tiny = layer(torch.full((1, 1), 1e-170, dtype=F64))
    assert certified_bounds(nn.Sequential(tiny, nn.Tanh(), layer(tiny.weight.T))).upper > 0
    assert certified_bounds(Scaled(nn.ReLU(), 0.3)).lower == 0
    assert certified_bounds(Scaled(nn.ReLU(), 0.0)) == JacobianBounds(
        0, 0, 0, elementwise=True, how="0 * ReLU 'module' 1"
    )


def test_the_range_of_a_linear_layer_is_that_of_its_symmetric_part():
    for A in (noise(5, 5), noise(5, 5) + 6 * torch.eye(5, dtype=F64)):
        bounds, values = certified_bounds(layer(A)), torch.linalg.eigvalsh((A + A.T) / 2)
        assert (bounds.lower, bounds.upper) == pytest.approx((float(values[0]), float(values[-1])), rel=1e-12)
        assert bounds.lower < float(values[0])
        assert bounds.upper > float(values[-1])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.GroupNorm(1, 3))),
            r"GroupNorm '1.1': normalisation",
        ),
        (nn.LayerNorm(3), r"LayerNorm: normalisation"),
        (nn.BatchNorm1d(3).eval(), r"BatchNorm1d: normalisation"),
        (nn.RMSNorm(3), r"RMSNorm: normalisation"),
        (Sum(nn.Identity(), nn.MultiheadAttention(4, 2)), r"MultiheadAttention 'terms.1': .*attention"),
        (nn.TransformerEncoderLayer(4, 2), r"attention is not globally Lipschitz"),
        (nn.Dropout(), r"Dropout: dropout is random"),
        (nn.Hardshrink(), r"Hardshrink: no rule"),
        (nn.Bilinear(2, 2, 2), r"Bilinear: no rule"),
        (nn.Softplus(threshold=1.0), r"Softplus: .*threshold"),
        (nn.Softplus(beta=0.0), r"Softplus: .*beta 0.0"),
        (nn.Softplus(beta=math.nan), r"Softplus: .*beta nan"),
        (nn.CELU(-0.5), r"CELU: .*use alpha > 0"),
        (nn.ELU(math.nan), r"ELU: its alpha is nan"),
        (nn.LeakyReLU(math.inf), r"LeakyReLU: its negative_slope is inf"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), r"Upsample: .*nearest"),
        (nn.Flatten(0), r"Flatten: .*batch dimension"),
        (Sum(nn.Identity(), nn.ReLU(inplace=True)), r"ReLU 'terms.1': .*in place"),
        (Scaled(nn.Identity(), math.inf), r"Scaled: its factor is inf"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), r"Linear: .*training mode"),
        (torch.sin, r"lipschitz_lower gives a lower bound"),
        (3, r"the map is a int"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_cannot_be_certified_is_named(module, message):
    with pytest.raises(InputError, match=message) as caught:
        lipschitz_upper(module)
    assert "\n" not in str(caught.value)


def test_modules_that_compute_something_else_are_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: 5 * x
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.weight, math.nan)
    for module, message in (
        (Doubled(2, 2), "no rule"), (hooked, "hooks"), (replaced, "forward was replaced"), (broken, "finite"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            lipschitz_upper(nn.Sequential(module))


def test_modules_declare_themselves_or_are_registered():
    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    class Declared(nn.Module):
        constant: object = 0.5

        def lipschitz_upper(self):
            return self.constant

        def field_of_values(self):
            return -0.25, 7.0

    with pytest.raises(InputError, match="Sine: no rule"):
        lipschitz_upper(Sine())
    register(Sine)(lambda module, visit: JacobianBounds.from_slopes(-1.0, 1.0))
    assert lipschitz_upper(Sine()).value == 1.0
    bounds = certified_bounds(nn.Sequential(Declared()))
    assert (bounds.norm, bounds.lower, bounds.upper) == (0.5, -0.25, 0.5)
    assert "declared" in lipschitz_upper(Declared()).how
    for bad in (-1.0, math.nan, "x", None):
        Declared.constant = bad
        with pytest.raises(InputError, match=r"Declared: its lipschitz_upper\(\) returned"):
            lipschitz_upper(Declared())

    class Plain:
        def lipschitz_upper(self):
            return 0.25

    assert lipschitz_upper(Plain()).value == 0.25
    assert certify_injective(Plain()).status == "certified"


# --- injectivity ------------------------------------------------------------------------------------------------------


def layer(A):
    module = nn.Linear(*A.shape, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(A)
    return module


def gradient_map(W, sign=1.0):
    return nn.Sequential(layer(W), nn.Tanh(), layer(sign * W.T)) if W.shape[0] == W.shape[1] else None


def test_small_constants_certify():
    certificate = certify_injective(Scaled(nn.Tanh(), 0.9))
    assert certificate.status == "certified"
    assert "< 1" in certificate.how
    assert certify_injective(layer(torch.eye(3, dtype=F64))).status == "certified"  # monotone, norm 1


@pytest.mark.parametrize("size", [1.5, 40.0])
def test_monotone_maps_certify_beyond_norm_one(size):
    K = noise(4, 4)
    skew = layer(size * (K - K.T))
    W = size * noise(4, 4, seed=1)
    for f in (
        skew,
        gradient_map(W),
        Sum(skew, gradient_map(W), Scaled(nn.Tanh(), -0.9)),
        Sum(layer(size * torch.eye(4, dtype=F64)), nn.ReLU()),
        nn.Sequential(nn.Flatten(), skew),
        Scaled(gradient_map(W, sign=-1.0), -2.0),
    ):
        certificate = certify_injective(f)
        assert certificate.status == "certified", certificate.how
        assert "strongly monotone" in certificate.how
        x = noise(200, 4, seed=3)
        moved = x + f(x)
        inner = ((moved[:100] - moved[100:]) * (x[:100] - x[100:])).sum(1)
        assert bool((inner > 0).all())


def test_what_folds_is_never_certified():
    one = torch.eye(3, dtype=F64)
    for f in (
        layer(-one), layer(-2 * one), Scaled(nn.Tanh(), -1.0), gradient_map(1.5 * one, sign=-1.0),
        Sum(layer(-0.6 * one), Scaled(nn.Tanh(), -0.6)), Scaled(nn.ReLU(), -1.0),
        nn.Sequential(layer(2 * one), layer(-one)), nn.Sequential(nn.SiLU(), layer(-1.1 * one)),
    ):  # fmt: skip
        certificate = certify_injective(f)
        assert certificate.status == "unknown"
        assert "not below 1" in certificate.how
    assert certify_injective(lambda x: 0 * x).status == "unknown"
    assert "GroupNorm" in certify_injective(nn.GroupNorm(1, 2)).how


def test_a_declared_linear_layer_is_no_gradient_map():
    """A subclass may compute something else than `W x`, so that equal weights say nothing about the composition."""

    class Negated(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

        def lipschitz_upper(self):
            return 2.0

    W = 2 * torch.eye(2, dtype=F64)
    last = Negated(2, 2, bias=False).double()
    with torch.no_grad():
        last.weight.copy_(W)
    assert certify_injective(nn.Sequential(layer(W), nn.ReLU(), last)).status == "unknown"


def test_negative_slopes_are_not_monotone():
    """W' s(W x) with s = SiLU, whose slope reaches -0.0998, folds for large W: the range must say so."""
    W = 4 * torch.eye(2, dtype=F64)
    f = nn.Sequential(layer(W), nn.SiLU(), layer(W.T))
    assert certified_bounds(f).lower == pytest.approx(-16 * 0.09983932013)
    assert certify_injective(f).status == "unknown"


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_gradient_that_cannot_be_differentiated_again_is_refused(share):
    """Also where a part of the map alone is so: the ascent would follow the other part."""

    def f(x):
        return share * Once.apply(x) + (1 - share) * torch.sin(x)

    x = 0.8 * torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"no second derivatives .*once_differentiable.* use ascent_steps=0"):
        lipschitz_lower(f, x)
    assert lipschitz_lower(f, x, ascent_steps=0).value == pytest.approx(math.cos(0.8), rel=1e-6)
