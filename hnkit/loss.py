"""The one training loss of noise hypernetworks: KL term minus reward over temperature, per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.injection import Generators, NoiseInjection, fresh_noise
from hnkit.internal.seeds import check_generator
from hnkit.internal.values import number
from hnkit.jacobian import (
    Acquaintances,
    RowJacobian,
    check_batch,
    check_for_loss,
    dense_jacobian,
    evaluate,
    recording,
    rows_per_pass,
)
from hnkit.kl.estimators import PROBES, Probe, dot, draw_probes, ratio
from hnkit.linalg.krylov import ArnoldiProcess, KrylovSpace, phi_corner, spectral_norm
from hnkit.logdet import log_det_error
from hnkit.maps import NoiseMap, at_rows, slices

KLTerm = Literal["l2", "second-order", "arnoldi", "exact"]
KL_TERMS: tuple[KLTerm, ...] = ("l2", "second-order", "arnoldi", "exact")
Reduction = Literal["sum", "mean"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean")
RewardGradient = Literal["pathwise", "score-function"]
REWARD_GRADIENTS: tuple[RewardGradient, ...] = ("pathwise", "score-function")


@dataclass(frozen=True)
class LossTerms:
    """The loss of every row, with its parts; `total == kl - reward / alpha` row by row.

    Attributes:
        total: `(n,)`; its mean is what to minimise.
        kl: `(n,)`, the KL term as it enters `total`: nats, or nats per dimension under the reduction "mean".
        reward: `(n,)`, the reward as it was returned; with score-function gradients the mean over the draws of injected
            noise, whose gradient is that estimate, whatever the reward's own.
        x_hat: `(n, *shape)`, the moved noise: `x + f(x)`, or the first draw of `a (x + f(x)) + sqrt(1 - a^2) eps`.
        solve_error: `(n,)`, estimated relative error of the linear solve behind the gradient of E(J); 0 where there
            is none.
    """

    total: Tensor
    kl: Tensor
    reward: Tensor
    x_hat: Tensor
    solve_error: Tensor


@dataclass(frozen=True)
class NoiseLoss:
    """`KL term - r(g(x_hat)) / alpha` per sample, at least in float32; `x_hat = x + f(x)` unless noise is injected.

    The KL term is `|f|^2/2` ("l2", eq. 11 of the paper), plus an unbiased estimate of `tr(J^2)/2` ("second-order"), or
    of `E(J)` up to the truncation of a Krylov space ("arnoldi"), or `E(J)` itself ("exact": d products per sample, for
    small d). "arnoldi" and "second-order" compute value and gradient apart: the value is the estimator's, the gradient
    that of `<w, dJ v>` with `(I + J^T) w = J^T v` (w = J^T v for second order), whose mean over probes is
    `tr[J (I + J)^-1 dJ] = dE(J)`. That needs `I + J` invertible, not a norm below 1: rows with a local norm of 1 or
    more are trained on as the others, only without a bound of the truncation. Backward passes are reverse over reverse.

    With `injection` the generator is given `x_hat = a (x + f(x)) + sqrt(1 - a^2) eps` with fresh `eps`, and the KL
    term is the proved bound `a^2 |f|^2 / (2 (1 - a^2))`, at `a^2 = 1/2` the L2 term. Given x, `x_hat` is Gaussian of
    mean `a (x + f(x))`, so that a reward needs no gradient ("score-function"): for draws `k = 1..m` with rewards `r_k`,
    `(a / sqrt(1 - a^2)) mean_k (r_k - mean_{j != k} r_j) <eps_k, df>` is an unbiased estimate of `d E[r]`.

    Args:
        kl: "l2", "second-order", "arnoldi" or "exact".
        alpha: temperature, positive.
        reduction: "sum" over dimensions (the theory), or "mean" (the KL term divided by d, as in the published code).
        probes: probes per sample of "second-order" and "arnoldi".
        steps: Krylov steps of "arnoldi"; `None`: adaptive, to `tolerance`.
        tolerance: relative residual that adaptive steps aim at.
        max_steps: limit of the adaptive steps.
        probe: law of the probes.
        injection: how much noise is injected, in training as in use; `None`: none. It goes with `kl="l2"` alone.
        draws: draws of injected noise for each sample, each a pass of the generator: 2 or more with score-function
            gradients, whose baseline they are; 1 with pathwise ones, for which more do not earn their passes.
        reward_gradient: "pathwise": through reward and generator; "score-function": from the values of the reward
            alone, with a leave-one-out baseline over the draws.

    Raises:
        InputError: an argument is out of range.

    Source: arXiv 2508.09968, eq. 8, 11 and 65; `proofs/gradient_surrogate`, `proofs/injected_noise`,
    `proofs/score_function` (Williams 1992, doi 10.1007/BF00992696; the leave-one-out baseline: Kool et al. 2019).
    """

    kl: KLTerm = "l2"
    alpha: float = 1.0
    reduction: Reduction = "sum"
    probes: int = 1
    steps: int | None = None
    tolerance: float = 1e-3
    max_steps: int = 32
    probe: Probe = "rademacher"
    injection: NoiseInjection | None = None
    draws: int = 1
    reward_gradient: RewardGradient = "pathwise"
    _known: Acquaintances = field(default_factory=Acquaintances, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kl not in KL_TERMS:
            raise InputError(f"unknown kl {self.kl!r}: accepted are {', '.join(KL_TERMS)}")
        if self.reduction not in REDUCTIONS:
            raise InputError(f"unknown reduction {self.reduction!r}: accepted are {', '.join(REDUCTIONS)}")
        if self.probe not in PROBES:
            raise InputError(f"unknown probe {self.probe!r}: accepted are {', '.join(PROBES)}")
        for name in ("alpha", "tolerance"):
            number(getattr(self, name), f"{name} {getattr(self, name)!r}")
        if not 0 < self.alpha < math.inf:
            raise InputError(f"alpha {self.alpha!r} is not a positive number: give a temperature above 0")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance {self.tolerance!r} is not in (0, 1): give a relative residual such as 1e-3")
        if self.reward_gradient not in REWARD_GRADIENTS:
            accepted = ", ".join(REWARD_GRADIENTS)
            raise InputError(f"unknown reward_gradient {self.reward_gradient!r}: accepted are {accepted}")
        for name in ("probes", "steps", "max_steps", "draws"):
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise InputError(f"{name} {count!r} is not a positive whole number: give 1 or more")
        if self.injection is not None and self.kl != "l2":
            raise InputError(f"kl {self.kl!r} with injected noise: its KL is bounded by the L2 term alone, use kl 'l2'")
        if self.reward_gradient == "pathwise" and self.draws > 1:
            raise InputError(
                f"draws {self.draws} with reward_gradient 'pathwise', which takes one, for more do not earn their "
                "passes: give draws=1, or reward_gradient 'score-function', whose baseline they are"
            )
        if self.injection is None and self.reward_gradient != "pathwise":
            raise InputError(
                f"reward_gradient {self.reward_gradient!r} without injected noise, which it is about: give "
                "injection=NoiseInjection(0.5)"
            )
        if self.reward_gradient == "score-function" and self.draws < 2:
            raise InputError("reward_gradient 'score-function' with one draw has no baseline: give draws=2 or more")

    def effective_alpha(self, dim: int) -> float:
        """The temperature of the tilted law that this loss aims at, for noise of `dim` entries.

        Dividing the KL term by d is, up to the factor d of the whole loss, the sum with temperature `alpha / d`.
        """
        return self.alpha if self.reduction == "sum" else self.alpha / dim

    def __call__(
        self,
        f: NoiseMap,
        x: Tensor,
        generate: Callable[[Tensor], Tensor],
        reward: Callable[[Tensor], Tensor],
        *,
        generator: Generators = None,
    ) -> LossTerms:
        """Evaluate the loss on a batch; `terms.total.mean().backward()` gives its gradient in f's parameters.

        At the first call with a map (for a function: with its code) the map is tried on a few rows: whether its rows
        are independent and, unless `kl` is "l2", whether its derivatives are those of finite differences, first in
        x, then of the products in the parameters, which are moved for a moment and put back bit for bit. Second
        derivatives of the loss exist for "l2" alone; the others refuse them.

        Args:
            f: the noise hypernetwork, batch-first, rows independent.
            x: `(n, *shape)` base noise; no gradient flows into it.
            generate: noise `(n, *shape)` to outputs, differentiable; it is called once for each draw, with all rows.
            reward: outputs to `(n,)`, differentiable unless its gradient is that of the score function.
            generator: the generator of the probes, or of the injected noise, for which it may be one for each row.

        Raises:
            InputError: a map or reward of the wrong shape, a map whose rows depend on each other (batch normalisation
                in training mode) or whose derivatives are wrong; in a backward pass: a second derivative.
            NonFiniteError: f or a product is not finite; the sample is named.
        """
        check_batch(x)
        x = x.detach()
        if self._known.meet(f, x.dtype):
            check_for_loss(f, x, products=self.kl != "l2")
        if self.injection is not None:
            return self._with_injection(self.injection, f, x, generate, reward, generator)
        if isinstance(generator, Sequence) and not isinstance(generator, str):
            raise InputError("a generator for each row is for injected noise: give one generator for the probes")
        check_generator(generator)
        dim = x[0].numel()
        solve_error = torch.zeros(x.shape[0], device=x.device)
        if self.kl == "l2":
            delta = evaluate(f, x)
            extra: Tensor | float = 0.0
        else:
            operator = RowJacobian(f, x, twice=True)
            delta = operator.output
            if self.kl == "exact":
                extra = _exact_error(operator, f, x)
            else:
                extra, solve_error = self._probed_error(operator, f, x, generator)
                extra = _Once.apply(extra, *operator.leaves())  # type: ignore[no-untyped-call]
        moved = delta.to(torch.promote_types(delta.dtype, torch.float32))
        term = moved.flatten(1).square().sum(1) / 2 + extra
        if self.reduction == "mean":
            term = term / dim
        x_hat = x + delta.to(torch.promote_types(x.dtype, delta.dtype))
        score = _scores(reward, generate(x_hat), len(x))
        return LossTerms(term - score / self.alpha, term, score, x_hat, solve_error)

    def _with_injection(
        self,
        injection: NoiseInjection,
        f: NoiseMap,
        x: Tensor,
        generate: Callable[[Tensor], Tensor],
        reward: Callable[[Tensor], Tensor],
        generator: Generators,
    ) -> LossTerms:
        """The terms where noise is injected: a bound of the KL, and the reward of its draw, or the mean of several."""
        delta = injection.clipped(evaluate(f, x))
        delta = delta.to(torch.promote_types(torch.promote_types(x.dtype, delta.dtype), torch.float32))
        term = injection.nats(delta)
        if self.reduction == "mean":
            term = term / x[0].numel()
        noises = [fresh_noise(x, generator) for _ in range(self.draws)]
        moved = [injection.moved(x, delta, eps) for eps in noises]
        if self.reward_gradient == "pathwise":
            score = _scores(reward, generate(moved[0]), len(x))
        else:
            with torch.no_grad():
                scores = torch.stack([_scores(reward, generate(x_hat.detach()), len(x)) for x_hat in moved])
            # r_k - mean_{j != k} r_j = m / (m - 1) (r_k - mean_j r_j), and the baseline of a draw never saw its eps.
            advantage = (scores - scores.mean(0)) * (self.draws / (self.draws - 1))
            along = torch.stack([(eps * delta).flatten(1).sum(1) for eps in noises])
            surrogate = (injection.kept / injection.injected) * (advantage * along).mean(0)
            score = scores.mean(0) + (surrogate - surrogate.detach())
        return LossTerms(term - score / self.alpha, term, score, moved[0], torch.zeros(len(x), device=x.device))

    def _probed_error(
        self, operator: RowJacobian, f: NoiseMap, x: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Estimate of E(J) per row, carrying the surrogate's gradient, and the relative error of its solve."""
        n = x.shape[0]
        if self.probes > 1:
            index = torch.arange(n, device=x.device).repeat_interleave(self.probes)
            operator = RowJacobian(*at_rows(f, x, index), samples=index, twice=True)
        probe = draw_probes(operator.rows, operator.dim, self.probe, generator, x.device)
        if self.kl == "second-order":
            weight = operator.vjp(probe)
            surrogate = dot(operator.vjp(weight, create_graph=True), probe)
            value = surrogate.detach() / 2
            error = torch.zeros_like(value)
        else:
            value, weight, error = self._value_and_weight(operator, probe)
            surrogate = dot(operator.vjp(weight, create_graph=True), probe)
        with recording():
            joined = value + (surrogate - surrogate.detach())
        return joined.reshape(n, self.probes).mean(1), error.reshape(n, self.probes).amax(1)

    def _value_and_weight(self, operator: RowJacobian, probe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`v^T phi(J) v`, the solution of `(I + J^T) w = J^T v` by GMRES, and its relative error, from one space."""
        process = ArnoldiProcess(operator, probe)
        limit = min(operator.dim, self.max_steps if self.steps is None else self.steps)
        while process.steps < limit:
            process.advance()
            if not bool(process.alive.any()):
                break
            if self.steps is None and bool((_gmres(process.space)[1] <= self.tolerance).all()):
                break
        space = process.space
        H = space.hessenberg[:, :-1]
        norm = spectral_norm(space.hessenberg)
        inside = norm < 1
        corner = phi_corner(H, norm)
        coefficients, residual = _gmres(space)
        weight = torch.bmm(coefficients[:, None, :], space.basis[:, :-1])[:, 0]
        # sigma_min(I + J) >= 1 - |J|_2; the norm known here is a lower bound, and an expansive row has only the small
        # system's own smallest singular value to go by: either way an estimate.
        margin = torch.where(inside, 1 - norm, _smallest_singular_value(space.hessenberg))
        return space.scale**2 * corner, weight, residual / margin


def _smallest_singular_value(hessenberg: Tensor) -> Tensor:
    """Of `I + H` with its last row, `(rows,)`."""
    system = hessenberg.clone()
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    values: Tensor = torch.linalg.svdvals(system)
    return values[:, -1]


def _gmres(space: KrylovSpace) -> tuple[Tensor, Tensor]:
    """Least-squares solution of `(I + J^T) w = J^T v` in the Krylov space.

    Returns:
        The coefficients `(rows, m)` of w in the basis, and `|residual| / |J^T v|`, `(rows,)`.
    """
    H = space.hessenberg
    system = H.clone()
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    right = H[:, :, 0] * space.scale[:, None]
    # A row whose space is exhausted has zero basis vectors: its columns are unit vectors, and their coefficients 0.
    Q, R = torch.linalg.qr(system)
    projected = torch.einsum("rkm,rk->rm", Q, right)
    coefficients = torch.linalg.solve_triangular(R, projected[:, :, None], upper=True)[:, :, 0]
    residual = right - torch.einsum("rkm,rm->rk", system, coefficients)
    return coefficients, ratio(residual.norm(dim=1), right.norm(dim=1))


def _scores(reward: Callable[[Tensor], Tensor], outputs: Tensor, rows: int) -> Tensor:
    """The reward of every output, in float32 at least."""
    score = reward(outputs)
    if not isinstance(score, Tensor) or score.shape != (rows,):
        shape = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise InputError(f"the reward returned {shape} for {rows} outputs: it must return ({rows},)")
    return score.to(torch.promote_types(score.dtype, torch.float32))


def _exact_error(operator: RowJacobian, f: NoiseMap, x: Tensor) -> Tensor:
    """E(J) of every row, from dense Jacobians; differentiable in the parameters of f, in bounded memory.

    The value needs no graph. Its gradient is `sum_k d<M^T e_k, J e_k>`, `M = J (I + J)^-1`: the backward pass rebuilds
    the graphs of a few basis vectors at a time and lets each go.
    """
    J = dense_jacobian(f, x)
    value: Tensor = _ExactError.apply(f, x, J, *operator.leaves())  # type: ignore[no-untyped-call]
    return value


class _Once(torch.autograd.Function):
    """The identity, with a gradient that must not be differentiated again.

    torch's `once_differentiable` speaks up only where the incoming gradient has a graph of its own; here every
    second derivative in the parameters passes a node that raises.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *leaves: Tensor) -> Tensor:
        ctx.leaves = leaves
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (_guarded(grads[0], ctx.leaves), *[None] * len(ctx.leaves))


class _Refusal(torch.autograd.Function):
    """The identity, whose derivative in anything is refused."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *leaves: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        raise InputError(
            "the loss was differentiated twice: the gradient of its KL term is a surrogate's, whose own derivative "
            "means nothing; use kl='l2', or first derivatives only"
        )


def _guarded(gradient: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """A gradient, which refuses to be differentiated in `leaves` if a graph of it is being recorded."""
    if not torch.is_grad_enabled():
        return gradient
    guarded: Tensor = _Refusal.apply(gradient, *leaves)  # type: ignore[no-untyped-call]
    return guarded


class _ExactError(torch.autograd.Function):
    """E(J) with the gradient of its parameters recomputed, chunk by chunk, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, f: NoiseMap, x: Tensor, J: Tensor, *leaves: Tensor) -> Tensor:
        ctx.f, ctx.leaves = f, leaves
        ctx.save_for_backward(x, J)
        return log_det_error(J)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, J = ctx.saved_tensors
        n, dim = J.shape[:2]
        identity = torch.eye(dim, dtype=J.dtype, device=J.device)
        # Row k of w is M^T e_k = (I + J^T)^-1 J^T e_k, weighted by what the loss does with this sample.
        w = torch.linalg.solve(identity + J.mT, J.mT).mT * grads[0][:, None, None]
        rows = torch.arange(n, device=x.device).repeat_interleave(dim)
        columns = torch.arange(dim, device=x.device).repeat(n)
        total: list[Tensor | None] = [None] * len(ctx.leaves)
        for part in slices(n * dim, rows_per_pass(dim, x.device)):
            index, column = rows[part], columns[part]
            operator = RowJacobian(*at_rows(ctx.f, x, index), samples=index, twice=True)
            pulled = operator.vjp(w[index, column], create_graph=True)
            if not pulled.requires_grad:
                continue
            weight = torch.zeros_like(pulled).scatter_(1, column[:, None], 1.0)
            shares = torch.autograd.grad(pulled, ctx.leaves, weight, allow_unused=True, retain_graph=True)
            total = [
                share if old is None else old if share is None else old + share
                for old, share in zip(total, shares, strict=True)
            ]
        return (None, None, None, *(part if part is None else _guarded(part, ctx.leaves) for part in total))
