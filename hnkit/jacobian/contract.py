"""Whether a map is one: batch-first, row by row, deterministic, and with the derivative that autograd reports.

Derivatives are compared with differences of the map itself, at steps from small to large and at the precision at which
the map computes: a step counts only where the differences to the left and to the right agree with each other, so
that kinks, curvature and rounding never read as a wrong derivative.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hnkit.errors import InputError, MissingDerivativeError
from hnkit.internal.seeds import kept_generators
from hnkit.jacobian.operator import (
    RowJacobian,
    check_batch,
    check_finite,
    evaluate,
    math_attention,
    recording,
    require_differentiable_again,
)
from hnkit.maps import ConditionedMap, NoiseMap, select_rows

_COMPARISONS = 8  # medians over this many random directions decide
_EXPONENTS = (1 / 3, 1 / 6, 1 / 2, 2 / 3, 5 / 6)  # steps are powers of the unit of rounding; 1/3 serves smooth maps
_HALF = (torch.float16, torch.bfloat16)
_HALF_UNIT = 2.0**-11  # rounding from this unit on hides what differences could tell
_ROWS_TWICE = 2  # second derivatives are costly: rows they are tried on


def check_map(f: NoiseMap, x: Tensor, *, rows: int = 8, jvp: bool = True) -> None:
    """Refuse a map that is no batch-first, row-wise, deterministic, differentiable `f(x) -> delta`.

    Costs about ten evaluations on the first `rows` rows of `x`; leaves the global random states as they were.

    Args:
        f: the map.
        x: `(n, *shape)` points to try it at.
        rows: the most rows that are used.
        jvp: also compare `J v` with `J^T u`; for maps of which only vector-Jacobian products are asked, give False.

    Raises:
        InputError: the map raises, returns another shape or type, writes into its input, is not a function of it
            (dropout), mixes rows or depends on a row's position or on how many there are (batch normalisation in
            training mode, a condition without `select(index)`), is not differentiable, or has another derivative than
            autograd reports for it (a detached part, a straight-through estimator, a wrong backward).
        NonFiniteError: f(x) or its derivative is not finite; the message names the sample.
    """
    points, index = _points(f, x, rows)
    with _trying(points):
        whole, precision = _check_rows(f, points, index)
        _check_derivative(whole, points, index, precision, jvp)


def check_for_loss(f: NoiseMap, x: Tensor, *, products: bool) -> None:
    """Refuse a map that a training loss would be silently wrong for.

    Args:
        f: the map.
        x: `(n, *shape)`; its first rows are used.
        products: the loss differentiates products with the Jacobian: f is compared with itself called twice, `J^T u`
            with differences of f, and the derivative of `u^T J v` in the parameters with differences of it.

    Raises:
        InputError: as `check_map`; or the map cannot be differentiated twice.
        NonFiniteError: f(x) or its derivative is not finite; the message names the sample.
    """
    points, index = _points(f, x, 4)
    with _trying(points):
        whole, precision = _check_rows(f, points, index, random=not products)
        if products:
            _check_derivative(whole, points, index, precision, jvp=False)
            part = index[:_ROWS_TWICE]
            _check_second_derivative(select_rows(f, part), points[:_ROWS_TWICE], precision)


class Acquaintances:
    """The maps that were tried already, by network or by the code of a function; a copy knows none."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, set[object]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Acquaintances], tuple[()]]:
        return Acquaintances, ()

    def meet(self, f: NoiseMap, state: object = None) -> bool:
        """Whether `f` is met for the first time in this state, or in training mode after evaluation mode."""
        inner = f.hypernetwork if isinstance(f, ConditionedMap) else f
        key = getattr(inner, "__code__", inner)
        try:
            states = self._known.setdefault(key, set())
        except TypeError:  # neither hashable nor weakly referable: met anew each time
            return True
        mark = (state, getattr(inner, "training", None))
        new = mark not in states
        states.add(mark)
        return new


@contextmanager
def _trying(points: Tensor) -> Iterator[None]:
    """Keep the global random states, and say what a map raised in one line, with its cause."""
    try:
        with kept_generators(), _uncompiled():
            yield
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:  # the user's map may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the map failed on input {tuple(points.shape)}: {type(error).__name__}: {reason}") from error


def _uncompiled() -> AbstractContextManager[None]:
    """Inside, nothing that was compiled runs as such, and nothing is compiled.

    A check calls a map in more ways than its use does: with other rows, with and without gradients, under modes. Each
    would be compiled anew, and beyond a limit torch lets what it has compiled fall back to eager mode for good.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _points(f: NoiseMap, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    check_batch(x)
    if not callable(f):
        raise InputError(f"the map is {type(f).__name__}: give a callable f(x) -> delta")
    index = torch.arange(min(rows, x.shape[0]), device=x.device)
    if index.numel() == 1:
        index = index.repeat(2)
    return x.detach()[index], index


def _check_rows(f: NoiseMap, points: Tensor, index: Tensor, *, random: bool = False) -> tuple[NoiseMap, float]:
    """The map of the rows `index` and the unit of rounding it computes in, if it is a function of each row alone.

    `random`: a map may use torch's random numbers; they are then the same at every call.
    """
    whole = select_rows(f, index)
    seed = torch.initial_seed()

    def call(g: NoiseMap, at: Tensor) -> Tensor:
        if random:
            torch.manual_seed(seed)
        with torch.no_grad():
            return evaluate(g, at)

    kept = points.clone()
    with _Precision() as seen:
        first = call(whole, points)
    if not torch.equal(points, kept):
        raise InputError("the map writes into its input: let it work on a copy, x.clone()")
    check_finite(first.flatten(1), "f(x)", index)
    precision = seen.unit(points, first)
    if not _same(first, call(whole, points)):
        raise InputError(
            "the map returns different values for the same x: switch dropout off (eval mode) or fix its randomness"
        )
    changed = points.clone()
    changed[-1] = 0.5 - changed[-1]
    if not _same(first[:-1], call(whole, changed)[:-1]):
        raise InputError(
            "the map couples rows: changing one row changes others (batch normalisation in training mode?); rows "
            "must be independent, call eval() or use another normalisation"
        )
    if random and not _same(first, _unseeded(whole, points)):
        return whole, precision  # other rows get other random numbers: nothing more to compare
    back = index.flip(0)
    if not _same(first, call(select_rows(f, back), points.flip(0)).flip(0)):
        raise InputError(
            "the map depends on the position of a row: if it closes over per-row conditions, give it a method "
            "select(index) that returns the map of those rows"
        )
    alone = call(select_rows(f, index[:1]), points[:1])
    if not _same(first[:1], alone, loss_of_digits=max(1e-8, 16 * precision)):
        raise InputError(
            "the map couples rows: its value at a row depends on how many rows there are; rows must be independent"
        )
    return whole, precision


def _unseeded(f: NoiseMap, points: Tensor) -> Tensor:
    with torch.no_grad():
        return evaluate(f, points)


def _same(a: Tensor, b: Tensor, loss_of_digits: float = 0.0) -> bool:
    """Equal up to rounding; evaluations of one batch size run the same kernels."""
    a, b = a.detach(), b.detach()  # views of parameters keep their graph without recording
    scale = max(float(a.abs().max()), float(b.abs().max()))
    tolerance = max(1e-10 if a.dtype == torch.float64 else 2e-3, loss_of_digits)
    return float((a.double() - b.double()).abs().max()) <= tolerance * scale


class _Watching(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """A look at every operation of an evaluation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to shield a mode from it: seconds, once a process


class _Precision(_Watching):  # type: ignore[misc, no-untyped-call]
    """Notes the floating-point types that an evaluation passes through, inside closures and under autocast too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._units: set[float] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.ndim and value.is_floating_point():
                self._units.add(_unit(value))
        return result

    def unit(self, *values: Tensor) -> float:
        """The coarsest unit of rounding seen."""
        return max(self._units | {_unit(value) for value in values})


class _Lifted(_Watching):  # type: ignore[misc, no-untyped-call]
    """Computes in single precision what a map computes in half precision, so that differences of it mean something."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._lift, (args, kwargs or {}))
        return func(*args, **kwargs)

    @staticmethod
    def _lift(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in _HALF:
            return value.float()
        return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value


def _lifted(f: NoiseMap, points: Tensor, value: Tensor) -> tuple[NoiseMap, Tensor, Tensor] | None:
    """A half-precision map in single precision, with its points and its value there; `None` if it is another map."""

    def inner(x: Tensor) -> Tensor:
        with _Lifted():  # type: ignore[no-untyped-call]
            return f(x)

    start = points.float()
    try:
        with torch.no_grad():
            single = evaluate(inner, start).double().flatten(1)
    except Exception:  # noqa: BLE001 - a map may insist on its precision; it is then not compared
        return None
    close = float((single - value).norm()) <= 0.1 * float(value.norm())
    return (inner, start, single) if close else None


def _unit(value: Tensor) -> float:
    unit = torch.finfo(value.dtype).eps
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if value.dtype == torch.float32 and value.is_cuda and (matmul or convolution):
        return 2.0**-10
    return unit


@dataclass(frozen=True)
class _Side:
    """Changes of scalars over a step to one side, per unit of step: what was found, and what the derivative claims."""

    found: Tensor
    claimed: Tensor


@dataclass(frozen=True)
class _Change:
    """Both sides, and the error to expect in what was found from rounding; `(count,)` each."""

    right: _Side
    left: _Side
    rounding: Tensor


@dataclass(frozen=True)
class _Verdict:
    """`agrees`, or `wrong` by the share `difference`; neither of the two where differences cannot tell."""

    agrees: bool
    wrong: bool
    difference: float = 0.0
    flat: bool = False


def _verdict(changes_at: Callable[[float], _Change], unit: float, tolerance: float) -> _Verdict:
    """Compare a reported derivative with differences, at one step after another until one agrees.

    The residuals of the two sides, `r = found - claimed`, have a common part where the derivative is wrong; curvature,
    kinks and rounding make them differ from each other. A derivative is wrong if no step agrees with it, and either
    two steps contradict it or one by a quarter of its size.
    """
    wrong: list[_Verdict] = []
    for exponent in _EXPONENTS:
        change = changes_at(unit**exponent)
        right, left = change.right.found - change.right.claimed, change.left.found - change.left.claimed
        common, apart = float((right + left).abs().median()) / 2, float((right - left).abs().median()) / 2
        sides = change.right, change.left
        size = max(float(values.abs().median()) for side in sides for values in (side.found, side.claimed))
        rounding = float(change.rounding.median())
        if not math.isfinite(common + apart + size + rounding):
            continue
        if common <= tolerance * size and rounding <= size / 4:
            return _Verdict(agrees=True, wrong=False)
        if common > tolerance * size + 3 * apart + rounding:
            flat = not any(bool(side.found.any()) for side in sides)
            wrong.append(_Verdict(agrees=False, wrong=True, difference=common / size, flat=flat))
    if len(wrong) < 2 and not any(verdict.difference > 0.25 for verdict in wrong):
        return _Verdict(agrees=False, wrong=False)
    return _Verdict(False, True, max(verdict.difference for verdict in wrong), any(verdict.flat for verdict in wrong))


def _check_derivative(f: NoiseMap, points: Tensor, index: Tensor, unit: float, jvp: bool) -> None:
    """`v^T (J^T u)` against differences of `u^T f` along v, and against `u^T (J v)`."""
    operator = RowJacobian(f, points, samples=index)
    generator = torch.Generator().manual_seed(0)
    scale = max(1.0, float(points.double().square().mean().sqrt()))
    repeats = -(-_COMPARISONS // points.shape[0])

    def draw() -> Tensor:
        return torch.randn(operator.rows, operator.dim, generator=generator, dtype=torch.float64).to(points.device)

    directions = [(draw(), draw() * scale) for _ in range(repeats)]
    pulled = [operator.vjp(u) for u, _ in directions]

    function, start, value, tolerance, reported = f, points, operator.value, max(5e-3, math.sqrt(unit)), unit
    if unit >= _HALF_UNIT:
        lifted = _lifted(f, points, value)
        if lifted is None:
            return
        (function, start, value), tolerance, unit = lifted, 0.25, torch.finfo(torch.float32).eps

    def changes_at(step: float) -> _Change:
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        claimed: tuple[list[Tensor], list[Tensor]] = ([], [])
        for (u, v), gradient in zip(directions, pulled, strict=True):
            for side, sign in enumerate((1, -1)):
                moved = start + (sign * step * v).to(start).reshape(start.shape)
                change = (moved.double() - start.double()).flatten(1)
                with torch.no_grad():
                    difference = evaluate(function, moved).double().flatten(1) - value
                found[side].append(sign * (u * difference).sum(1) / step)
                claimed[side].append(sign * (gradient * change).sum(1) / step)
        rounding = torch.cat([(2 * unit / step + 4 * reported) * (u * value).norm(dim=1) for u, _ in directions])
        right, left = (_Side(torch.cat(a), torch.cat(b)) for a, b in zip(found, claimed, strict=True))
        return _Change(right, left, rounding)

    verdict = _verdict(changes_at, unit, tolerance)
    if verdict.wrong and verdict.flat:
        raise InputError(
            "the map is a staircase with the gradient of something else (a straight-through estimator?): its "
            "derivative is not that of the map, so neither the KL nor a Jacobian exists; use a smooth map"
        )
    if verdict.wrong:
        raise InputError(
            f"autograd's derivative of the map is wrong by {100 * verdict.difference:.0f} % against differences of it: "
            "look for detach(), no_grad(), autograd.grad without create_graph, numpy, or a wrong backward in a part of "
            "it"
        )
    if jvp:
        _check_products(operator, directions, pulled, reported)


def _check_products(
    operator: RowJacobian, directions: Sequence[tuple[Tensor, Tensor]], pulled: Sequence[Tensor], unit: float
) -> None:
    """`u^T (J v) = v^T (J^T u)`, where the map can be differentiated in the way that `J v` needs."""
    try:
        pushed = [operator.jvp(v) for _, v in directions]
    except MissingDerivativeError:
        return
    forward = torch.cat([(u * product).sum(1) for (u, _), product in zip(directions, pushed, strict=True)])
    reverse = torch.cat([(gradient * v).sum(1) for (_, v), gradient in zip(directions, pulled, strict=True)])
    size = max(float(forward.abs().median()), float(reverse.abs().median()))
    difference = float((forward - reverse).abs().median())
    # denormal products have no digits to agree in
    underflow = directions[0][0].shape[1] * torch.finfo(forward.dtype).smallest_normal
    if difference > min(0.3, 30 * math.sqrt(unit)) * size + underflow:
        raise InputError(
            f"J v and J^T u of the map disagree, u.(J v) != v.(J^T u), by {100 * difference / size:.0f} %: its "
            "forward-mode or second derivative is wrong (detach(), autograd.grad or a numpy backward in a part of it?);"
            " mend it, or choose a method that needs vector-Jacobian products only, such as arnoldi"
        )


def _check_second_derivative(f: NoiseMap, points: Tensor, unit: float) -> None:
    """The derivative of `v^T J^T u` in the parameters of f against differences of it.

    In half precision rounding hides them, and only functions that say so are recognised. Where the first derivative in
    the parameters already is another one (quantised weights with a straight-through gradient, say), it was meant so,
    and nothing is said.
    """
    operator = RowJacobian(f, points, twice=True)
    leaves = operator.leaves()
    try:
        with recording(), math_attention():
            require_differentiable_again(operator.pull(torch.ones_like(operator.value), create_graph=True))
    except RuntimeError as error:
        raise InputError(_not_twice(str(error).splitlines()[0])) from error
    if not leaves or unit >= _HALF_UNIT:
        return
    generator = torch.Generator().manual_seed(1)

    def draw(like: Tensor, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    trials = []
    for _ in range(_COMPARISONS):
        u, v = draw(operator.value), draw(operator.value)
        shift = [draw(leaf, float(leaf.detach().abs().mean()) or leaf.numel() ** -0.5) for leaf in leaves]
        with recording():
            scalars = (u * operator.output.flatten(1)).sum(), (v * operator.vjp(u, create_graph=True)).sum()
        trials.append(_Trial(u, v, shift, [_gradient(scalar, leaves) for scalar in scalars]))
    known: dict[float, tuple[_Change, _Change]] = {}

    def changes_at(step: float, order: int) -> _Change:
        if step not in known:
            known[step] = _parameter_changes(f, points, leaves, trials, step, unit)
        return known[step][order]

    tolerance = max(5e-3, math.sqrt(unit))
    first, second = (_verdict(partial(changes_at, order=order), unit, tolerance) for order in (0, 1))
    if second.wrong and not first.wrong:
        raise InputError(_not_twice(f"off by {100 * second.difference:.0f} % against differences"))


@dataclass(frozen=True)
class _Trial:
    """Two vectors, a direction in the parameters, and the gradients of `u^T f` and `v^T J^T u` in them."""

    u: Tensor
    v: Tensor
    shift: list[Tensor]
    gradients: list[list[Tensor]]


def _gradient(scalar: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not scalar.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(scalar, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(found, leaves, strict=True)]


def _parameter_changes(
    f: NoiseMap, points: Tensor, leaves: Sequence[Tensor], trials: Sequence[_Trial], step: float, unit: float
) -> tuple[_Change, _Change]:
    """Changes of `u^T f` and of `v^T J^T u` over a step in the parameters, summed over the rows."""

    def scalars(trial: _Trial) -> Tensor:
        operator = RowJacobian(f, points)
        return torch.stack([(trial.u * operator.value).sum(), (trial.v * operator.vjp(trial.u)).sum()])

    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    claimed: tuple[list[Tensor], list[Tensor]] = ([], [])
    rounding = []
    for trial in trials:
        here = RowJacobian(f, points)
        terms = trial.u * here.value, trial.v * here.vjp(trial.u)
        base = torch.stack([term.sum() for term in terms])
        rounding.append(torch.stack([2 * unit * term.norm() / step for term in terms]))
        for side, sign in enumerate((1, -1)):
            with _moved(leaves, trial.shift, sign * step) as moves:
                found[side].append(sign * (scalars(trial) - base) / step)
            sums = [sum((g.double() * m).sum() for g, m in zip(parts, moves, strict=True)) for parts in trial.gradients]
            claimed[side].append(sign * torch.stack([torch.as_tensor(total) for total in sums]) / step)
    columns = [torch.stack(rows).T for rows in (*found, *claimed, rounding)]
    first, second = (_Change(_Side(a, c), _Side(b, d), e) for a, b, c, d, e in zip(*columns, strict=True))
    return first, second


@contextmanager
def _moved(leaves: Sequence[Tensor], shift: Sequence[Tensor], step: float) -> Iterator[list[Tensor]]:
    """Move parameters, give how far they went, and put them back bit for bit; graphs that hold them stay valid."""
    kept = [leaf.detach().clone() for leaf in leaves]
    try:
        for leaf, direction in zip(leaves, shift, strict=True):
            leaf.data.add_((step * direction).to(leaf))
        yield [leaf.detach().double() - old.double() for leaf, old in zip(leaves, kept, strict=True)]
    finally:
        for leaf, old in zip(leaves, kept, strict=True):
            leaf.data.copy_(old)


def _not_twice(reason: str) -> str:
    return (
        f"the map's vector-Jacobian products have a wrong derivative in its parameters ({reason}): this KL term needs "
        "it; use kl='l2', or a backward of differentiable operations on tensors from save_for_backward"
    )
