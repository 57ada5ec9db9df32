"""Certificates: bounds on the Jacobian of a module that hold at every input.

For every layer a rule states `JacobianBounds`: `|J(x)|_2 <= norm`, and `lower <= S(x) <= upper` for the symmetric part
`S = (J + J')/2`. They compose over `nn.Sequential`, `Sum` and `Scaled`. Two certificates of injectivity of
`T(x) = x + f(x)` follow: `norm < 1` (Lemma 5), and `lower > -1`, which makes T uniformly strongly monotone.

A module of one's own takes part in one of two ways: a method `lipschitz_upper() -> float` (and, optionally,
`field_of_values() -> (lower, upper)`), or a rule registered for its type with `register`. Both are believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hnkit.errors import InputError, NotCertifiedError
from hnkit.linalg.convolution import convolution_norm_bound, spectral_norm_bound


@dataclass(frozen=True)
class JacobianBounds:
    """Bounds of the Jacobian that hold wherever the map is differentiable.

    Attributes:
        norm: `|J(x)|_2 <= norm`; also the Lipschitz constant of the map is at most `norm`.
        lower: `lambda_min((J + J')/2) >= lower`.
        upper: `lambda_max((J + J')/2) <= upper`.
        elementwise: the map acts on each entry alone (J is diagonal).
        reshaping: the map only regroups entries of a row (J is the identity).
        how: one line that says what the bounds come from.
    """

    norm: float
    lower: float
    upper: float
    elementwise: bool = False
    reshaping: bool = False
    how: str = ""

    @classmethod
    def from_norm(cls, norm: float) -> JacobianBounds:
        """Nothing is known but the norm."""
        return cls(norm, -norm, norm)

    @classmethod
    def from_slopes(cls, lower: float, upper: float) -> JacobianBounds:
        """An activation that acts entry by entry with slopes in `[lower, upper]`."""
        return cls(max(abs(lower), abs(upper)), lower, upper, elementwise=True)


@dataclass(frozen=True)
class InjectivityCertificate:
    """Whether `T(x) = x + f(x)` is proved injective.

    Attributes:
        status: `"certified"`, or `"unknown"`: nothing is claimed.
        how: the proof in one line, or why there is none.
    """

    status: Literal["certified", "unknown"]
    how: str


class Sum(nn.Module):
    """The sum of modules of one input, `f(x) = f_1(x) + ... + f_k(x)`; `Sum(nn.Identity(), block)` is residual."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        if not modules:
            raise InputError("Sum() of no modules: give at least one")
        self.terms = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the terms at `x`."""
        total: Tensor = self.terms[0](x)
        for term in self.terms[1:]:
            total = total + term(x)
        return total


class Scaled(nn.Module):
    """A module times a fixed number, `f(x) = factor * module(x)`."""

    def __init__(self, module: nn.Module, factor: float) -> None:
        super().__init__()
        self.module = module
        self.factor = float(factor)

    def forward(self, x: Tensor) -> Tensor:
        """The scaled module at `x`."""
        result: Tensor = self.factor * self.module(x)
        return result


Visit = Callable[[nn.Module, str], JacobianBounds]
Rule = Callable[[Any, Visit], JacobianBounds]
RuleOf = TypeVar("RuleOf", bound=Rule)

_RULES: dict[type, Rule] = {}


def register(*kinds: type[nn.Module]) -> Callable[[RuleOf], RuleOf]:
    """Declare the rule of one or more module types (these exact types, not their subclasses).

    The rule is `rule(module, visit) -> JacobianBounds`; `visit(child, name)` gives the bounds of a child. It is
    believed: a wrong rule gives wrong certificates. A rule raises `InputError` with a reason to refuse a setting.

    Args:
        kinds: the module types.

    Returns:
        A decorator that returns the rule unchanged.
    """

    def add(rule: RuleOf) -> RuleOf:
        for kind in kinds:
            _RULES[kind] = rule
        return rule

    return add


def _up(value: float) -> float:
    """The next float above, so that a rounded product or sum of bounds stays a bound."""
    return math.nextafter(value, math.inf) if value != 0 else 0.0


def _down(value: float) -> float:
    return -_up(-value)


def _times(a: float, b: float, toward: float = math.inf) -> float:
    """A product rounded up (down for `toward=-inf`) unless it is exact; one that is not 0 never becomes 0."""
    return a * b if a in (0.0, 1.0) or b in (0.0, 1.0) else math.nextafter(a * b, toward)


_NORMALISATION = (
    "normalisation has no global Lipschitz constant that a rule could state (it divides by a statistic of its input)"
)
_ATTENTION = "dot-product attention is not globally Lipschitz"


def _reason(name: str) -> str:
    if "Norm" in name:
        return _NORMALISATION
    if "Attention" in name or "Transformer" in name:
        return _ATTENTION
    return "no rule is known for this type: give it a method lipschitz_upper() or hnkit.lipschitz.register a rule"


def _visit(module: nn.Module, path: str) -> JacobianBounds:
    kind = parametrize.type_before_parametrizations(module)
    label = f"{kind.__name__}" + (f" '{path}'" if path else "")
    try:
        declared = _declared(module)
        if declared is not None:
            return replace(declared, how=f"{label} {declared.norm:.4g} (declared)")
        _require_plain(module)
        if kind not in _RULES:
            raise InputError(_reason(kind.__name__))
        bounds = _RULES[kind](module, lambda child, name: _visit(child, f"{path}.{name}" if path else name))
    except NotCertifiedError:  # a child's, with the path of its layer
        raise
    except InputError as refusal:  # what rules and declarations raise, with the reason
        raise NotCertifiedError(f"no certified Lipschitz constant: layer {label}: {refusal}") from None
    return bounds if bounds.how else replace(bounds, how=f"{label} {bounds.norm:.4g}")


def _declared(module: object) -> JacobianBounds | None:
    """What the object says about itself, if it does."""
    method = getattr(module, "lipschitz_upper", None)
    if not callable(method):
        return None
    norm = _number(method(), "lipschitz_upper()")
    if norm < 0:
        raise InputError(f"its lipschitz_upper() returned {norm:g}: a Lipschitz constant is at least 0")
    bounds = JacobianBounds.from_norm(norm)
    interval = getattr(module, "field_of_values", None)
    if not callable(interval):
        return bounds
    lower, upper = interval()
    lower, upper = _number(lower, "field_of_values()"), _number(upper, "field_of_values()")
    return replace(bounds, lower=max(lower, -norm), upper=min(upper, norm))


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"its {what} returned {value!r}: a finite number is needed") from None
    if not math.isfinite(number):
        raise InputError(f"its {what} returned {number}: a finite number is needed")
    return number


def _setting(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise InputError(f"its {name} is {value}: a finite number is needed")
    return float(value)


def _require_plain(module: nn.Module) -> None:
    """Refuse what makes a module compute something else than its type says."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise InputError("it has forward hooks, which may change what it computes: remove them")
    if "forward" in vars(module):
        raise InputError("its forward was replaced on the instance")
    if parametrize.is_parametrized(module) and module.training:
        raise InputError(
            "it is parametrised and in training mode, so its weights may change between calls: call eval()"
        )


def certified_bounds(module: object) -> JacobianBounds:
    """Bounds of the Jacobian of a map at every input.

    Args:
        module: an `nn.Module`, or any object with a method `lipschitz_upper() -> float`.

    Returns:
        The bounds, with the layers they come from in `how`.

    Raises:
        NotCertifiedError: they cannot be certified; the message names the layer.
    """
    if isinstance(module, nn.Module):
        return _visit(module, "")
    kind = type(module).__name__
    try:
        declared = _declared(module)
    except InputError as refusal:
        raise NotCertifiedError(f"no certified Lipschitz constant: {kind}: {refusal}") from None
    if declared is None:
        raise NotCertifiedError(
            f"no certified Lipschitz constant: the map is a {kind}; only modules of known layers, or objects with a "
            "method lipschitz_upper(), can be certified (lipschitz_lower gives a lower bound of any map)"
        )
    return replace(declared, how=f"{kind} {declared.norm:.4g} (declared)")


def certify_injective(f: object) -> InjectivityCertificate:
    """Look for a proof that `T(x) = x + f(x)` is injective (then also bijective, with a Lipschitz inverse).

    Either a certified Lipschitz constant below 1 (Lemma 5), or a certified `lambda_min((J + J')/2) > -1` at every
    input: then `(T(x) - T(y)).(x - y) >= c |x - y|^2` with `c > 0`, and a continuous strongly monotone map of R^d is
    a bijection (Browder and Minty) even where the constant exceeds 1.

    Args:
        f: a module, an object that declares itself, or any callable (about which nothing is known).

    Returns:
        The certificate; `"unknown"` is not a claim that T folds.

    Source:
        arXiv 2508.09968, Lemma 5; G. Minty, Duke Math. J. 29 (1962), DOI 10.1215/S0012-7094-62-02933-2.
    """
    try:
        bounds = certified_bounds(f)
    except NotCertifiedError as error:
        return InjectivityCertificate("unknown", str(error))
    if bounds.norm < 1:
        return InjectivityCertificate("certified", f"Lipschitz constant at most {bounds.norm:.6g} < 1 ({bounds.how})")
    if bounds.lower > -1:
        return InjectivityCertificate(
            "certified",
            f"strongly monotone: lambda_min of the symmetric part at least {bounds.lower:.6g} > -1 ({bounds.how})",
        )
    return InjectivityCertificate(
        "unknown",
        f"the certified Lipschitz constant {bounds.norm:.6g} is not below 1, nor the certified lambda_min of the "
        f"symmetric part {bounds.lower:.6g} above -1 ({bounds.how})",
    )


# --- containers -------------------------------------------------------------------------------------------------------


@register(nn.Sequential)
def _sequential(module: nn.Sequential, visit: Visit) -> JacobianBounds:
    parts = [(child, visit(child, name)) for name, child in module.named_children()]
    acting = [(child, part) for child, part in parts if not part.reshaping]
    how = " x ".join(part.how for _, part in acting)
    if not acting:
        return JacobianBounds(1.0, 1.0, 1.0, reshaping=True)
    norm = 1.0
    for _, part in acting:
        norm = _times(norm, part.norm)
    if len(acting) == 1:
        return replace(acting[0][1], how=how)
    interval = _gradient_form(acting)
    if interval is None:
        return replace(JacobianBounds.from_norm(norm), how=how)
    return JacobianBounds(norm, *interval, how=how + " (W' s(W x + b): symmetric Jacobian)")


def _gradient_form(parts: list[tuple[nn.Module, JacobianBounds]]) -> tuple[float, float] | None:
    """Range of the symmetric Jacobian `+-W' D W` of `+-W' s(W x + b)`, if that is what the three layers are."""
    if len(parts) != 3 or not parts[1][1].elementwise:
        return None
    first, last = parts[0][0], parts[2][0]
    if not all(parametrize.type_before_parametrizations(end) is nn.Linear for end in (first, last)):
        return None
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    W, V = first.weight.detach(), last.weight.detach()
    if W.shape != V.T.shape:
        return None
    square = _times(parts[0][1].norm, parts[0][1].norm)
    slopes = parts[1][1]
    low, high = _times(min(slopes.lower, 0.0), square, -math.inf), _times(max(slopes.upper, 0.0), square)
    if torch.equal(V, W.T):
        return low, high
    return (-high, -low) if torch.equal(V, -W.T) else None


@register(Sum)
def _sum(module: Sum, visit: Visit) -> JacobianBounds:
    if any(getattr(layer, "inplace", False) for layer in module.modules()):
        raise InputError("a term works in place and may change the input of the others: use inplace=False")
    parts = [visit(term, f"terms.{k}") for k, term in enumerate(module.terms)]
    norm, lower, upper = parts[0].norm, parts[0].lower, parts[0].upper
    for part in parts[1:]:
        norm, lower, upper = _up(norm + part.norm), _down(lower + part.lower), _up(upper + part.upper)
    return JacobianBounds(norm, lower, upper, how="(" + " + ".join(part.how for part in parts) + ")")


@register(Scaled)
def _scaled(module: Scaled, visit: Visit) -> JacobianBounds:
    part, c = visit(module.module, "module"), _setting(module.factor, "factor")
    least, most = (part.lower, part.upper) if c >= 0 else (part.upper, part.lower)
    return JacobianBounds(
        _times(abs(c), part.norm),
        _times(c, least, -math.inf),
        _times(c, most),
        elementwise=part.elementwise,
        how=f"{c:g} * {part.how}",
    )


# --- linear and convolution layers ------------------------------------------------------------------------------------


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.is_complex() or not bool(torch.isfinite(weight).all()):
        raise InputError("its weight is not real and finite")
    return weight.detach().double()


@register(nn.Linear)
def _linear(module: nn.Linear, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    weight = _weight(module)
    norm = spectral_norm_bound(weight)
    if weight.shape[0] != weight.shape[1]:
        return JacobianBounds.from_norm(norm)
    eigenvalues = torch.linalg.eigvalsh((weight + weight.T) / 2)
    margin = 32 * weight.shape[0] * torch.finfo(torch.float64).eps * norm
    return JacobianBounds(norm, float(eigenvalues[0]) - margin, float(eigenvalues[-1]) + margin)


def _padding_factor(mode: str, padding: tuple[int, ...]) -> float:
    """Norm of reflecting or replicating padding: the square root of how often it repeats an entry, at worst."""
    return math.sqrt(math.prod(1 if p == 0 else 3 if mode == "reflect" else 2 * p + 1 for p in padding))


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Conv2d, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    weight = _weight(module)
    reach = [step * (k - 1) for k, step in zip(module.kernel_size, module.dilation, strict=True)]
    if module.padding == "same":
        padding = tuple(-(-r // 2) for r in reach)
    elif module.padding == "valid":
        padding = (0,) * len(reach)
    else:
        padding = tuple(int(p) for p in module.padding)
    if module.padding_mode == "circular":
        # Rows of the circulant matrix of stride 1 (on a torus whose size the stride does not divide, the polyphase
        # symbol would be wrong); more padding than "same" repeats them, at most three times.
        norm = convolution_norm_bound(weight, (1,) * len(reach), module.dilation, module.groups)
        more = [p for p, r in zip(padding, reach, strict=True) if 2 * p > r and module.padding != "same"]
        return JacobianBounds.from_norm(_times(norm, _up(math.sqrt(3 ** len(more))) if more else 1.0))
    norm = convolution_norm_bound(weight, module.stride, module.dilation, module.groups)
    if module.padding_mode == "zeros":
        return JacobianBounds.from_norm(norm)
    return JacobianBounds.from_norm(_times(norm, _up(_padding_factor(module.padding_mode, padding))))


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(module: nn.ConvTranspose2d, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    # The adjoint of a zero-padded convolution whose weight has the same layout.
    norm = convolution_norm_bound(_weight(module), module.stride, module.dilation, module.groups)
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


def _activation(module: nn.Module, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    return JacobianBounds.from_slopes(*_SLOPES[parametrize.type_before_parametrizations(module)])


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
    if not (module.threshold >= 20 and module.beta > 0):
        raise InputError(
            f"beta {module.beta}, threshold {module.threshold}: it jumps; use beta > 0 and threshold >= 20"
        )
    return JacobianBounds.from_slopes(0.0, 1.0)


@register(nn.Softmax, nn.Softmin)
def _softmax(module: nn.Softmax, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    # J = diag(p) - p p' (negated for softmin), symmetric with eigenvalues in [0, 1/2].
    low, high = (0.0, 0.5) if type(module) is nn.Softmax else (-0.5, 0.0)
    return JacobianBounds(0.5, low, high)


# --- shapes, pooling, dropout -----------------------------------------------------------------------------------------


@register(nn.Identity, nn.Flatten, nn.Unflatten)
def _reshaping(module: nn.Module, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    if getattr(module, "start_dim", 1) == 0 or getattr(module, "dim", 1) == 0:
        raise InputError("it reshapes the batch dimension, so rows are not independent")
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


@register(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _average_pool(module: nn.AvgPool2d, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    axes = _POOL_AXES[type(module)]
    kernel, stride, padding = (_axes(v, axes) for v in (module.kernel_size, module.stride, module.padding))
    fixed = getattr(module, "divisor_override", None)
    if fixed is None and (module.ceil_mode or (any(padding) and not module.count_include_pad)):
        # Weights of a window are at most 1 and sum to 1: |A|_inf = 1, |A|_1 <= windows over an entry.
        windows = math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True))
        return JacobianBounds.from_norm(_up(math.sqrt(windows)))
    weight = torch.full((1, 1, *kernel), 1 / (fixed or math.prod(kernel)), dtype=torch.float64)
    return JacobianBounds.from_norm(convolution_norm_bound(weight, stride, (1,) * axes))


@register(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _max_pool(module: nn.MaxPool2d, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    axes = _POOL_AXES[type(module)]
    kernel, stride, dilation = (_axes(v, axes) for v in (module.kernel_size, module.stride, module.dilation))
    # |max u - max v| <= |u - v| in each window, and an entry lies in this many windows.
    windows = math.prod(-(-k // s) if step == 1 else k for k, s, step in zip(kernel, stride, dilation, strict=True))
    return JacobianBounds.from_norm(_up(math.sqrt(windows)))


@register(nn.Upsample, nn.UpsamplingNearest2d)
def _upsample(module: nn.Upsample, visit: Visit) -> JacobianBounds:  # noqa: ARG001
    scale = module.scale_factor
    if module.mode != "nearest" or scale is None:
        raise InputError("only mode='nearest' with a scale_factor has a rule")
    # One number scales every axis: two for UpsamplingNearest2d, else at most three. An entry is copied scale times per
    # axis, once more where the rounded coordinate may slip.
    scales = scale if isinstance(scale, tuple) else (scale,) * (2 if type(module) is nn.UpsamplingNearest2d else 3)
    copies = math.prod(int(s) if math.log2(s).is_integer() and s >= 1 else math.ceil(s) + 1 for s in scales)
    return JacobianBounds.from_norm(_up(math.sqrt(copies)))
