"""Random module trees, plain, shared, hooked, patched, parametrised and wrapped: no certificate lies below a secant.

A tree is made from a seed. Whatever it is, either no certificate is given, or no difference quotient of the map that is
then *called*, and no local norm that an ascent finds, exceeds it; nor do two points that `x + f(x)` joins survive a
certificate of injectivity.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_state
from torch.nn.utils import parametrizations, parametrize

from hnkit.errors import InputError, NotCertifiedError
from hnkit.lipschitz import Scaled, Sum, certified_bounds, certify_injective, lipschitz_lower, local_norms

F64 = torch.float64
SHAPE = (4, 3)
"""Channels and length of a row; layers keep it."""
ROUNDING = 1e-9
"""Relative room for the rounding of a difference quotient."""
PLAIN, SLOW = 300, 10_000
ASCEND_EVERY = 25


# --- leaves -----------------------------------------------------------------------------------------------------------


class Halved(nn.Module):
    """Declares itself, truthfully."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * torch.sin(self.inner(x))

    def lipschitz_upper(self) -> float:
        return 0.5 * certified_bounds(self.inner).norm


class Louder(Halved):
    """Inherits the declaration of a map that it no longer is."""

    def forward(self, x: Tensor) -> Tensor:
        return 5.0 * super().forward(x)


class Delegating(nn.Module):
    """Passes unknown attributes on to what it wraps, as adapters do, and computes something else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * self.inner(x)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Doubling(nn.Linear):
    """A subclass with the weights of its base and another map."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Counting(nn.Module):
    """A parametrisation that returns another weight at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * weight


class Transposed(nn.Module):
    """Joins the last two axes in the other order, without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT.reshape(x.shape)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.Tanh, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Softsign, nn.Hardswish, nn.ELU, nn.SELU,
    lambda: nn.LeakyReLU(-1.5), lambda: nn.LeakyReLU(3.0), lambda: nn.PReLU(SHAPE[0]), lambda: nn.CELU(0.2),
    lambda: nn.Softplus(threshold=40), lambda: nn.Softplus(beta=1e-9), lambda: nn.Softplus(beta=2, threshold=3),
    lambda: nn.Softmax(dim=1), lambda: nn.Softmax(dim=0), lambda: nn.Softmin(dim=-1), lambda: nn.Hardshrink(0.3),
    lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(2.0, inplace=True), lambda: nn.SiLU(inplace=True),
]  # fmt: skip


def leaf(draw: random.Random) -> nn.Module:
    """A layer that keeps `SHAPE`."""
    channels, length = SHAPE
    kind = draw.randrange(12)
    if kind < 3:
        return nn.Linear(length, length, bias=draw.random() < 0.5)
    if kind == 3:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * length, channels * length), nn.Unflatten(1, SHAPE))
    if kind == 4:
        mode = draw.choice(["zeros", "circular", "reflect", "replicate"])
        groups, dilation = draw.choice([1, 2]), draw.choice([1, 1, 2])
        return nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation, groups=groups, padding_mode=mode)
    if kind == 5:
        return draw.choice(
            [
                lambda: nn.ConvTranspose1d(channels, channels, 3, padding=1),
                lambda: nn.AvgPool1d(3, stride=1, padding=1),
                lambda: nn.MaxPool1d(3, stride=1, padding=1),
                lambda: nn.Conv1d(channels, channels, 1, padding=1, padding_mode="circular", stride=2),
                lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.AvgPool1d(2)),
                lambda: nn.LayerNorm(length),
            ]
        )()
    if kind == 6:
        return draw.choice([nn.Identity, nn.Dropout, lambda: nn.ChannelShuffle(2), Transposed])()
    if kind == 7:
        return Doubling(length, length)
    return draw.choice(ACTIVATIONS)()


def parametrised(draw: random.Random, module: nn.Module) -> nn.Module:
    """A linear layer under a parametrisation, or the module as it is."""
    if type(module) is not nn.Linear:
        return module
    kind = draw.randrange(4)
    if kind == 0:
        parametrize.register_parametrization(module, "weight", Counting())
        return module
    return (parametrizations.spectral_norm, parametrizations.orthogonal, parametrizations.weight_norm)[kind - 1](module)


def disturbed(draw: random.Random, module: nn.Module) -> nn.Module:
    """A module whose call does something else than its type says."""
    kind, factor = draw.randrange(6), draw.choice([2.0, 5.0, -3.0])
    if kind == 0:
        module.register_forward_hook(lambda module, inputs, output: factor * output)
    elif kind == 1:
        module.register_forward_pre_hook(lambda module, inputs: (factor * inputs[0],))
    elif kind == 2:
        inner = module.forward
        module.forward = lambda x: factor * inner(x)
    elif kind == 3:
        inner = module._call_impl
        module._compiled_call_impl = lambda x: factor * inner(x)
    elif kind == 4:
        module._call_impl = lambda x: factor * x
    else:
        module.train()
    return module


def tree(draw: random.Random, depth: int, pool: list[nn.Module]) -> nn.Module:
    """A random tree; every module made lies in `pool`, from which others take it again."""
    if pool and draw.random() < 0.2:
        return draw.choice(pool)
    if depth == 0 or draw.random() < 0.2:
        made = leaf(draw)
    else:
        kind = draw.randrange(9)
        children = [tree(draw, depth - 1, pool) for _ in range(draw.randint(1, 3))]
        if kind < 4:
            if draw.random() < 0.3:
                children += draw.choices(children, k=2)
            made = nn.Sequential(*children)
        elif kind < 6:
            made = Sum(*children)
        elif kind == 6:
            made = Scaled(children[0], draw.choice([0.0, -1.0, 0.3, -0.7, 2.5]))
        else:
            made = draw.choice([Halved, Halved, Louder, Delegating])(children[0])
        if kind == 1:  # a gradient map
            first, last = nn.Linear(SHAPE[1], 5), nn.Linear(5, SHAPE[1])
            made = nn.Sequential(first, draw.choice(ACTIVATIONS)(), last)
            last.weight = nn.Parameter(draw.choice([1, -1]) * first.weight.detach().T.clone())
    if draw.random() < 0.06:
        made = parametrised(draw, made)
    pool.append(made)
    return made


def random_tree(seed: int) -> nn.Module:
    """The tree of a seed, in float64; most in eval mode, some disturbed after that."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    pool: list[nn.Module] = []
    made = tree(draw, draw.randint(1, 3), pool).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(draw.choice([0.1, 0.5, 1.0, 3.0]))
    made.eval()
    if draw.random() < 0.25:
        disturbed(draw, draw.choice([part for part in made.modules() if not isinstance(part, nn.ModuleList)]))
    return made


# --- the comparison ---------------------------------------------------------------------------------------------------


def points(draw: random.Random) -> tuple[Tensor, Tensor]:
    """Pairs at distances from 1e-5 to 10, at scales from the kinks at 0 to where activations saturate."""
    n = 48
    x = torch.randn(n, *SHAPE, dtype=F64) * torch.logspace(-2, 1.5, n, dtype=F64).reshape(n, 1, 1)
    step = torch.randn(n, *SHAPE, dtype=F64) * 10 ** torch.empty(n, 1, 1, dtype=F64).uniform_(-5, 0.5)
    if draw.random() < 0.5:  # across the jump of Softplus(beta=1e-9)
        x[0], step[0] = 2e10, 1.0
    return x, x + step


def examine(seed: int) -> str:
    """What became of a tree: `"refused"`, `"certified"` (its constant is kept), `"ascended"`, or an error of torch."""
    f = random_tree(seed)
    try:
        bounds = certified_bounds(f)
    except NotCertifiedError:
        return "refused"
    certificate = certify_injective(f)
    x, y = points(random.Random(seed))
    try:
        with torch.no_grad():
            before = x.clone()
            fx, fy = f(x), f(y)
    except (RuntimeError, ValueError):
        return "error"
    assert torch.equal(x, before), f"tree {seed} overwrites its input"
    dx, df = (y - x).flatten(1), (fy - fx).flatten(1)
    length = dx.norm(dim=1)
    rounding = 1e-13 * (1 + x.flatten(1).norm(dim=1) * max(1.0, bounds.norm) + fx.flatten(1).norm(dim=1))
    assert bool((df.norm(dim=1) <= bounds.norm * length * (1 + ROUNDING) + rounding).all()), (
        f"tree {seed}: secant {float((df.norm(dim=1) / length).max()):.6g} above the certificate {bounds}"
    )
    if df.shape == dx.shape and fx.shape == x.shape:
        inner, square = (df * dx).sum(1), length.square()
        room = ROUNDING * square * (1 + bounds.norm) + rounding * length
        assert bool((bounds.lower * square - room <= inner).all()), f"tree {seed}: below {bounds}"
        assert bool((inner <= bounds.upper * square + room).all()), f"tree {seed}: above {bounds}"
        if certificate.status == "certified":
            assert bool(((dx + df).norm(dim=1) > 0).all()), f"tree {seed} folds: {certificate.how}"
            assert float((dx * (dx + df)).sum(1).min()) > 0, f"tree {seed} is not monotone: {certificate.how}"
    if seed % ASCEND_EVERY:
        return "certified"
    start = torch.randn(3, *SHAPE, dtype=F64)
    try:
        found = lipschitz_lower(f, start, ascent_steps=4, starts=2).value
    except InputError:  # a kink on the way: the samples alone
        found = float(local_norms(f, start).value.max())
    assert found <= bounds.norm * (1 + 1e-9) + 1e-12, f"tree {seed}: local norm {found} above {bounds}"
    return "ascended"


def compare(seeds: range) -> Counter[str]:
    return Counter(examine(seed) for seed in seeds)


def test_no_certificate_of_a_random_tree_lies_below_a_secant():
    found = compare(range(PLAIN))
    assert found["certified"] + found["ascended"] > 0.2 * PLAIN
    assert found["refused"] > 0.2 * PLAIN
    assert found["ascended"] > 0
    assert found["error"] < 0.05 * PLAIN


@pytest.mark.slow
def test_no_certificate_of_ten_thousand_random_trees_lies_below_a_secant():
    found = compare(range(PLAIN, PLAIN + SLOW))
    assert found["certified"] + found["ascended"] > 0.2 * SLOW
    assert found["error"] < 0.05 * SLOW


def test_the_comparison_sees_a_certificate_that_is_too_small(monkeypatch):
    """With a walk that counts a repeated module once, and one that sees no hooks, trees fail it."""
    import hnkit.lipschitz.certify as certify

    def failures(seeds):
        failed = 0
        for seed in seeds:
            try:
                examine(seed)
            except AssertionError:
                failed += 1
        return failed

    assert failures(range(60)) == 0
    for blind in ("require_plain_instance", "require_plain_parts"):
        monkeypatch.setattr(certify, blind, lambda module: None)
    assert failures(range(60)) > 0
    monkeypatch.undo()
    rule = certify._RULES[nn.Sequential]

    def once(module, visit):
        seen = nn.Sequential(*dict.fromkeys(module))
        return rule(seen, visit)

    monkeypatch.setitem(certify._RULES, nn.Sequential, once)
    assert failures(range(300)) > 0


def test_global_hooks_stop_every_tree():
    handle = module_state.register_module_forward_hook(lambda module, inputs, output: 3 * output)
    try:
        assert {examine(seed) for seed in range(20)} == {"refused"}
    finally:
        handle.remove()
    assert math.isfinite(certified_bounds(nn.Tanh()).norm)
