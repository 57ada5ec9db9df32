"""A map and everything measured on it, once, so that each check is a few lines.

Quantities are computed when first asked for, from one set of noise samples; those that need dense Jacobians use as
many of the samples as `DENSE_ENTRIES` and `DENSE_PRODUCTS` allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from hnkit.errors import (
    ExpansiveMapError,
    InputError,
    MissingDerivativeError,
    NonFiniteError,
    NotApplicable,
    NotCertifiedError,
)
from hnkit.injection import InjectedBound, NoiseInjection, injected_bound
from hnkit.internal.kept import Keep, kept_property, not_kept
from hnkit.internal.seeds import generator_for
from hnkit.internal.workers import ALONE, Workers, all_made
from hnkit.jacobian import RowJacobian, check_finite, check_map, dense_jacobian, rows_per_pass
from hnkit.kl.divergence import KLEstimate, Method, noise_kl, proved_lipschitz
from hnkit.kl.estimate import joined_estimates, joined_moments
from hnkit.kl.method import Probed, Run, estimator_for
from hnkit.kl.moments import Moments
from hnkit.kl.plan import Plan, check_sizes, planned
from hnkit.kl.verdict import PROBES, L2Verdict, VerdictRows, l2_verdict, verdict_of, verdict_rows
from hnkit.linalg.matrices import MatrixNumbers, bound_sides
from hnkit.lipschitz.certify import certified_bounds
from hnkit.lipschitz.local import LipschitzEstimate, lipschitz_lower, lipschitz_upper, local_lipschitz, local_norms
from hnkit.maps import NoiseMap, at_rows, chunked, map_numbers, working_type

DENSE_DIM = 1024
"""Above so many dimensions a map is measured by stochastic methods unless told otherwise."""

DENSE_ENTRIES = 4 * 10**7
"""Entries of dense Jacobians that the checks hold at a time, at most."""

DENSE_PRODUCTS = 2**14
"""Products that the checks spend on dense Jacobians of their own, at most; a quarter of them for a map of images."""

VERDICT_SAMPLES = 16
"""Samples from which it is told whether the L2 term is good enough: a handful of products each."""

BLOCKS = 16
"""Blocks of samples that `verify-bound` shares out over its processes; what each is depends on the samples alone."""

_OF_ALL_METHODS = ("form", "lipschitz", "chunk", "compile", "certify", "progress")
"""Options of `noise_kl` that are of no method."""

_NORM_ERROR = 1e-3
"""Relative error of `local_lipschitz` that is allowed for where a norm is compared with 1."""


@dataclass(frozen=True)
class RowStatistics:
    """What the dense Jacobians of `m` samples tell; every field `(m,)`, float64, nats where it is a bound.

    `left` and `right` hold the two sides of every bound of `hnkit.bounds.BOUNDS`, NaN where its hypothesis is not met.
    """

    error: Tensor
    spectral: Tensor
    trace: Tensor
    trace_square: Tensor
    frobenius: Tensor
    norm: Tensor
    least_symmetric: Tensor
    skew: Tensor
    sign: Tensor
    left: Mapping[str, Tensor]
    right: Mapping[str, Tensor]

    @property
    def contracting(self) -> Tensor:
        """Rows whose local norm is below 1, where the series bounds apply."""
        return self.norm < 1


@dataclass
class MeasuredMap:
    """A map with the noise it is measured on; what is asked for is computed once and kept.

    Args:
        name: the name that reports list the map under.
        f: batch-first map, rows independent.
        x: `(n, *shape)` draws of `N(0, I)`.
        seed: every random probe is a function of it.
        method: the method of `noise_kl`.
        options: further options of `noise_kl`.
        module: the module that a Lipschitz certificate may walk through; `None`: `f` itself.
        smooth: whether `f` has no kinks, so that finite differences of it converge everywhere.
        continuous: whether `f` is known to be so, as the optimal map of a problem is.
        certifiable: whether its Lipschitz constant is known to have a proof, so that a certificate is to be found.
        ascent_steps: steps of the gradient ascent behind the Lipschitz estimate.
        prompts: the prompt of each row, within which mean shifts are taken; `None`: all rows have one.
        probes: the generator of the probes of `noise_kl`; `None`: one derived from the seed.
        fallback: the method that takes over where `method` meets local norms that it cannot take; `None`: none.
        injection: how the map is deployed, where noise is injected; everything else is of `x + f(x)` without it.
        workers: the processes that share out the samples; all of them ask for the same things in the same order.
        blocks: how many blocks the samples are shared out in.
        keep: what is dear to compute is taken from here, if it is known there, and left here.
        keep_block: the same for what is made of each block of samples, by whichever process.
    """

    name: str
    f: NoiseMap
    x: Tensor
    seed: int = 0
    method: str = "exact"
    options: Mapping[str, Any] = field(default_factory=dict)
    module: NoiseMap | None = None
    smooth: bool = True
    continuous: bool = False
    certifiable: bool = False
    ascent_steps: int = 25
    prompts: Sequence[str] | None = None
    probes: torch.Generator | None = None
    fallback: str | None = None
    injection: NoiseInjection | None = None
    workers: Workers = ALONE
    blocks: int = 1
    keep: Keep = not_kept
    keep_block: Keep = not_kept

    def validate(self) -> None:
        """Refuse a map that is no batch-first, row-wise, deterministic, differentiable, finite function."""
        check_map(self.f, self.x)

    @property
    def dim(self) -> int:
        """Noise dimensions d."""
        return self.x[0].numel()

    @property
    def resolution(self) -> float:
        """Relative rounding error that is allowed for, by the type that the map computes in."""
        return {torch.float64: 1e-9, torch.float32: 1e-4}.get(working_type(self.f, self.value), 2e-2)

    def generator(self, purpose: str) -> torch.Generator:
        """A generator for one purpose, a function of the seed alone."""
        return generator_for(self.seed, f"verify/{purpose}")

    @cached_property
    def estimate(self) -> KLEstimate:
        """`noise_kl` in the Stein form; under a budget it may stop after the first samples.

        Raises:
            ExpansiveMapError: the method needs local norms below 1, and met others.
        """
        found = self._estimate
        self.method = found.method
        return found

    @kept_property
    def _estimate(self) -> KLEstimate:
        generator = self.probes or self.generator("kl")
        try:
            return self._kl(self.method, generator)
        except ExpansiveMapError:
            if self.fallback is None:
                raise
            return self._kl(self.fallback, generator)

    def _kl(self, method: str, generator: torch.Generator) -> KLEstimate:
        named, options = cast("Method", method), dict(self.options)
        if self.blocks == 1:
            return noise_kl(self.f, self.x, method=named, generator=generator, check=False, **options)
        samples, pilots = len(self.x), (0, 0)
        sizes: dict[str, Any] = {name: options.pop(name) for name in ("rel_error", "budget") if name in options}
        if any(size is not None for size in sizes.values()):
            common = {name: options.pop(name) for name in _OF_ALL_METHODS if name in options}
            plan = self._plan(method, options, sizes, common)
            named, samples, pilots, options = plan.estimator, plan.samples, (plan.num_jvp, plan.num_vjp), common

        def one(f: NoiseMap, x: Tensor, index: Tensor) -> KLEstimate:
            own = self.generator(f"kl/{int(index[0])}")
            return noise_kl(f, x, method=named, generator=own, check=False, **options)

        parts = self._of_blocks(f"kl by {method}", samples, one)
        found = joined_estimates(parts, map_numbers(self.f, len(self.x)))
        moments = found.parts
        spent = replace(moments, num_jvp=moments.num_jvp + pilots[0], num_vjp=moments.num_vjp + pilots[1])
        return replace(found, parts=spent)

    def _plan(self, method: str, options: dict[str, Any], sizes: Mapping[str, Any], common: Mapping[str, Any]) -> Plan:
        """How many samples and probes, by pilots that are shared out as well."""
        estimator = estimator_for(method, options)
        check_sizes(estimator, sizes.get("rel_error"), sizes.get("budget"))
        assert isinstance(estimator, Probed)  # as was checked
        lipschitz = common.get("lipschitz")
        if lipschitz is None and common.get("certify", True):
            lipschitz = proved_lipschitz(self.f)

        def pilot(tried: Probed, index: Tensor) -> Moments:
            def one(f: NoiseMap, x: Tensor, part: Tensor) -> Moments:
                own = self.generator(f"pilot/{int(part[0])}")
                return tried.moments(f, x, Run(own, lipschitz, common.get("chunk")))

            return joined_moments(self._of_blocks(f"pilot of {method} at {int(index[0])}", index, one))

        return planned(self.x, estimator, pilot, **sizes)

    def _of_blocks(
        self, name: str | None, samples: int | Tensor, work: Callable[[NoiseMap, Tensor, Tensor], Any]
    ) -> list[Any]:
        """What `work` makes of each block of the first samples, or of those of an index; a block by one process, once.

        `work` takes the map and the noise of its samples, and their numbers. What has a name is kept, block by block,
        under the name and the block's first number. An error that names a sample would name it by its place in the
        block: the samples are then taken together.
        """
        index = torch.arange(samples, device=self.x.device) if isinstance(samples, int) else samples
        blocks = torch.split(index, max(1, -(-len(index) // self.blocks)))

        def one(part: Tensor) -> Any:
            def make() -> Any:
                return _moved(work(*at_rows(self.f, self.x, part), part), torch.device("cpu"))

            return make() if name is None else self.keep_block(f"{name} from {int(part[0])}", make)

        try:
            return [_moved(made, self.x.device) for made in all_made(blocks, self.workers, one)]
        except ExpansiveMapError:
            raise
        except InputError:
            return [work(*at_rows(self.f, self.x, index), index)]

    @property
    def stein(self) -> KLEstimate:
        """The estimate, as a check or a figure asks for it.

        Raises:
            NotApplicable: the method needs local norms below 1, and they are not, by their own measurement.
        """
        try:
            return self.estimate
        except ExpansiveMapError as reason:
            if float(self.norms.max()) >= 1 - _NORM_ERROR:
                raise NotApplicable(str(reason)) from None
            raise

    @property
    def dense_count(self) -> int:
        """How many of the samples get dense Jacobians besides those of `noise_kl`."""
        products = DENSE_PRODUCTS if self.dim <= 16 else DENSE_PRODUCTS // 4
        return min(len(self.x), max(1, min(DENSE_ENTRIES // self.dim, products) // self.dim))

    @kept_property
    def change(self) -> Tensor:
        """The exact integrand in the change-of-variables form, computed as such, at the first samples."""

        def one(f: NoiseMap, x: Tensor, _: Tensor) -> Tensor:
            return noise_kl(f, x, method="exact", form="change-of-variables", check=False).per_sample

        return torch.cat(self._of_blocks("change of variables", self.dense_count, one))

    @cached_property
    def change_from_stein(self) -> Tensor:
        """The same integrand from that of `stein` and `x . f - tr J`, for as many samples as `stein` has."""
        count = len(self.stein.per_sample)
        return self.stein.per_sample + self.alignment[:count] - self.traces[:count]

    @cached_property
    def error(self) -> Tensor:
        """E(J) per sample as `noise_kl` sees it, for as many samples as `stein` has."""
        return self.stein.per_sample - self.half_square[: len(self.stein.per_sample)]

    @cached_property
    def value(self) -> Tensor:
        """`f(x)`, `(n, *shape)`, in passes of bounded memory."""

        def one(f: NoiseMap, x: Tensor, _: Tensor) -> Tensor:
            return torch.cat([inner(points) for _, inner, points in chunked(f, x, self.pass_rows)])

        with torch.no_grad():
            return torch.cat(self._of_blocks(None, len(self.x), one))

    @property
    def pass_rows(self) -> int:
        """How many samples go through the network together."""
        return rows_per_pass(self.dim, self.x.device)

    def first(self, count: int) -> tuple[NoiseMap, Tensor]:
        """The map and the noise of the first `count` samples."""
        return at_rows(self.f, self.x, count)

    @cached_property
    def injected(self) -> InjectedBound:
        """The bound of the KL of the deployed law; `NotApplicable` where no noise is injected."""
        if self.injection is None:
            raise NotApplicable("no noise is injected")
        return injected_bound(self.value, self.injection, lipschitz=self.certified_constant)

    @cached_property
    def half_square(self) -> Tensor:
        """`|f(x)|^2 / 2` per sample, float64."""
        return 0.5 * self.value.double().flatten(1).square().sum(1)

    @cached_property
    def alignment(self) -> Tensor:
        """`x . f(x)` per sample, float64."""
        return (self.x.double() * self.value.double()).flatten(1).sum(1)

    @cached_property
    def traces(self) -> Tensor:
        """`tr J(x)` per sample: exact where the dense Jacobians hold all samples, else one probe `v . J' v` each."""
        rows = self.rows_or_none
        if rows is not None and len(rows.trace) == len(self.x):
            return rows.trace
        return self._probed[0]

    @property
    def probed_frobenius(self) -> Tensor:
        """An unbiased estimate of `|J(x)|_F^2` per sample, from one probe each."""
        return self._probed[1]

    @kept_property
    def _probed(self) -> tuple[Tensor, Tensor]:
        """`v . J' v` and `|J' v|^2` for one Rademacher probe per sample."""
        probes = torch.randint(0, 2, (len(self.x), self.dim), generator=self.generator("trace")).double() * 2 - 1
        probes = probes.to(self.x.device)

        def one(f: NoiseMap, x: Tensor, numbers: Tensor) -> Tensor:
            parts = []
            for index, inner, points in chunked(f, x, self.pass_rows):
                operator, probe = RowJacobian(inner, points, samples=numbers[index]), probes[numbers[index]]
                pulled = operator.vjp(probe)
                parts.append(torch.stack([(pulled * probe).sum(1), pulled.square().sum(1)]))
            return torch.cat(parts, 1)

        traces, squares = torch.cat(self._of_blocks("trace", len(self.x), one), 1)
        return traces, squares

    @kept_property
    def rows_or_none(self) -> RowStatistics | None:
        """Statistics of the dense Jacobians of the first samples; `None` in too many dimensions."""
        if self.dim > DENSE_DIM:
            return None
        width = max(1, 2**23 // self.dim**2)

        def one(f: NoiseMap, x: Tensor, _: Tensor) -> list[RowStatistics]:
            return [_statistics(dense_jacobian(inner, points)) for _, inner, points in chunked(f, x, width)]

        parts = [part for block in self._of_blocks("rows", self.dense_count, one) for part in block]
        return RowStatistics(**{name: _joined([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    @property
    def rows(self) -> RowStatistics:
        """Statistics of dense Jacobians; a check that needs them does not apply in too many dimensions."""
        if self.rows_or_none is None:
            raise NotApplicable(f"needs dense Jacobians: d = {self.dim} is above {DENSE_DIM}")
        return self.rows_or_none

    @kept_property
    def norms(self) -> Tensor:
        """`|J(x)|_2` per sample, by Golub-Kahan bidiagonalisation, `(n,)`.

        Raises:
            NotApplicable: the map has no `J v` products.
        """

        def one(f: NoiseMap, x: Tensor, index: Tensor) -> Tensor:
            whole = len(index) == len(self.x)
            return local_lipschitz(f, x, generator=self.generator("norms" if whole else f"norms/{int(index[0])}"))

        try:
            return torch.cat(self._of_blocks("norms", len(self.x), one))
        except MissingDerivativeError as reason:
            raise NotApplicable(str(reason)) from None

    def coarse_norms(self, count: int) -> tuple[Tensor, Tensor, int, float]:
        """`|J(x)|_2` of the first samples, their relative residuals, products spent and the residual aimed at.

        Three digits are enough for quantiles; a network in bfloat16 does not give as many.
        """

        def one(f: NoiseMap, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor, int, float]:
            found = local_norms(f, x, tolerance=1e-3)
            return found.value, found.residual, found.products, found.tolerance

        values, residuals, products, goals = zip(*self._of_blocks("coarse norms", count, one), strict=True)
        return torch.cat(values), torch.cat(residuals), sum(products), max(goals)

    @kept_property
    def lower(self) -> LipschitzEstimate:
        """The ascended Lipschitz estimate, a lower bound of the constant; the sampled one of a map without ascent."""
        start = self.norms.topk(min(len(self.x), 4)).indices
        f, x = at_rows(self.f, self.x, start)
        try:
            return lipschitz_lower(f, x, ascent_steps=self.ascent_steps)
        except (MissingDerivativeError, NonFiniteError):  # no second derivative, or it overflows on the way up
            return lipschitz_lower(f, x, ascent_steps=0)

    @cached_property
    def certificate(self) -> LipschitzEstimate | str:
        """The certified Lipschitz constant, or why there is none."""
        try:
            return lipschitz_upper(self.f if self.module is None else self.module)
        except NotCertifiedError as reason:
            return str(reason)

    @kept_property
    def l2_verdict(self) -> L2Verdict | None:
        """Whether the L2 term is good enough, from the first samples; `None` where one sample is all there is."""
        if len(self.x) < 2:
            return None
        if self.blocks == 1:
            return l2_verdict(*self.first(VERDICT_SAMPLES), generator=self.generator("l2 verdict"))

        def one(f: NoiseMap, x: Tensor, index: Tensor) -> VerdictRows:
            return verdict_rows(f, x, PROBES, self.generator(f"l2 verdict/{int(index[0])}"))

        count = min(len(self.x), VERDICT_SAMPLES)
        return verdict_of(VerdictRows.joined(self._of_blocks("l2 verdict", count, one)), self.dim)

    @property
    def certified_constant(self) -> float | None:
        """The certified Lipschitz constant, `None` if there is none."""
        return None if isinstance(self.certificate, str) else self.certificate.value

    @cached_property
    def bounded(self) -> bool:
        """Whether a certificate says that f is bounded."""
        try:
            return certified_bounds(self.f if self.module is None else self.module).bounded
        except NotCertifiedError:
            return False


def _moved(value: Any, device: torch.device) -> Any:
    """The same on another device: a tensor, or what holds some."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    if isinstance(value, Mapping):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{entry.name: _moved(getattr(value, entry.name), device) for entry in fields(value)})
    return value


def _joined(parts: list[Any]) -> Any:
    """Tensors of successive rows as one; mappings of them key by key."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return {key: _joined([part[key] for part in parts]) for key in parts[0]}


def _statistics(J: Tensor) -> RowStatistics:
    check_finite(J, "the Jacobian")  # LAPACK's eigenvalues of NaN end the process
    skew = (J - J.mT) / 2
    eigenvalues = torch.linalg.eigvals(J)
    numbers = MatrixNumbers(J)
    left, right = bound_sides(numbers)
    return RowStatistics(
        error=numbers.error,
        spectral=(eigenvalues.real - (1 + eigenvalues).abs().log()).sum(1),
        trace=J.diagonal(dim1=1, dim2=2).sum(1),
        trace_square=numbers.trace_square,
        frobenius=numbers.frobenius,
        norm=numbers.norm,
        least_symmetric=numbers.least,
        skew=skew.square().sum((1, 2)).sqrt(),
        sign=torch.linalg.slogdet(torch.eye(J.shape[-1], dtype=J.dtype, device=J.device) + J).sign,
        left=left,
        right=right,
    )
