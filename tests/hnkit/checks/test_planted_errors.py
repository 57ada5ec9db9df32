"""`hnkit verify-bound` turns red under errors planted in the code it runs on, and is green without them.

The errors are wrong values, chosen by hand, and for every function that the checks rest on, exceptions and NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import math
import pkgutil
import sys

import pytest
import torch

import hnkit
from hnkit import InputError, NonFiniteError, bounds, jacobian, logdet, loss, tilt, toy
from hnkit.checks.injected import INJECTED_CHECKS
from hnkit.checks.maps import MAP_CHECKS
from hnkit.checks.matrices import CERTIFIED_CHECKS, Certified
from hnkit.checks.measured_problem import MeasuredProblem
from hnkit.checks.problems import TOY_CHECKS
from hnkit.checks.reference_maps import contraction
from hnkit.checks.report import Report
from hnkit.checks.settings import VerifySettings
from hnkit.checks.verify_toys import verify_toys
from hnkit.cli import app as cli
from hnkit.figures.measured_map import MeasuredMap
from hnkit.injection import NoiseInjection
from hnkit.internal import stats as stats
from hnkit.kl import estimators, moments, verdict
from hnkit.kl.methods import exact as kl
from hnkit.lipschitz import certify
from hnkit.lipschitz import local as lipschitz
from hnkit.toy.linear_gaussian import LinearGaussian, linear_gaussian_low_rank

# A module first imported while an error is planted would keep it for good.
for package in (hnkit, toy):
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not found.name.endswith(".__main__"):
            importlib.import_module(found.name)


def plant(monkeypatch, home, name, wrong):
    """Replace a function everywhere it has been imported to, as an edit of its source would."""
    right = getattr(home, name)
    replacement = wrong(right)
    for module in list(sys.modules.values()):
        found = getattr(module, "__dict__", {}).get(name)
        if found is right and getattr(module, "__name__", "").startswith(("hnkit", "toy")):
            monkeypatch.setattr(module, name, replacement)


def plant_method(monkeypatch, owner, name, wrong):
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))


def trace(A):
    return A.diagonal(dim1=-2, dim2=-1).sum(-1)


def with_fields(**changes):
    """The record a function returns, with some fields changed by functions of the record."""

    def wrong(right):
        def call(*args, **kwargs):
            record = right(*args, **kwargs)
            return dataclasses.replace(record, **{key: change(record) for key, change in changes.items()})

        return call

    return wrong


def scaled(factor):
    return lambda right: lambda *args, **kwargs: factor * right(*args, **kwargs)


PLANTED = {
    "sign of the trace in E(A)": lambda m: plant(m, logdet, "log_det_error", lambda f: lambda A: f(A) - 2 * trace(A)),
    "log-det of I - A": lambda m: plant(
        m, logdet, "log_det_error", lambda f: lambda A: trace(A) - torch.linalg.slogdet(torch.eye(len(A[0])) - A)[1]
    ),
    "sign of the log-det": lambda m: plant(m, logdet, "log_det_error", lambda f: lambda A: 2 * trace(A) - f(A)),
    "half of |f|^2 dropped": lambda m: plant(m, moments, "dense_moments", with_fields(l2=lambda record: 2 * record.l2)),
    "sign of x.f": lambda m: plant(
        m, moments, "dense_moments", with_fields(alignment=lambda record: -record.alignment)
    ),
    "the trace doubled": lambda m: plant(
        m, moments, "dense_moments", with_fields(trace=lambda record: 2 * record.trace)
    ),
    "|J|_F^2 in place of tr J^2": lambda m: plant(
        m, moments, "dense_moments", with_fields(square=lambda record: record.frobenius)
    ),
    "sign of tr J^2 in the verdict on the L2 term": lambda m: plant(
        m, verdict, "_moments", with_fields(square=lambda record: -record.square)
    ),
    "half of tr J^2 in the verdict on the L2 term": lambda m: plant(
        m, verdict, "_moments", with_fields(square=lambda record: record.square / 2)
    ),
    "log(1 + L) in place of -log(1 - L)": lambda m: plant(
        m,
        bounds,
        "_quotients",
        lambda f: lambda s: tuple((s - torch.log1p(s)) / d for d in (1, s**2, s**2)),
    ),
    "the dimension left out of Theorem 7": lambda m: plant(
        m, bounds, "theorem7_bound", lambda f: lambda dim, L: f(1, L)
    ),
    "the dimension left out of local Theorem 7": lambda m: plant(
        m, bounds, "local_theorem7_bound", lambda f: lambda dim, norms: f(1, norms)
    ),
    "L in place of L^2 in the Frobenius bound": lambda m: plant(
        m, bounds, "frobenius_bound", lambda f: lambda norm, L: f(norm, L) * L
    ),
    "field of values without its slack": lambda m: plant(
        m, bounds, "field_of_values_bounds", lambda f: lambda A: (f(A)[1], f(A)[1])
    ),
    "1/n left out of the standard error": lambda m: plant(
        m, stats, "mean_and_stderr", lambda f: lambda v: (f(v)[0], f(v)[1] * len(v) ** 0.5)
    ),
    "1/n left out of the mean": lambda m: plant(
        m, stats, "mean_and_stderr", lambda f: lambda v: (f(v)[0] * len(v), f(v)[1])
    ),
    "half the local norm": lambda m: plant(m, lipschitz, "local_lipschitz", scaled(0.5)),
    "a certificate that is too small": lambda m: plant(
        m, lipschitz, "lipschitz_upper", with_fields(value=lambda record: 0.5 * record.value)
    ),
    "half of Arnoldi's value": lambda m: plant(
        m, estimators, "arnoldi", with_fields(value=lambda record: 0.5 * record.value)
    ),
    "S and S^2 swapped": lambda m: plant_method(
        m,
        LinearGaussian,
        "_slopes",
        lambda f: lambda self, kind: f(self, {"l2": "exact", "exact": "l2"}.get(kind, kind)),
    ),
    "log Z* without its half": lambda m: plant_method(m, LinearGaussian, "log_z", lambda f: lambda self: 2 * f(self)),
    "sign of the reward": lambda m: plant_method(m, LinearGaussian, "reward", lambda f: lambda self, y: -f(self, y)),
    "half of the L2 gap": lambda m: plant_method(m, LinearGaussian, "l2_gap", lambda f: lambda self: f(self) / 2),
    "tilted density without its normaliser": lambda m: plant_method(
        m, LinearGaussian, "log_p0_star", lambda f: lambda self, x: f(self, x) + 0.1
    ),
    "tilted sampler with the wrong covariance": lambda m: plant_method(
        m,
        LinearGaussian,
        "sample_p0_star",
        lambda f: (
            lambda self, n, g: self.mean + (f(self, n, g) - self.mean) @ torch.linalg.cholesky(self.covariance).mT
        ),
    ),
    "alpha ignored by the loss": lambda m: plant(m, loss, "NoiseLoss", lambda f: lambda kl, alpha: f(kl, alpha=1.0)),
    "alpha ignored by the gap": lambda m: plant(
        m,
        tilt,
        "optimality_gap",
        lambda f: (
            lambda problem, g, x, **k: with_fields(
                per_sample=lambda gap: (
                    gap.per_sample + (1 / problem.alpha - 1) * problem.reward(problem.generate(x + g(x)))
                )
            )(f)(problem, g, x, **k)
        ),
    ),
    "mean over dimensions in the loss": lambda m: plant(
        m, loss, "NoiseLoss", lambda f: lambda kl, alpha: f(kl, alpha=alpha, reduction="mean")
    ),
    "the injected share in place of its root": lambda m: m.setattr(
        NoiseInjection, "injected", property(lambda s: s.share)
    ),
    "fresh noise on top of all of the noise": lambda m: m.setattr(NoiseInjection, "kept", property(lambda self: 1.0)),
    "sign of the delta with injected noise": lambda m: plant_method(
        m, NoiseInjection, "moved", lambda f: lambda self, x, delta, eps: f(self, x, -delta, eps)
    ),
    "the delta not scaled with the noise": lambda m: plant_method(
        m, NoiseInjection, "moved", lambda f: lambda self, x, delta, eps: f(self, x, delta / self.kept, eps)
    ),
    "half of the injected bound": lambda m: plant_method(m, NoiseInjection, "nats", scaled(0.5)),
    "the injected bound doubled": lambda m: plant_method(m, NoiseInjection, "nats", scaled(2.0)),
    "sign of the injected bound": lambda m: plant_method(m, NoiseInjection, "nats", scaled(-1.0)),
    "a^2 / 2 in place of a^2 / 2(1 - a^2)": lambda m: m.setattr(
        NoiseInjection, "nats_per_square", property(lambda self: (1 - self.share) / 2)
    ),
    "log Z* left out of the gap": lambda m: plant(
        m,
        tilt,
        "optimality_gap",
        lambda f: (
            lambda problem, g, x, **k: with_fields(per_sample=lambda gap: gap.per_sample - problem.log_z())(f)(
                problem, g, x, **k
            )
        ),
    ),
}


@pytest.fixture
def exit_code(monkeypatch, tmp_path, capsys):
    """Run verify-bound in this process on the reference maps' toy, plots left out, and return its exit code."""
    monkeypatch.setattr(Report, "write", lambda *_, **__: None)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.app(["verify-bound", "--samples", "384", "--out", str(tmp_path / "run"), *arguments])
        capsys.readouterr()
        return ended.value.code

    return run


# alpha = 2 there, and every closed form of the linear-Gaussian family is used.
TOYS = ("--toy", "linear-gaussian-low-rank", "--toy", "rotation", "--toy", "contraction")


def test_green_without_an_error(exit_code):
    assert exit_code(*TOYS) == 0


@pytest.mark.parametrize("error", PLANTED)
def test_red_under_a_planted_error(error, exit_code, monkeypatch):
    PLANTED[error](monkeypatch)
    assert exit_code(*TOYS) == 1, error


def test_every_planted_error_patches_something(monkeypatch):
    before = (logdet.log_det_error, kl.dense_moments)
    PLANTED["sign of the trace in E(A)"](monkeypatch)
    PLANTED["half of |f|^2 dropped"](monkeypatch)
    assert logdet.log_det_error is not before[0]
    assert kl.dense_moments is not before[1]


# --- exceptions and NaN, in everything that the checks rest on --------------------------------------------------


def functions():
    """Every function of hnkit that a module of checks imports from elsewhere, by where it is defined."""
    found = set()
    checks = ("maps", "l2_term", "injected", "problems", "measured_problem", "matrices", "differences")
    for name in ("figures.measured_map", "linalg.matrices", *(f"checks.{name}" for name in checks)):
        for imported, value in vars(importlib.import_module(f"hnkit.{name}")).items():
            home = getattr(value, "__module__", "")
            elsewhere = home.startswith("hnkit.") and not home.startswith(("hnkit.checks", "hnkit.figures"))
            if inspect.isfunction(value) and elsewhere and imported not in NO_FIGURES:
                found.add((home, imported))
    tables = {("hnkit.bounds", name) for name in ("local_theorem7_bound", "singular_value_bound")}
    return sorted(found | tables | {("hnkit.kl.estimators", "arnoldi"), ("hnkit.kl.moments", "dense_moments")})


NO_FIGURES = {
    "generator_for", "rows_per_pass", "chunked", "slices", "check_map", "check_finite", "working_type",
    "rounded_up",  # words
    "not_kept", "all_made",
    "check_sizes",
    # of several processes: tests/hnkit/kl/test_estimate.py holds them to the whole
    "joined_estimates", "joined_moments", "map_numbers",
    "proved_lipschitz",  # a constant that is no number below 1 proves nothing, and the figure is the same without
}  # fmt: skip
METHODS = [
    (jacobian.RowJacobian, "jvp"), (jacobian.RowJacobian, "vjp"), (loss.NoiseLoss, "__call__"),
    (NoiseInjection, "moved"), (NoiseInjection, "nats"),
    *((LinearGaussian, name) for name, value in vars(hnkit.tilt.TiltedProblem).items()
      if inspect.isfunction(value) and not name.startswith("_") and name != "with_alpha"),
    (LinearGaussian, "second_order_map"), (LinearGaussian, "second_order_gap"),
]  # fmt: skip


def poisoned(value):
    """The same result with NaN in place of every number."""
    if isinstance(value, float):
        return math.nan
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, math.nan) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(poisoned, value))
    if isinstance(value, dict):
        return {key: poisoned(part) for key, part in value.items()}
    if isinstance(value, torch.nn.Module) or inspect.isfunction(value):
        return lambda *args: poisoned(value(*args)) + 0 * args[0]
    if dataclasses.is_dataclass(value):
        changes = {field.name: poisoned(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changes)
    return value


def raising(error):
    def wrong(right):
        @functools.wraps(right)
        def call(*args, **kwargs):
            raise error

        return call

    return wrong


def returning_nan(right):
    @functools.wraps(right)
    def call(*args, **kwargs):
        return poisoned(right(*args, **kwargs))

    return call


WRONG = {
    "InputError": raising(InputError("planted")),
    "NonFiniteError": raising(NonFiniteError("planted")),
    "RuntimeError": raising(RuntimeError("planted")),
    "NaN": returning_nan,
}


# Every exception takes one way through a check: two of them are tried in the slow suite alone.
KINDS = [
    "InputError",
    "NaN",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("NonFiniteError", "RuntimeError")),
]


def map_checks():
    """On a certified map, on an affine one, and on the matrices of the first."""
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = MeasuredMap("contraction", contraction(3), x)
    yield from MAP_CHECKS.run(measured, "contraction")
    yield from INJECTED_CHECKS.run(measured, "contraction")
    yield MAP_CHECKS.statements["kl-affine"].check(MeasuredMap("affine", lambda x: 0.3 * x + 0.1, x), "affine")
    if importlib.util.find_spec("flint") is not None:
        yield from CERTIFIED_CHECKS.run(Certified(measured), "contraction")


def problem_checks():
    """On a problem that has every member."""
    yield from TOY_CHECKS.run(MeasuredProblem(linear_gaussian_low_rank(), 128), "toy")


def failing(checks):
    return [check for check in checks if check.verdict == "fails"]


def test_nothing_fails_as_it_is():
    assert failing([*map_checks(), *problem_checks()]) == []


def test_red_where_a_rule_refuses_what_is_known_to_be_certified(monkeypatch):
    """A rule refuses by InputError, which makes a map one without a certificate; the reference maps have one."""

    def refuse(module, visit):
        raise InputError("planted")

    monkeypatch.setitem(certify._RULES, torch.nn.Tanh, refuse)
    report = verify_toys([], VerifySettings(samples=16), references=["contraction"])
    failed = [check for check in report.checks if check.verdict == "fails"]
    assert [check.name for check in failed] == ["lipschitz-order"]
    assert "planted" in failed[0].note


@pytest.mark.parametrize("wrong", KINDS)
@pytest.mark.parametrize(("home", "name"), functions(), ids=lambda part: part.rpartition(".")[2])
def test_red_under_exceptions_and_nan(home, name, wrong, monkeypatch):
    plant(monkeypatch, importlib.import_module(home), name, WRONG[wrong])
    failed = failing(map_checks()) or failing(problem_checks())
    assert failed
    assert wrong == "NaN" or any("planted" in check.note for check in failed)


@pytest.mark.parametrize("wrong", KINDS)
@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda part: getattr(part, "__name__", part))
def test_red_under_exceptions_and_nan_in_methods(owner, name, wrong, monkeypatch):
    value = getattr(owner, name)
    if name == "__call__":
        value = owner.__call__
    monkeypatch.setattr(owner, name, WRONG[wrong](value))
    assert failing(problem_checks() if owner is LinearGaussian else [*map_checks(), *problem_checks()])
