"""The rules: bounds on the Jacobian of torch's layers, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hnkit.bounds import solver_margin
from hnkit.errors import InputError
from hnkit.internal.values import number
from hnkit.linalg.convolution import convolution_norm_bound, spectral_norm_bound
from hnkit.lipschitz.certify import JacobianBounds, Scaled, Sum, Visit, down, register, rules, times, up
from hnkit.lipschitz.hidden import hidden_dominance
from hnkit.lipschitz.plain import plain_tensor

# --- containers -------------------------------------------------------------------------------------------------------


@register(nn.Sequential)
def _sequential(module: nn.Sequential, visit: Visit) -> JacobianBounds:
    parts, owned = [], visit.owned
    for name, child in module._modules.items():  # as forward runs them: a module that comes twice counts twice
        assert child is not None
        parts.append((child, visit(child, name, owned=owned)))
        owned = owned or _returns_a_new_tensor(child)
    acting = [(child, part) for child, part in parts if not part.reshaping]
    how = " x ".join(part.how for _, part in acting)
    if not acting:
        return JacobianBounds(1.0, 1.0, 1.0, reshaping=True)
    norm = 1.0
    for _, part in acting:
        norm = times(norm, part.norm)
    if len(acting) == 1:
        return replace(acting[0][1], how=how)
    # All parts are Lipschitz, so that the image of a bounded set is bounded.
    bounded, bijective = any(part.bounded for _, part in acting), _hidden_layer_dominates(acting)
    interval = _gradient_form(acting)
    if interval is None:
        bounds = JacobianBounds.from_norm(norm)
    else:
        bounds, how = JacobianBounds(norm, *interval), how + " (W' s(W x + b): symmetric Jacobian)"
    return replace(bounds, bounded=bounded, bijective=bijective, oriented=bijective, how=how)


def _returns_a_new_tensor(module: nn.Module) -> bool:
    """Whether the output of a module surely shares no memory with its input."""
    if isinstance(module, nn.Sequential):
        return any(_returns_a_new_tensor(child) for child in module)
    if isinstance(module, Sum):
        return len(module.terms) > 1
    kind = parametrize.type_before_parametrizations(module)
    return (kind is Scaled or kind in _ALLOCATING) and not getattr(module, "inplace", False)


def _one_hidden_layer(parts: list[tuple[nn.Module, JacobianBounds]]) -> tuple[Tensor, Tensor, JacobianBounds] | None:
    """`W`, `V` and the bounds of s, if the layers are `V s(W x + b) + c` with one hidden layer of entries."""
    if len(parts) != 3 or not parts[1][1].elementwise:
        return None
    first, last = parts[0][0], parts[2][0]
    if not all(parametrize.type_before_parametrizations(end) is nn.Linear for end in (first, last)):
        return None
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    W, V = _weight(first), _weight(last)
    return (W, V, parts[1][1]) if W.shape == V.T.shape else None


def _hidden_layer_dominates(parts: list[tuple[nn.Module, JacobianBounds]]) -> bool:
    layers = _one_hidden_layer(parts)
    if layers is None:
        return False
    W, V, slopes = layers
    return hidden_dominance(W, V, slopes.lower, slopes.upper)


def _gradient_form(parts: list[tuple[nn.Module, JacobianBounds]]) -> tuple[float, float] | None:
    """Range of the symmetric Jacobian `+-W' D W` of `+-W' s(W x + b)`, if that is what the three layers are."""
    layers = _one_hidden_layer(parts)
    if layers is None:
        return None
    W, V, slopes = layers
    square = times(parts[0][1].norm, parts[0][1].norm)
    low, high = times(min(slopes.lower, 0.0), square, -math.inf), times(max(slopes.upper, 0.0), square)
    if torch.equal(V, W.T):
        return low, high
    return (-high, -low) if torch.equal(V, -W.T) else None


@register(Sum)
def _sum(module: Sum, visit: Visit) -> JacobianBounds:
    parts = [visit(term, f"terms.{k}") for k, term in enumerate(module.terms)]
    norm, lower, upper = parts[0].norm, parts[0].lower, parts[0].upper
    for part in parts[1:]:
        norm, lower, upper = up(norm + part.norm), down(lower + part.lower), up(upper + part.upper)
    bounded = all(part.bounded for part in parts)
    how = "(" + " + ".join(part.how for part in parts) + ")"
    return JacobianBounds(norm, lower, upper, bounded=bounded, how=how)


@register(Scaled)
def _scaled(module: Scaled, visit: Visit) -> JacobianBounds:
    part, c = visit(module.module, "module", owned=visit.owned), _setting(module.factor, "factor")
    least, most = (part.lower, part.upper) if c >= 0 else (part.upper, part.lower)
    return JacobianBounds(
        times(abs(c), part.norm),
        times(c, least, -math.inf),
        times(c, most),
        elementwise=part.elementwise,
        bounded=part.bounded,
        how=f"{c:g} * {part.how}",
    )


# --- linear and convolution layers ------------------------------------------------------------------------------------


def _setting(value: float, name: str) -> float:
    setting = number(value, f"its {name} is {value!r:.60}, which")
    if not math.isfinite(setting):
        raise InputError(f"its {name} is {value}: a finite number is needed")
    return setting


def _weight(module: nn.Module) -> Tensor:
    if getattr(module, "bias", None) is not None:
        plain_tensor(module.bias, "bias")
    return plain_tensor(module.weight, "weight")


@register(nn.Linear)
def _linear(module: nn.Linear, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    weight = _weight(module)
    norm = spectral_norm_bound(weight)
    if weight.shape[0] != weight.shape[1] or math.isinf(norm):
        return JacobianBounds.from_norm(norm)
    eigenvalues = torch.linalg.eigvalsh(weight / 2 + weight.T / 2)
    margin = solver_margin(weight.shape[0]) * norm
    return JacobianBounds(norm, float(eigenvalues[0]) - margin, float(eigenvalues[-1]) + margin)


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Conv2d, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    weight = _weight(module)
    axes = weight.ndim - 2
    stride, dilation = _axes(module.stride, axes), _axes(module.dilation, axes)
    if module.padding_mode == "zeros":
        return JacobianBounds.from_norm(convolution_norm_bound(weight, stride, dilation, module.groups))
    # What forward pads by, last axis first: `module.padding` is not read there.
    pads = module._reversed_padding_repeated_twice
    amounts = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    if module.padding_mode == "circular":
        # Rows of the circulant matrix of stride 1 (on a torus whose size the stride does not divide, the polyphase
        # symbol would be wrong); more padding than "same" repeats them, at most three times.
        norm = convolution_norm_bound(weight, (1,) * axes, dilation, module.groups)
        reach = [step * (k - 1) for k, step in zip(weight.shape[2:], dilation, strict=True)]
        copies = 3 ** sum(left + right > r for (left, right), r in zip(amounts, reach, strict=True))
    else:
        # Reflecting or replicating repeats an entry this often at most.
        norm = convolution_norm_bound(weight, stride, dilation, module.groups)
        more = [max(pair) for pair in amounts]
        copies = math.prod(1 if p == 0 else 3 if module.padding_mode == "reflect" else 2 * p + 1 for p in more)
    return JacobianBounds.from_norm(times(norm, up(math.sqrt(copies)) if copies > 1 else 1.0))


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(module: nn.ConvTranspose2d, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    # The adjoint of a zero-padded convolution whose weight has the same layout.
    weight = _weight(module)
    stride, dilation = (_axes(setting, weight.ndim - 2) for setting in (module.stride, module.dilation))
    norm = convolution_norm_bound(weight, stride, dilation, module.groups)
    return JacobianBounds.from_norm(norm)


# --- activations ------------------------------------------------------------------------------------------------------

# Extreme slopes, rounded outward in the last digit: of x sigmoid(x), x Phi(x), its tanh form, x tanh(softplus x).
_SLOPES: Mapping[type[nn.Module], tuple[float, float]] = {
    nn.ReLU: (0.0, 1.0),
    nn.ReLU6: (0.0, 1.0),
    nn.Tanh: (0.0, 1.0),
    nn.Sigmoid: (0.0, 0.25),
    nn.LogSigmoid: (0.0, 1.0),
    nn.Softsign: (0.0, 1.0),
    nn.Tanhshrink: (0.0, 1.0),
    nn.Softshrink: (0.0, 1.0),
    nn.Hardtanh: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 0.1666666717),  # torch holds 1/6 in single precision
    nn.Hardswish: (-0.5, 1.5),
    nn.SiLU: (-0.09983932013, 1.09983932013),
    nn.Mish: (-0.1125261224, 1.0884981613),
    nn.SELU: (0.0, 1.7580993409),
}


_BOUNDED = {nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardsigmoid}


def _activation(module: nn.Module, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    kind = parametrize.type_before_parametrizations(module)
    return replace(JacobianBounds.from_slopes(*_SLOPES[kind]), bounded=kind in _BOUNDED)


register(*_SLOPES)(_activation)


@register(nn.GELU)
def _gelu(module: nn.GELU, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    if module.approximate == "none":
        return JacobianBounds.from_slopes(-0.1289041452, 1.1289041452)
    return JacobianBounds.from_slopes(-0.1289930687, 1.1289930687)


@register(nn.LeakyReLU)
def _leaky_relu(module: nn.LeakyReLU, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    slope = _setting(module.negative_slope, "negative_slope")
    return JacobianBounds.from_slopes(min(slope, 1.0), max(slope, 1.0))


@register(nn.PReLU)
def _prelu(module: nn.PReLU, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    weight = _weight(module)
    return JacobianBounds.from_slopes(min(1.0, float(weight.min())), max(1.0, float(weight.max())))


@register(nn.ELU)
def _elu(module: nn.ELU, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    alpha = _setting(module.alpha, "alpha")
    return JacobianBounds.from_slopes(min(0.0, alpha), max(1.0, alpha))


@register(nn.CELU)
def _celu(module: nn.CELU, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    if _setting(module.alpha, "alpha") <= 0:
        raise InputError(f"alpha {module.alpha}: its slope exp(x / alpha) is unbounded at -inf; use alpha > 0")
    return JacobianBounds.from_slopes(0.0, 1.0)


@register(nn.Softplus)
def _softplus(module: nn.Softplus, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    beta, threshold = (number(getattr(module, name), f"its {name}") for name in ("beta", "threshold"))
    # torch replaces log(1 + e^t)/beta, t = beta x, by x above the threshold: a step down by log(1 + e^-t)/beta, which
    # no Lipschitz constant allows unless float64 cannot hold it. From t = 89 on e^t overflows in single precision.
    if not (beta > 0 and threshold + math.exp(-abs(threshold)) == threshold <= 88):
        raise InputError(
            f"beta {beta}, threshold {threshold}: it jumps where beta x passes the threshold; use beta > 0 and a "
            "threshold between 36 and 88, where torch's rounding hides the step"
        )
    return JacobianBounds.from_slopes(0.0, 1.0)


def _row_axis(value: object) -> bool:
    """Whether an axis surely lies within the rows of a batch: counted from the left, or the last one."""
    return isinstance(value, int) and (value >= 1 or value == -1)


@register(nn.Softmax, nn.Softmin)
def _softmax(module: nn.Softmax, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    if not _row_axis(module.dim):
        raise InputError(
            f"dim {module.dim} may be the batch dimension, so that rows depend on each other: use dim >= 1"
        )
    # J = diag(p) - p p' (negated for softmin), symmetric with eigenvalues in [0, 1/2].
    low, high = (0.0, 0.5) if isinstance(module, nn.Softmax) else (-0.5, 0.0)
    return JacobianBounds(0.5, low, high)


# --- shapes, pooling, dropout -----------------------------------------------------------------------------------------


@register(nn.Identity, nn.Flatten, nn.Unflatten)
def _reshaping(module: nn.Module, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    if not (_row_axis(getattr(module, "start_dim", 1)) and _row_axis(getattr(module, "dim", 1))):
        raise InputError("it may reshape the batch dimension, so that rows depend on each other: use a dim >= 1")
    return JacobianBounds(1.0, 1.0, 1.0, reshaping=True)


@register(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _dropout(module: nn.Dropout, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    if module.training:
        raise InputError("dropout is random in training mode: call eval()")
    return JacobianBounds(1.0, 1.0, 1.0, reshaping=True)


@register(
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip
def _isometry(module: nn.Module, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    return JacobianBounds.from_norm(1.0)


def _axes(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


_POOL_AXES: Mapping[type[nn.Module], int] = {
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3,
    nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3,
}  # fmt: skip


def _pool_axes(module: nn.Module) -> int:
    return _POOL_AXES[parametrize.type_before_parametrizations(module)]


@register(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _average_pool(module: nn.AvgPool2d, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    axes = _pool_axes(module)
    kernel, stride, padding = (_axes(v, axes) for v in (module.kernel_size, module.stride, module.padding))
    fixed = getattr(module, "divisor_override", None)
    if fixed is None and (module.ceil_mode or (any(padding) and not module.count_include_pad)):
        # Weights of a window are at most 1 and sum to 1: |A|_inf = 1, |A|_1 <= windows over an entry.
        windows = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
        return JacobianBounds.from_norm(up(math.sqrt(windows)))
    weight = torch.full((1, 1, *kernel), 1 / (fixed or math.prod(kernel)), dtype=torch.float64)
    return JacobianBounds.from_norm(convolution_norm_bound(weight, stride, (1,) * axes))


@register(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _max_pool(module: nn.MaxPool2d, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    axes = _pool_axes(module)
    kernel, stride, dilation = (_axes(v, axes) for v in (module.kernel_size, module.stride, module.dilation))
    # |max u - max v| <= |u - v| in each window, and an entry lies in this many windows.
    windows = math.prod(-(-k // s) if step == 1 else k for k, s, step in zip(kernel, stride, dilation, strict=True))
    return JacobianBounds.from_norm(up(math.sqrt(windows)))


@register(nn.Upsample, nn.UpsamplingNearest2d)
def _upsample(module: nn.Upsample, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    scale = module.scale_factor
    if module.mode != "nearest" or scale is None or module.size is not None:
        raise InputError("only mode='nearest' with a scale_factor has a rule")
    # One number scales every axis: two for UpsamplingNearest2d, else at most three. An entry is copied scale times per
    # axis, once more where the rounded coordinate may slip.
    scales = scale if isinstance(scale, tuple) else (scale,) * (2 if isinstance(module, nn.UpsamplingNearest2d) else 3)
    copies = math.prod(int(s) if math.log2(s).is_integer() and s >= 1 else math.ceil(s) + 1 for s in scales)
    return JacobianBounds.from_norm(up(math.sqrt(copies)))


_ALLOCATING = frozenset(rules()) - {
    nn.Sequential, Sum, Scaled, nn.Identity, nn.Flatten, nn.Unflatten,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
}  # fmt: skip
"""Layers with rules here whose output, unless they work in place, is a tensor of its own."""
