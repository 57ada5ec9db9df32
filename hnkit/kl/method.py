"""What an estimator of the KL is: an object that owns its options, knows its cost, and is found by its name.

A new one is one module in `hnkit/kl/methods/`: a frozen dataclass that derives from `Estimator` (from `Probed`, if it
makes quadratic forms of random probes), with a `name`. Its fields are its options: `noise_kl(f, x, method="name",
option=...)` and `noise_kl(f, x, method=Class(option=...))` mean the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.jacobian import RowJacobian, check_finite, rows_per_pass
from hnkit.kl.estimators import MAX_STEPS, PROBES, Probe, QuadraticForm, draw_probes
from hnkit.kl.moments import Moments, Progress
from hnkit.linalg.krylov import Operator
from hnkit.maps import NoiseMap, chunked

VARIANCE_REDUCTIONS = ("none", "xtrace")
_Self = TypeVar("_Self", bound="Probed")
_Adaptive = TypeVar("_Adaptive", bound="Adaptive")


@dataclass(frozen=True)
class Run:
    """What an estimator is told besides its own options.

    Attributes:
        generator: the generator of the probes.
        lipschitz: proved Lipschitz constant of the map, or `None`.
        chunk: rows per pass through the network; `None`: chosen from d and the device.
        progress: a function that is called with (done, in all).
    """

    generator: torch.Generator | None = None
    lipschitz: float | None = None
    chunk: int | None = None
    progress: Progress | None = None


_CLASSES: dict[str, type[Estimator]] = {}


@dataclass(frozen=True)
class Estimator(ABC):
    """How E(J) is computed: the base of all methods."""

    name: ClassVar[str]
    """What `noise_kl(method=...)` calls it."""
    sees_jacobian: ClassVar[bool] = True
    """Whether it looks at J at all."""

    def __init_subclass__(cls) -> None:
        """A class with a name of its own is a method."""
        if "name" in vars(cls):
            _CLASSES[cls.name] = cls

    def __post_init__(self) -> None:
        for field in fields(self):
            check_option(field.name, getattr(self, field.name))

    @abstractmethod
    def moments(self, f: NoiseMap, x: Tensor, run: Run) -> Moments:
        """The figures of f and J at every row of x."""

    def finite_variance(self, lipschitz: float | None) -> bool:  # noqa: ARG002
        """Whether the estimate at a sample is known to have a finite variance, given a proved Lipschitz constant."""
        return True


@dataclass(frozen=True)
class Probed(Estimator):
    """The mean of quadratic forms of random probes.

    Attributes:
        probes: probes per sample.
        probe: their law, "rademacher", "gaussian" or "spherical".
    """

    probes: int = 1
    probe: Probe = "rademacher"

    def moments(self, f: NoiseMap, x: Tensor, run: Run) -> Moments:
        """Moments from quadratic forms of random probes; (sample, probe) rows go through the network in chunks."""
        n, dim = x.shape[0], x[0].numel()
        probes = self.probes
        width = self.group * max(1, (run.chunk or rows_per_pass(dim, x.device)) // self.group)
        rows = torch.arange(n, device=x.device).repeat_interleave(probes)
        forms: list[QuadraticForm] = []
        values: list[tuple[Tensor, Tensor]] = []
        num_jvp = num_vjp = done = 0
        for index, inner, points in chunked(f, x, width, rows):
            operator = RowJacobian(inner, points, samples=index)
            vectors = draw_probes(index.numel(), dim, self.probe, run.generator, x.device)
            forms.append(self.form(operator, vectors, run))
            values.append((operator.value.square().sum(1) / 2, (operator.value * points.flatten(1).double()).sum(1)))
            num_jvp += operator.num_jvp
            num_vjp += operator.num_vjp
            done += index.numel()
            if run.progress is not None:
                run.progress(done, rows.numel())

        def gather(name: str) -> Tensor:
            return torch.cat([getattr(form, name) for form in forms]).reshape(n, probes)

        l2, alignment = (torch.cat(column).reshape(n, probes)[:, 0] for column in zip(*values, strict=True))
        error = gather("value")
        check_finite(error, "the estimate of E(J)")
        return Moments(
            l2=l2,
            alignment=alignment,
            error=error.mean(1),
            trace=gather("trace").mean(1),
            square=gather("square").mean(1),
            frobenius=gather("frobenius").mean(1),
            norm=gather("norm").amax(1),
            truncation=gather("truncation").mean(1),
            bound=gather("bound").mean(1),
            spread=error.var(1) if probes > 1 else torch.full_like(l2, torch.nan),
            sign=None if forms[0].sign is None else gather("sign")[:, 0],
            num_jvp=num_jvp,
            num_vjp=num_vjp,
            probes=probes,
            steps=max(form.steps for form in forms),
        )

    @abstractmethod
    def form(self, operator: Operator, vectors: Tensor, run: Run) -> QuadraticForm:
        """One quadratic form per row of `vectors`, `(rows, d)`."""

    @property
    def group(self) -> int:
        """Probes of one sample that have to be made together."""
        return 1

    @property
    def least_probes(self) -> int:
        """Fewest probes per sample."""
        return 1

    @property
    def fixed_products(self) -> int | None:
        """Products that a row needs, where that is known without trying."""
        return None

    @property
    def pilot(self) -> Probed:
        """What finds out how many products a row needs."""
        return replace(self, probes=self.least_probes)

    def products(self, pilot: Moments, budget: int) -> int:  # noqa: ARG002
        """Products that a row is expected to need, by the pilot's figures."""
        return self.products_of(pilot.steps)

    def products_of(self, steps: int) -> int:
        """Products of one row with Krylov spaces or series of that length."""
        return steps

    def finer(self: _Self, tolerance: float) -> _Self:  # noqa: ARG002
        """The same estimator with a truncation error of at most `tolerance`, relative to `|J|_F^2 / 2`."""
        return self

    def within(self: _Self, products: int) -> _Self:  # noqa: ARG002
        """The same estimator, made to spend no more than so many products on a row."""
        return self


@dataclass(frozen=True)
class Adaptive(Probed):
    """A Krylov space or a series of given or of adaptive length.

    Attributes:
        steps: its length; `None`: adaptive, to `tolerance`.
        tolerance: relative truncation error that adaptive steps aim at.
        max_steps: the most adaptive steps.
    """

    steps: int | None = None
    tolerance: float = 1e-3
    max_steps: int = MAX_STEPS

    @property
    def fixed_products(self) -> int | None:
        """See `Probed`."""
        return None if self.steps is None else self.products_of(self.steps)

    @property
    def lengths(self) -> dict[str, Any]:
        """The options above, by name, for the function that makes the forms."""
        return {"steps": self.steps, "tolerance": self.tolerance, "max_steps": self.max_steps}

    def finer(self: _Adaptive, tolerance: float) -> _Adaptive:
        """See `Probed`."""
        return replace(self, tolerance=min(self.tolerance, tolerance))

    def within(self: _Adaptive, products: int) -> _Adaptive:
        """See `Probed`: the largest number of adaptive steps that fits."""
        if self.steps is not None:
            return self
        most = max((m for m in range(1, self.max_steps + 1) if self.products_of(m) <= products), default=1)
        return replace(self, max_steps=most)


def method_names() -> tuple[str, ...]:
    """Names of all methods."""
    from hnkit.kl import methods as methods  # importing them is what registers them

    return tuple(_CLASSES)


def estimator_for(method: str | Estimator, options: dict[str, Any]) -> Estimator:
    """The estimator that a name and options mean, or the one given.

    Options of other methods are checked and have no effect, so that one call serves several methods.

    Raises:
        InputError: no such method or option, a value out of range, or options beside an estimator that owns its own.
    """
    names = method_names()
    if isinstance(method, Estimator):
        if options:
            raise InputError(f"{', '.join(options)} beside an estimator: give {type(method).__name__}(...) its options")
        return method
    if not isinstance(method, str) or method not in _CLASSES:
        raise InputError(f"unknown method {method!r}: accepted are {', '.join(names)}, or an estimator")
    known = {field.name for kind in _CLASSES.values() for field in fields(kind)}
    for name, value in options.items():
        if name not in known:
            raise InputError(f"unknown option {name!r}: the methods' options are {', '.join(sorted(known))}")
        check_option(name, value)
    kind = _CLASSES[method]
    own = {field.name for field in fields(kind)}
    if options.get("variance_reduction", "none") != "none" and "variance_reduction" not in own:
        raise InputError(f"xtrace with method {method}: it needs arnoldi and 2 probes or more")
    return kind(**{name: value for name, value in options.items() if name in own})


def check_option(name: str, value: Any) -> None:
    """Refuse a value that the option cannot have; a name that several methods share means the same to all."""
    if name in ("probes", "steps", "max_steps", "rank", "sure"):
        check_counts(**{name: value})
    elif name in ("tolerance", "rel_error"):
        check_fractions(**{name: value})
    elif name in ("probe", "variance_reduction"):
        accepted = PROBES if name == "probe" else VARIANCE_REDUCTIONS
        if value not in accepted:
            raise InputError(f"unknown {name} {value!r}: accepted are {', '.join(accepted)}")


def check_counts(**counts: Any) -> None:
    """Refuse what is no positive whole number; `None` stands for a default."""
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 2**40):
            raise InputError(f"{name} {count!r} is not a positive whole number: give 1 or more, below 2^40")


def check_fractions(**fractions: Any) -> None:
    """Refuse what is no number between 0 and 1; `None` stands for a default."""
    for name, value in fractions.items():
        if value is not None and not (_is_number(value) and 0 < value < 1):
            raise InputError(f"{name} {value!r} is not between 0 and 1: give a relative error such as 0.01")


def check_lipschitz(value: Any) -> None:
    """Refuse what is no Lipschitz constant; `None` stands for one that is not known."""
    if value is not None and not (_is_number(value) and 0 <= value < math.inf):
        raise InputError(f"lipschitz {value!r} is no Lipschitz constant: give a finite number, 0 or more")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
