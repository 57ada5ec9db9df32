"""Assertions about what is trained: hypernetworks before training, and losses; `hnkit.testing` re-exports them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.loss import NoiseLoss
from hnkit.testing.assertions import assert_mean, fail, require_samples

__all__ = ["assert_noise_loss", "assert_zero_at_init"]


def assert_zero_at_init(
    module: nn.Module,
    shape: tuple[int, ...],
    *,
    condition: Any = None,
    rows: int = 3,
    seed: int = 0,
    trainable: bool = True,
) -> None:
    """Assert that a fresh hypernetwork is exactly zero, `f(x) = 0`, and yet able to learn.

    Exactly: the steered and the base images of an untrained network are then the same, bit for bit.

    Args:
        module: a function that is called as `module(x)`, or `module(x, condition)` if a condition is given.
        shape: the shape of one noise sample.
        condition: second argument, for `rows` rows.
        rows: rows of the batch; a third of them are ten times larger than standard normal noise.
        seed: the seed of the noise.
        trainable: also require that some parameter receives a gradient that is not zero: a product of two zero
            factors would stay zero for ever.

    Raises:
        AssertionError: with the largest entry of f(x), or because no parameter receives a gradient.
    """
    __tracebackhide__ = True
    generator = torch.Generator().manual_seed(seed)
    parameter = next(module.parameters(), None)
    x = torch.randn(rows, *shape, generator=generator)
    x[::3] *= 10
    if parameter is not None:
        x = x.to(parameter)
    with torch.enable_grad():
        y = module(x) if condition is None else module(x, condition)
        if y.shape != x.shape:
            fail(f"f(x) has shape {tuple(y.shape)} for x of shape {tuple(x.shape)}")
        largest = float(y.detach().abs().nan_to_num(math.inf).max())
        if largest != 0:
            fail(f"f is not zero at initialisation: the largest entry of f(x) is {largest:.4g}")
        if not trainable:
            return
        weights = torch.randn(y.shape, generator=generator).to(y)
        learning = [p for p in module.parameters() if p.requires_grad]
        if not learning:
            fail("f is zero and has no parameter that requires a gradient: it can never learn")
        gradients = (
            torch.autograd.grad((y * weights).sum(), learning, allow_unused=True)
            if y.requires_grad
            else [None] * len(learning)
        )
    if not any(g is not None and bool(g.any()) for g in gradients):
        fail(
            f"f is zero and none of its {len(learning)} trainable parameters receives a gradient: it can never learn "
            "(are both factors of a product zero?)"
        )


def assert_noise_loss(
    loss: NoiseLoss,
    f: nn.Module,
    x: Tensor,
    generate: Callable[[Tensor], Tensor],
    reward: Callable[[Tensor], Tensor],
    *,
    repeats: int = 64,
    seed: int = 0,
    tolerance: float = 1e-6,
    false_alarm: float = 1e-6,
) -> None:
    """Assert value and gradient of a noise loss against a dense twin that shares no code with it.

    Per row `total = kl - r(g(x_hat))/alpha` and `x_hat = x + f(x)`; the KL term, and the gradient of a sum of rows with
    *different weights* in the parameters of f, are compared with `|f|^2/2` plus nothing, `tr(J^2)/2` or
    `tr J - log|det(I + J)|` through dense Jacobians. Losses with probes are compared in the mean over `repeats` draws,
    by z-tests.

    Args:
        loss: the loss, anything with the call and the attributes `kl`, `alpha`, `reduction` of `NoiseLoss`.
        f: the hypernetwork, float64, with parameters; `|J| < 1`.
        x: `(n, *shape)` noise, float64; d products per row are spent.
        generate: noise to outputs.
        reward: outputs to `(n,)`.
        repeats: draws of the probes, at least 32, of losses with probes.
        seed: the seed of the probes and of the weights.
        tolerance: relative error allowed, of rounding and (for a Krylov loss) of truncation.
        false_alarm: probability of failing although the loss is right.

    Raises:
        AssertionError: naming what differs, with both numbers.
    """
    __tracebackhide__ = True
    parameters = [p for p in f.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("f has no trainable parameter: give a module whose gradient can be compared")
    random = loss.kl in ("second-order", "arnoldi")
    if random:
        require_samples(repeats)
    n, generator = x.shape[0], torch.Generator().manual_seed(seed)
    weights = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    directions = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    twin_kl, twin_reward = _twin(loss, f, x, generate, reward)
    twin_slope = _slope(weights @ (twin_kl - twin_reward / loss.alpha), parameters, directions)
    kls, slopes = [], []
    for _ in range(repeats if random else 1):
        terms = loss(f, x, generate, reward, generator=generator)
        _close(terms.x_hat, x + f(x), tolerance, "x_hat against x + f(x)")
        _close(terms.reward, twin_reward, tolerance, "reward against r(g(x + f(x)))")
        _close(terms.total, terms.kl - terms.reward / loss.alpha, tolerance, "total against kl - reward / alpha")
        kls.append(terms.kl.detach().double())
        slopes.append(_slope(weights @ terms.total.double(), parameters, directions))
    twin_kl, twin_reward = twin_kl.detach(), twin_reward.detach()
    if not random:
        _close(kls[0], twin_kl, tolerance, f"KL term of kl={loss.kl!r}, reduction={loss.reduction!r}")
        _close(slopes[0], twin_slope, tolerance, "gradient with a weight per sample, along a random direction")
        return
    shift = tolerance * float(twin_kl.abs().sum())
    what = f"summed KL term of kl={loss.kl!r}, reduction={loss.reduction!r}"
    assert_mean(torch.stack(kls).sum(1), float(twin_kl.sum()), false_alarm=false_alarm / 2, bias_bound=shift, what=what)
    assert_mean(
        torch.stack(slopes),
        float(twin_slope),
        false_alarm=false_alarm / 2,
        bias_bound=tolerance * abs(float(twin_slope)),
        what="gradient with a weight per sample, along a random direction,",
    )


def _slope(value: Tensor, parameters: list[nn.Parameter], directions: list[Tensor]) -> Tensor:
    """Derivative of `value` along one direction of the parameters."""
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    parts = [(g * v).sum() for g, v in zip(gradients, directions, strict=True) if g is not None]
    return torch.stack(parts).sum().double() if parts else torch.zeros((), dtype=torch.float64)


def _twin(
    loss: NoiseLoss, f: nn.Module, x: Tensor, generate: Callable[[Tensor], Tensor], reward: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """KL terms and rewards of the rows by autograd through dense Jacobians, row by row."""
    terms = []
    for row in x:
        delta = f(row[None]).flatten()
        term = delta.square().sum() / 2
        if loss.kl != "l2":

            def along_row(z: Tensor) -> Tensor:
                result: Tensor = f(z[None])[0].flatten()
                return result

            J = torch.autograd.functional.jacobian(along_row, row, create_graph=True)  # type: ignore[no-untyped-call]
            J = J.reshape(row.numel(), -1)
            if loss.kl == "second-order":
                term = term + torch.trace(J @ J) / 2
            else:
                identity = torch.eye(row.numel(), dtype=J.dtype)
                term = term + torch.trace(J) - torch.linalg.slogdet(identity + J).logabsdet
        terms.append(term / row.numel() if loss.reduction == "mean" else term)
    return torch.stack(terms).double(), reward(generate(x + f(x))).double()


def _close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    __tracebackhide__ = True
    if found.shape != expected.shape:
        fail(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    found, expected = found.detach().double().flatten(), expected.detach().double().flatten()
    difference = (found - expected).abs()
    scale = float(expected.abs().max())
    worst = int(difference.argmax())
    if not float(difference[worst]) <= tolerance * scale + torch.finfo(torch.float64).tiny:
        fail(
            f"{what}: {float(found[worst]):.8g}, expected {float(expected[worst]):.8g} at entry {worst} "
            f"(relative difference {float(difference[worst]) / max(scale, 1e-300):.3g}, {tolerance:g} is allowed)"
        )
