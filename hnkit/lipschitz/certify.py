"""Certificates: bounds on the Jacobian of a module that hold at every input.

For every layer a rule states `JacobianBounds`: `|J(x)|_2 <= norm`, and `lower <= S(x) <= upper` for the symmetric part
`S = (J + J')/2`. They compose over `nn.Sequential`, `Sum` and `Scaled`. Certificates of injectivity of
`T(x) = x + f(x)` follow: `norm < 1` (Lemma 5); `lower > -1`, which makes T uniformly strongly monotone; for one hidden
layer, `W V` small beside the identity (`hnkit.lipschitz.hidden`); and, almost everywhere, f bounded with
`det(I + J) > 0`.

A module of one's own takes part in one of two ways: a method `lipschitz_upper() -> float` (and, optionally,
`field_of_values() -> (lower, upper)`, `bounded() -> bool` and `oriented() -> bool`, that `det(I + J) > 0` almost
everywhere), or a rule registered for its type with `register`. Both are believed.

What is proved concerns the map of real numbers that the weights define *now*: not the rounding of its evaluation, nor
what later becomes of the weights. What makes a module compute something else than its type says is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from hnkit.errors import InputError, NotCertifiedError
from hnkit.internal.stats import rounded_down, rounded_up
from hnkit.internal.values import number
from hnkit.lipschitz.plain import (
    declaration,
    remember,
    require_plain_calls,
    require_plain_instance,
    require_plain_parts,
    require_plain_type,
)


@dataclass(frozen=True)
class JacobianBounds:
    """Bounds of the Jacobian that hold wherever the map is differentiable.

    Attributes:
        norm: `|J(x)|_2 <= norm`; also the Lipschitz constant of the map is at most `norm`.
        lower: `lambda_min((J + J')/2) >= lower`.
        upper: `lambda_max((J + J')/2) <= upper`.
        elementwise: the map acts on each entry alone (J is diagonal).
        reshaping: the map only regroups entries of a row (J is the identity).
        bounded: `|f|` stays below some number.
        oriented: `det(I + J) > 0` almost everywhere.
        bijective: `x + f(x)` is proved a bijection with a Lipschitz inverse, whatever the norm.
        how: one line that says what the bounds come from.
    """

    norm: float
    lower: float
    upper: float
    elementwise: bool = False
    reshaping: bool = False
    bounded: bool = False
    oriented: bool = False
    bijective: bool = False
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
        everywhere: whether that holds everywhere, or almost everywhere only: then eq. 53 is the KL, but no inverse of T
            is claimed.
    """

    status: Literal["certified", "unknown"]
    how: str
    everywhere: bool = True


def _require_module(value: object, what: str) -> None:
    if not isinstance(value, nn.Module):
        raise InputError(f"{what} of {type(value).__name__} {value!r:.60}: give modules (torch.nn.Module)")


class Sum(nn.Module):
    """The sum of modules of one input, `f(x) = f_1(x) + ... + f_k(x)`; `Sum(nn.Identity(), block)` is residual."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        if not modules:
            raise InputError("Sum() of no modules: give at least one")
        for term in modules:
            _require_module(term, "Sum")
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
        _require_module(module, "Scaled")
        self.module = module
        self.factor = number(factor, f"Scaled(factor={factor!r})")

    def forward(self, x: Tensor) -> Tensor:
        """The scaled module at `x`."""
        result: Tensor = self.factor * self.module(x)
        return result


@dataclass(frozen=True)
class Visit:
    """The walk over a module tree, as a rule sees it: `visit(child, name)` gives the bounds of a child.

    Attributes:
        path: names from the root to the module of the rule.
        owned: nobody else holds the input of this module, so that it may be overwritten. The input of the whole map
            is not: `x + f(x)` would add what f left of x.
    """

    path: str = ""
    owned: bool = False

    def __call__(self, child: nn.Module, name: str, *, owned: bool = False) -> JacobianBounds:
        """Bounds of a child that is called as often as this is; `owned` says so of its input."""
        return _visit(child, Visit(f"{self.path}.{name}" if self.path else name, owned))


Rule = Callable[[Any, Visit], JacobianBounds]
RuleOf = TypeVar("RuleOf", bound=Rule)

_RULES: dict[type, Rule] = {}


def register(*kinds: type[nn.Module]) -> Callable[[RuleOf], RuleOf]:
    """Declare the rule of one or more module types (these exact types, not their subclasses).

    The rule is `rule(module, visit) -> JacobianBounds`; `visit(child, name)` gives the bounds of a child. It is
    believed: a wrong rule gives wrong certificates. A rule raises `InputError` with a reason to refuse a setting.

    Args:
        kinds: the module types. Their methods are noted: where one is replaced later, the rule no longer holds.

    Returns:
        A decorator that returns the rule unchanged.
    """

    def add(rule: RuleOf) -> RuleOf:
        for kind in kinds:
            remember(kind)
            _RULES[kind] = rule
        return rule

    return add


def rules() -> tuple[type, ...]:
    """The types that have a rule."""
    return tuple(_RULES)


def up(value: float) -> float:
    """The next float above, so that a rounded product or sum of bounds stays a bound."""
    return math.nextafter(value, math.inf) if value != 0 else 0.0


def down(value: float) -> float:
    """The next float below; 0 stays 0."""
    return -up(-value)


def times(a: float, b: float, toward: float = math.inf) -> float:
    """A product rounded up (down for `toward=-inf`) unless it is exact; one that is not 0 never becomes 0."""
    if a == 0 or b == 0:
        return 0.0
    return a * b if 1.0 in (a, b) else math.nextafter(a * b, toward)


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


def _visit(module: nn.Module, visit: Visit) -> JacobianBounds:
    if not isinstance(module, nn.Module):
        raise NotCertifiedError(
            f"no certified Lipschitz constant: '{visit.path}' is a {type(module).__name__}, not a module"
        )
    kind = parametrize.type_before_parametrizations(module)
    label = f"{kind.__name__}" + (f" '{visit.path}'" if visit.path else "")
    try:
        require_plain_instance(module)
        bounds = _declared(module)
        if bounds is not None:
            bounds = replace(bounds, how=f"{label} {rounded_up(bounds.norm)} (declared)")
        else:
            if kind not in _RULES:
                raise InputError(_reason(kind.__name__))
            require_plain_type(module, kind)
            bounds = _consistent(_RULES[kind](module, visit))
            if getattr(module, "inplace", False) and not (visit.owned or bounds.reshaping):
                raise InputError("it works in place and may change the input of the map: use inplace=False")
        require_plain_parts(module)
    except NotCertifiedError:  # a child's, with the path of its layer
        raise
    except InputError as refusal:  # what rules and declarations raise, with the reason
        raise NotCertifiedError(f"no certified Lipschitz constant: layer {label}: {refusal}") from None
    return bounds if bounds.how else replace(bounds, how=f"{label} {rounded_up(bounds.norm)}")


def _consistent(bounds: object) -> JacobianBounds:
    """What a rule returned, if it can be true."""
    if not isinstance(bounds, JacobianBounds):
        raise InputError(f"its rule returned {bounds!r:.60}: give JacobianBounds")
    if not (math.isfinite(bounds.norm) and math.isfinite(bounds.lower) and math.isfinite(bounds.upper)):
        raise InputError(f"its bound {bounds.norm:.3g} is not finite: products of norms left the floating-point range")
    if not (bounds.norm >= 0 and bounds.lower <= bounds.upper):
        raise InputError(
            f"its rule returned norm {bounds.norm:g}, range [{bounds.lower:g}, {bounds.upper:g}]: impossible"
        )
    return bounds


def _declared(module: object) -> JacobianBounds | None:
    """What the object says about itself, if it does."""
    method = declaration(module, "lipschitz_upper")
    if method is None:
        return None
    norm = _finite(method(), "lipschitz_upper()")
    if norm < 0:
        raise InputError(f"its lipschitz_upper() returned {norm:g}: a Lipschitz constant is at least 0")
    bounded, oriented = (_declared_fact(module, name) for name in ("bounded", "oriented"))
    bounds = replace(JacobianBounds.from_norm(norm), bounded=bounded, oriented=oriented)
    method = declaration(module, "field_of_values")
    if method is None:
        return bounds
    interval = method()
    try:
        lower, upper = interval
    except (TypeError, ValueError):
        raise InputError(f"its field_of_values() returned {interval!r:.60}: a pair (lower, upper) is needed") from None
    lower, upper = _finite(lower, "field_of_values()"), _finite(upper, "field_of_values()")
    if lower > upper:
        raise InputError(f"its field_of_values() returned ({lower:g}, {upper:g}): the lower end comes first")
    if lower > norm or upper < -norm:
        raise InputError(
            f"its field_of_values() returned ({lower:g}, {upper:g}), beside a lipschitz_upper() of {norm:g}: the two "
            "contradict each other"
        )
    return replace(bounds, lower=max(lower, -norm), upper=min(upper, norm))


def _declared_fact(module: object, name: str) -> bool:
    method = declaration(module, name)
    fact = False if method is None else method()
    if not isinstance(fact, bool):
        raise InputError(f"its {name}() returned {fact!r:.60}: True or False is needed")
    return fact


def _finite(value: Any, what: str) -> float:
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError):
        result = math.nan
    if not math.isfinite(result):
        raise InputError(f"its {what} returned {value!r:.60}: a finite number is needed")
    return result


def certified_bounds(module: object) -> JacobianBounds:
    """Bounds of the Jacobian of a map at every input.

    Args:
        module: an `nn.Module`, or any object with a method `lipschitz_upper() -> float`.

    Returns:
        The bounds, with the layers they come from in `how`.

    Raises:
        NotCertifiedError: they cannot be certified; the message names the layer.
    """
    try:
        require_plain_calls()
    except InputError as refusal:
        raise NotCertifiedError(f"no certified Lipschitz constant: {refusal}") from None
    if isinstance(module, nn.Module):
        return _visit(module, Visit())
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
    return replace(declared, how=f"{kind} {rounded_up(declared.norm)} (declared)")


def certify_injective(f: object) -> InjectivityCertificate:
    """Look for a proof that `T(x) = x + f(x)` is injective (then also bijective, with a Lipschitz inverse).

    A certified Lipschitz constant below 1 (Lemma 5); or a certified `lambda_min((J + J')/2) > -1` at every input: then
    `(T(x) - T(y)).(x - y) >= c |x - y|^2` with `c > 0`, and a continuous strongly monotone map of R^d is a bijection
    (Browder and Minty) even where the constant exceeds 1; or, for `V s(W x + b)`, `I + D W V` diagonally dominant for
    all slopes D. A bounded f with `det(I + J) > 0` almost everywhere makes T of degree one, so injective almost
    everywhere (`everywhere` is then `False`): enough for eq. 53 to be the KL.

    Args:
        f: a module, an object that declares itself, or any callable (about which nothing is known).

    Returns:
        The certificate; `"unknown"` is not a claim that T folds.

    Source:
        arXiv 2508.09968, Lemma 5; G. Minty, Duke Math. J. 29 (1962), DOI 10.1215/S0012-7094-62-02933-2;
        `proofs/hidden_dominance`, `proofs/folding_entropy`.
    """
    try:
        bounds = certified_bounds(f)
    except NotCertifiedError as error:
        return InjectivityCertificate("unknown", str(error))
    if bounds.norm < 1:
        norm = rounded_up(bounds.norm, 6, below=1.0)
        return InjectivityCertificate("certified", f"Lipschitz constant at most {norm} < 1 ({bounds.how})")
    if bounds.lower > -1:
        lower = rounded_down(bounds.lower, 6, above=-1.0)
        return InjectivityCertificate(
            "certified", f"strongly monotone: lambda_min of the symmetric part at least {lower} > -1 ({bounds.how})"
        )
    if bounds.bijective:
        return InjectivityCertificate("certified", f"one hidden layer, W V diagonally dominated ({bounds.how})")
    if bounds.bounded and bounds.oriented:
        return InjectivityCertificate(
            "certified",
            f"almost everywhere: f is bounded, so that T has degree one, and det(I + J) > 0 ({bounds.how})",
            everywhere=False,
        )
    return InjectivityCertificate(
        "unknown",
        f"the certified Lipschitz constant {rounded_up(bounds.norm, 6)} is not below 1, nor the certified lambda_min "
        f"of the symmetric part {rounded_down(bounds.lower, 6)} above -1 ({bounds.how})",
    )
