"""The checks of `verify-bound` on problems whose tilted law is measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hnkit.checks.check import Finding, Registry, confidence_radius, mean_finding, worst
from hnkit.checks.differences import explained_by_steps
from hnkit.checks.measured_problem import MeasuredProblem
from hnkit.errors import NonFiniteError, NotApplicable
from hnkit.internal.stats import mean_and_stderr
from hnkit.jacobian import dense_jacobian
from hnkit.kl.divergence import noise_kl
from hnkit.loss import KLTerm, NoiseLoss
from hnkit.maps import NoiseMap
from hnkit.tilt import NoiseLaw, log_standard_normal, optimality_gap

TOY_CHECKS = Registry()

_EXACT = 1e-8


# --- the tilted laws --------------------------------------------------------------------------------------------


@TOY_CHECKS.add("log-z-two-routes", "log Z* by the main and by an independent route", proof="prop_2_objective")
def log_z_two_routes(measured: MeasuredProblem) -> Finding:
    """Closed form or quadrature against the problem's second route, within that route's own error."""
    expected, error = measured.problem.log_z_check()
    return Finding(measured.problem.log_z(), expected, error + 1e-9 * (1 + abs(expected)))


def _importance_weights(measured: MeasuredProblem, outputs: Tensor) -> tuple[Tensor, float]:
    """`exp(r(y)/alpha - log Z*)` of base outputs, and how many equally weighted samples they are worth."""
    logs = measured.log_tilt(outputs)
    if bool((logs.isnan() | (logs == math.inf)).any()):
        raise NonFiniteError("r(y)/alpha - log Z* is NaN or infinite at an output of base noise")
    weights = logs.exp()
    # of the weights over the largest, since all of them, or their squares, may underflow
    effective = float(torch.exp(2 * logs.logsumexp(0) - (2 * logs).logsumexp(0))) if bool(weights.any()) else 0.0
    if effective < 50:  # a strong tilt: all weights underflow, or one of them is everything
        raise NotApplicable(f"only {effective:.0f} effective samples: the tilt is too strong for base samples")
    return weights, effective


@TOY_CHECKS.add(
    "log-z-sampling",
    "E[exp(r(g(x))/α - log Z*)] = 1 under base noise",
    proof="prop_2_objective",
    kind="statistical",
)
def log_z_sampling(measured: MeasuredProblem) -> Finding:
    """The importance weights of the tilt have mean one."""
    weights, effective = _importance_weights(measured, measured.problem.generate(measured.noise("weights")))
    return mean_finding(weights, 1.0, floor=1e-12, note=f"{effective:.0f} effective of {len(weights)} samples")


@TOY_CHECKS.add(
    "tilted-noise-density",
    "log p0*(x) = log p0(x) + r(g(x))/α - log Z* (eq. 5)",
    proof="prop_4_noise_objective",
)
def tilted_noise_density(measured: MeasuredProblem) -> Finding:
    """The largest deviation over samples of base and of tilted noise."""
    measured.need("log_p0_star")
    x = torch.cat([measured.x, measured.tilted_noise])
    expected = log_standard_normal(x) + measured.log_tilt(measured.problem.generate(x))
    return _largest(measured.problem.log_p0_star(x) - expected, 1e-7, expected)


@TOY_CHECKS.add(
    "tilted-output-density",
    "log p*(y) = log p_base(y) + r(y)/α - log Z* (eq. 3)",
    proof="prop_2_objective",
)
def tilted_output_density(measured: MeasuredProblem) -> Finding:
    """The largest deviation over outputs of base and of tilted noise."""
    measured.need("log_p_star", "log_p_base")
    y = measured.problem.generate(torch.cat([measured.x, measured.tilted_noise]))
    expected = measured.problem.log_p_base(y) + measured.log_tilt(y)
    return _largest(measured.problem.log_p_star(y) - expected, 1e-7, expected)


@TOY_CHECKS.add(
    "theorem-3-pushforward",
    "g_# p0* = p* (Theorem 3, part 1)",
    proof="theorem_3_pushforward",
    kind="statistical",
)
def theorem_3_pushforward(measured: MeasuredProblem) -> Finding:
    """Test functions of g(x), x ~ p0*, against their means under eq. 3, by reweighting base outputs."""
    base = measured.problem.generate(measured.noise("pushforward/base", 4 * measured.samples))
    weights, _ = _importance_weights(measured, base)
    steered = measured.problem.generate(measured.tilted_noise)
    return _same_law(measured, steered, base, weights)


@TOY_CHECKS.add(
    "output-sampler",
    "samples of p* follow p_base exp(r/α)/Z*",
    proof="theorem_3_pushforward",
    kind="statistical",
)
def output_sampler(measured: MeasuredProblem) -> Finding:
    """Test functions of the output sampler against g of tilted noise."""
    measured.need("sample_p_star")
    sampled = measured.problem.sample_p_star(measured.samples, measured.generator("p*"))
    steered = measured.problem.generate(measured.tilted_noise)
    return _same_law(measured, sampled, steered, None)


@TOY_CHECKS.add(
    "theorem-3-minimiser",
    "p0* minimises KL(q || p0) among all q with g_# q = p* (Theorem 3, part 2)",
    proof="theorem_3_minimiser",
)
def theorem_3_minimiser(measured: MeasuredProblem) -> Finding:
    """The least KL among the rivals that the problem knows, above that of p0*."""
    rivals = _rivals(measured)
    nearest = -worst(*(-law.kl for law in rivals))
    least = measured.problem.kl_optimal()
    names = ", ".join(f"{law.name} {law.kl:.4g}" for law in rivals)
    # Strictly above: the minimiser is unique.
    return Finding(nearest - least, 1e-6, 0.0, ">=", f"p0* {least:.4g}; rivals: {names} nats")


@TOY_CHECKS.add(
    "theorem-3-rivals",
    "every rival law of the noise has the output law p*",
    proof="theorem_3_minimiser",
    kind="statistical",
)
def theorem_3_rivals(measured: MeasuredProblem) -> Finding:
    """Test functions of g of each rival against g of p0*; the worst of them."""
    steered = measured.problem.generate(measured.tilted_noise)
    findings = []
    for law in _rivals(measured):
        y = measured.problem.generate(law.sample(measured.samples, measured.generator(f"rival/{law.name}")))
        findings.append(_same_law(measured, y, steered, None))
    return min(findings, key=lambda finding: finding.slack if finding.slack == finding.slack else -math.inf)


@TOY_CHECKS.add(
    "control-reduction",
    "the value α log E[exp(r(X₁)/α) | X₀ = x] of the one-step control problem is r(g(x)), and tilts p0 to p0*",
    proof="control_reduction",
)
def control_reduction(measured: MeasuredProblem) -> Finding:
    """The value function of a nearly deterministic step, by Gauss-Hermite, against the tilt of the noise law."""
    measured.need("log_p0_star")
    x = measured.x[:512]
    problem = measured.problem
    y = problem.generate(x)
    direction = torch.randn(y.shape, dtype=torch.float64, generator=measured.generator("control"))
    nodes, weights = _gauss_hermite(9)
    sigma = 1e-5
    rewards = torch.stack([problem.reward(y + sigma * node * direction) for node in nodes])
    exponent = rewards / problem.alpha + weights.log()[:, None]
    value = problem.alpha * torch.logsumexp(exponent, 0)
    expected = problem.alpha * (problem.log_p0_star(x) - log_standard_normal(x) + problem.log_z())
    # The statement holds almost everywhere: rows whose step crosses a jump of the reward are not counted.
    smooth = ~(rewards.max(0).values - rewards.min(0).values >= 1e-2)  # a NaN is no jump: it stays, and fails
    if not bool(smooth.any()):
        raise NotApplicable("every step crosses a jump of the reward")
    return _largest((value - expected)[smooth], 1e-5, expected[smooth])


# --- the objectives ---------------------------------------------------------------------------------------------


@TOY_CHECKS.add(
    "proposition-2",
    "KL(q || p*) = KL(q || p_base) - E_q[r]/α + log Z*, for q = p_base and q = p*",
    proof="prop_2_objective",
    kind="statistical",
)
def proposition_2(measured: MeasuredProblem) -> Finding:
    """At q = p* the right side vanishes: E_{p*}[log p*/p_base - r/α] + log Z* from independent samples of p*."""
    measured.need("log_p_star", "log_p_base", "sample_p_star")
    y = measured.problem.sample_p_star(measured.samples, measured.generator("proposition-2"))
    divergence = measured.problem.log_p_star(y) - measured.problem.log_p_base(y)
    objective = divergence - measured.problem.reward(y) / measured.problem.alpha
    return mean_finding(objective, -measured.problem.log_z(), floor=1e-8, note="J at its minimum is -log Z*")


@TOY_CHECKS.add(
    "proposition-4",
    "J_noise(f) + log Z* = KL(law of T || p0*), integrand by integrand, for a map that is not optimal",
    proof="prop_4_noise_objective",
)
def proposition_4(measured: MeasuredProblem) -> Finding:
    """The objective of `optimality_gap` against `log p0(x) - log|det DT| - log p0*(T x)` with a dense determinant."""
    measured.need("log_p0_star")
    x = measured.x
    T = torch.eye(measured.dim, dtype=torch.float64) + dense_jacobian(measured.reference, x)
    steered = x + measured.reference(x)
    moved = log_standard_normal(x) - torch.linalg.slogdet(T).logabsdet
    expected = moved - measured.problem.log_p0_star(steered)
    return _largest(measured.gap_of_reference.per_sample - expected, 1e-7, expected)


@TOY_CHECKS.add(
    "gap-is-positive",
    "J_noise(f) + log Z* ≥ 0 (Gibbs), for a map that is not optimal",
    proof="optimality_gap",
    kind="statistical",
)
def gap_is_positive(measured: MeasuredProblem) -> Finding:
    """The gap of the reference map, in nats."""
    return mean_finding(measured.gap_of_reference.per_sample, 0.0, relation=">=")


@TOY_CHECKS.add("gap-of-optimum", "the optimal map has gap 0 at every sample", proof="optimality_gap")
def gap_of_optimum(measured: MeasuredProblem) -> Finding:
    """The largest integrand of the gap: the optimum leaves no variance."""
    per_sample = measured.gap_of_optimum.per_sample
    return _largest(per_sample, 1e-6, per_sample)


@TOY_CHECKS.add(
    "kl-of-optimum",
    "noise_kl of the optimal map is KL(p0* || p0)",
    proof="kl_two_forms",
    kind="statistical",
)
def kl_of_optimum(measured: MeasuredProblem) -> Finding:
    """The exact estimate against the closed form or quadrature of the problem."""
    measured.need("kl_optimal")
    estimate = noise_kl(measured.optimum, measured.x, method="exact", form="change-of-variables", check=False)
    return measured.divergence(estimate.per_sample, floor=1e-7)


@TOY_CHECKS.add(
    "loss-of-optimum",
    "the exact loss at the optimal map has mean -log Z*, its least value",
    proof="prop_4_noise_objective",
    kind="statistical",
)
def loss_of_optimum(measured: MeasuredProblem) -> Finding:
    """`NoiseLoss(kl="exact")`, as it is trained, against the problem's log Z*."""
    measured.need("optimal_map")
    measured.require_smooth("optimal_map")
    finding = mean_finding(_loss(measured, "exact", measured.optimum).double(), -measured.problem.log_z(), floor=1e-6)
    return explained_by_steps(finding, measured.optimum, measured.x, continuous=True)


# --- what each loss learns (item e) -----------------------------------------------------------------------------


@TOY_CHECKS.add(
    "l2-is-proximal",
    "x + f(x) maximises r(g(u))/α - |u-x|²/2 over u, for the optimum f of the L2 loss",
    proof="l2_optimum",
)
def l2_is_proximal(measured: MeasuredProblem) -> Finding:
    """The most that any of many displaced points gains over the proximal point."""
    x = measured.x[:512]
    best = x + measured.proximal(x)

    def objective(u: Tensor) -> Tensor:
        tilt = measured.problem.reward(measured.problem.generate(u)) / measured.problem.alpha
        return tilt - 0.5 * (u - x).flatten(1).square().sum(1)

    reached = objective(best)
    gain = torch.full_like(reached, -math.inf)
    generator = measured.generator("proximal")
    for size in (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0):
        for _ in range(4):
            step = torch.randn(x.shape, dtype=x.dtype, generator=generator)
            gain = torch.maximum(gain, objective(best + size * step) - reached)
    gain = torch.maximum(gain, objective(x) - reached)
    return Finding(float(gain.max()), 0.0, 1e-8 * (1 + float(reached.abs().max())), "<=")


@TOY_CHECKS.add("l2-is-symmetric", "the L2 optimum has a symmetric Jacobian (symmetry index 1)", proof="l2_optimum")
def l2_is_symmetric(measured: MeasuredProblem) -> Finding:
    """The largest skew entry of its Jacobian."""
    measured.need("l2_map")
    measured.require_smooth("l2_map")
    J = dense_jacobian(measured.proximal, measured.x[:256])
    return Finding(float((J - J.mT).abs().max()) / 2, 0.0, 1e-6 * (1 + float(J.abs().max())))


@TOY_CHECKS.add(
    "l2-loss-prefers-proximal",
    "at every sample the L2 loss of the proximal map is at most that of the optimal map and of f = 0",
    proof="l2_optimum",
)
def l2_loss_prefers_proximal(measured: MeasuredProblem) -> Finding:
    """`NoiseLoss(kl="l2")`, as it is trained: the largest excess over either rival."""
    own = _loss(measured, "l2", measured.proximal)
    excess = own - torch.minimum(_loss(measured, "l2", measured.optimum), _loss(measured, "l2", lambda x: 0.0 * x))
    return Finding(float(excess.max()), 0.0, 1e-5 * (1 + float(own.abs().max())), "<=")


@TOY_CHECKS.add(
    "gap-of-l2",
    "the L2 optimum is KL(law of the proximal map || p0*) nats from the target",
    proof="l2_optimum",
    kind="statistical",
)
def gap_of_l2(measured: MeasuredProblem) -> Finding:
    """The estimated gap against closed form or quadrature."""
    measured.need("l2_gap")
    measured.require_smooth("l2_map")
    expected = measured.problem.l2_gap()
    if expected == math.inf:
        raise NotApplicable("the law of the proximal map is singular: it is infinitely far from p0*")
    return mean_finding(measured.gap_of_proximal.per_sample, expected, floor=1e-6)


@TOY_CHECKS.add("gap-order", "0 ≤ gap of the second-order optimum ≤ gap of the L2 optimum", proof="l2_optimum")
def gap_order(measured: MeasuredProblem) -> Finding:
    """The second-order loss lands in between."""
    measured.need("l2_gap", "second_order_gap")
    second, l2 = measured.problem.second_order_gap(), measured.problem.l2_gap()  # type: ignore[attr-defined]
    if l2 == 0:
        raise NotApplicable("a linear reward: every loss reaches the optimum")
    note = f"exact 0, second order {second:.4g}, L2 {l2:.4g}"
    return Finding(second if second >= 0 else math.nan, l2, 0.0, "<=", note)


@TOY_CHECKS.add(
    "gap-of-second-order",
    "the second-order optimum is as far from the target as its closed form says",
    proof="second_order",
    kind="statistical",
)
def gap_of_second_order(measured: MeasuredProblem) -> Finding:
    """The estimated gap against the closed form."""
    measured.need("second_order_map", "second_order_gap")
    found = optimality_gap(measured.problem, measured.problem.second_order_map(), measured.x)  # type: ignore[attr-defined]
    return mean_finding(found.per_sample, measured.problem.second_order_gap(), floor=1e-8)  # type: ignore[attr-defined]


def _stationary(measured: MeasuredProblem, kl: KLTerm, f: NoiseMap) -> Finding:
    """Gradient of a loss in the coefficients of an affine map, on points whose mean is 0 and covariance exactly I."""
    if not isinstance(f, nn.Linear):
        raise NotApplicable("tried on affine optima, where the expectation is a finite sum")
    trained = copy.deepcopy(f).requires_grad_(True)
    points = math.sqrt(measured.dim) * torch.eye(measured.dim, dtype=torch.float64)
    # Every sign pattern of a Rademacher probe would be needed for an exact mean; +-1 on the axes is one that is exact.
    terms = NoiseLoss(kl, alpha=measured.problem.alpha)(
        trained, torch.cat([points, -points]), measured.problem.generate, measured.problem.reward,
        generator=measured.generator("stationary"),
    )  # fmt: skip
    torch.autograd.backward(terms.total.mean())
    gradient = torch.cat([parameter.grad.flatten() for parameter in trained.parameters() if parameter.grad is not None])
    return Finding(float(gradient.abs().max()), 0.0, 1e-5)


@TOY_CHECKS.add("l2-loss-stationary", "the gradient of the trained L2 loss vanishes at N(Sb, S²)", proof="l2_optimum")
def l2_loss_stationary(measured: MeasuredProblem) -> Finding:
    """For affine maps; see `_stationary`."""
    return _stationary(measured, "l2", measured.proximal)


@TOY_CHECKS.add(
    "exact-loss-stationary",
    "the gradient of the trained exact loss vanishes at N(Sb, S)",
    proof="l2_optimum",
)
def exact_loss_stationary(measured: MeasuredProblem) -> Finding:
    """For affine maps; see `_stationary`."""
    return _stationary(measured, "exact", measured.optimum)


@TOY_CHECKS.add(
    "second-order-loss",
    "among the three optima the second-order loss is least at its own",
    proof="second_order",
    kind="statistical",
)
def second_order_loss(measured: MeasuredProblem) -> Finding:
    """Paired difference of the loss as it is trained, own optimum less the better of the other two."""
    measured.need("second_order_map")
    own = _loss(measured, "second-order", measured.problem.second_order_map())  # type: ignore[attr-defined]
    others = [_loss(measured, "second-order", f) for f in (measured.proximal, measured.optimum)]
    rival = min(others, key=lambda terms: float(terms.mean().nan_to_num(-math.inf)))
    return mean_finding((own - rival).double(), 0.0, relation="<=")


# --- data processing --------------------------------------------------------------------------------------------


@TOY_CHECKS.add(
    "data-processing-equality",
    "KL(p* || p_base) = KL(p0* || p0): the tilt depends on x through g(x) alone",
    proof="data_processing",
    kind="statistical",
)
def data_processing_equality(measured: MeasuredProblem) -> Finding:
    """The output divergence by its densities against the noise divergence in closed form."""
    measured.need("log_p_star", "log_p_base", "kl_optimal")
    y = measured.problem.generate(measured.tilted_noise)
    return measured.divergence(measured.problem.log_p_star(y) - measured.problem.log_p_base(y), floor=1e-8)


@TOY_CHECKS.add(
    "data-processing",
    "KL(g_# q || g_# p0) ≤ KL(q || p0) (eq. 12), for q the law of a map that is not optimal",
    proof="data_processing",
    kind="statistical",
)
def data_processing(measured: MeasuredProblem) -> Finding:
    """Variational lower bounds of the output divergence, `E_q[u] - log E_p0[e^u]`, under the noise divergence."""
    kl = noise_kl(measured.reference, measured.x, method="exact", form="change-of-variables", check=False)
    moved = measured.problem.generate(measured.x + measured.reference(measured.x))
    base = measured.problem.generate(measured.noise("processing"))
    best, radius = -math.inf, 0.0
    for function in _bounded_functions(measured, base):
        for scale in (0.25, 1.0):
            mean, stderr = mean_and_stderr(scale * function(moved))
            normaliser, spread = mean_and_stderr((scale * function(base)).exp())
            bound = mean - math.log(normaliser)
            error = confidence_radius(math.hypot(stderr, spread / normaliser, kl.stderr), measured.samples)
            if not bound <= best:  # the largest, or NaN
                best, radius = bound, error
            if math.isnan(best):
                return Finding(best, kl.value, radius, "<=")
    return Finding(best, kl.value, radius, "<=", "variational lower bound of the output divergence")


# --- helpers ----------------------------------------------------------------------------------------------------


def _largest(residual: Tensor, tolerance: float, scale: Tensor) -> Finding:
    """The largest deviation, with a tolerance relative to the size of what is compared."""
    return Finding(float(residual.detach().abs().max()), 0.0, tolerance * (1 + float(scale.detach().abs().max())))


def _loss(measured: MeasuredProblem, kl: KLTerm, f: NoiseMap) -> Tensor:
    """Totals of `NoiseLoss` per sample, detached."""
    loss = NoiseLoss(kl, alpha=measured.problem.alpha)
    terms = loss(
        f, measured.x, measured.problem.generate, measured.problem.reward, generator=measured.generator("loss")
    )
    return terms.total.detach()


def _rivals(measured: MeasuredProblem) -> list[NoiseLaw]:
    if measured.problem.injective:
        raise NotApplicable("g is injective: p0* is the only law of the noise with output law p*")
    measured.need("alternatives")
    return list(measured.problem.alternatives())


def _gauss_hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of `count`-point quadrature against N(0, 1)."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def _bounded_functions(measured: MeasuredProblem, y: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Bounded test functions of outputs: of the reward, and of random projections, each at its natural scale."""
    flat = y.flatten(1)
    reward = measured.problem.reward(y)
    centre, width = reward.median(), reward.std(correction=0) + 1e-12
    functions: list[Callable[[Tensor], Tensor]] = [lambda u: torch.tanh((measured.problem.reward(u) - centre) / width)]
    generator = measured.generator("projections")
    middle, spread = flat.mean(0), flat.std(0, correction=0) + 1e-12
    for _ in range(3):
        direction = torch.randn(flat.shape[1], dtype=torch.float64, generator=generator) / math.sqrt(flat.shape[1])
        for wave in (torch.sin, torch.cos):
            functions.append(partial(_projected, middle=middle, spread=spread, direction=direction, wave=wave))
    return functions


def _projected(
    u: Tensor, *, middle: Tensor, spread: Tensor, direction: Tensor, wave: Callable[[Tensor], Tensor]
) -> Tensor:
    return wave(1.5 * ((u.flatten(1) - middle) / spread) @ direction)


def _same_law(measured: MeasuredProblem, one: Tensor, other: Tensor, weights: Tensor | None) -> Finding:
    """Two samples, the second with weights of mean one, by the test function whose means differ most.

    Without weights the standard error is the pooled one of Student's test: the laws are to be the same, so both samples
    measure one spread, and a sample all of whose values agree, as two values of a reward with steps may, has none of
    its own to offer.
    """
    count = min(len(one), len(other))
    functions = _bounded_functions(measured, other)
    found: Finding | None = None
    largest = -1.0
    for function in functions:
        sample, values = function(one), function(other)
        mean, stderr = mean_and_stderr(sample)
        reference, spread = mean_and_stderr(values if weights is None else values * weights)
        error = math.hypot(stderr, spread)
        if weights is None:
            error = float(torch.cat([sample, values]).std()) * math.sqrt(1 / len(one) + 1 / len(other))
        radius = confidence_radius(error, count)
        score = abs(mean - reference) / max(error, 1e-12)
        if not score <= largest:  # the largest, or NaN
            largest = score
            note = f"largest of {len(functions)} test functions, z = {score:.2f}"
            found = Finding(mean, reference, radius, note=note)
        if math.isnan(score):
            break
    assert found is not None
    return found
