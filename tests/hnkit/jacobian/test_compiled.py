"""Compiled maps: torch.compile is replaced by what could come out of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hnkit import InputError, dense_jacobian
from hnkit.jacobian import (
    compile_map,
    reusable_graphs,
)
from tests.hnkit.functions import SHEAR, attention, points, rows


@pytest.mark.slow
def test_compiled_map_agrees_and_is_reused() -> None:
    f, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double(), points(6, shape=(4,))
    with reusable_graphs():
        compiled = compile_map(f, x, "aot_eager")
        torch.testing.assert_close(dense_jacobian(compiled, x), dense_jacobian(f, x))


def test_a_compiled_map_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, backend: lambda x: f(x) + 0.01 * x)
    with pytest.raises(InputError, match="differs"):
        compile_map(attention(), points())


def compiled_as(monkeypatch, wrong):
    monkeypatch.setattr(torch, "compile", lambda f, backend: lambda x: wrong(f, x))


class Linear(nn.Module):
    """x A^T for a matrix that is not symmetric, computed in the precision of x, with parameters of any types."""

    def __init__(self, *dtypes, scale=1.0):
        super().__init__()
        self.unused = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=dtype)) for dtype in dtypes])
        self.scale = scale

    def forward(self, x):
        return self.scale * x @ SHEAR.to(x).mT


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("parameters", "precision", "within", "beyond"),
    [
        ((DOUBLE,), DOUBLE, 1e-9, 1e-7),
        ((SINGLE,), SINGLE, 1e-4, 1e-2),
        ((SINGLE, HALF), SINGLE, 2e-2, 0.2),
        ((torch.float16,), SINGLE, 2e-2, 0.2),
    ],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("n", [1, 4])
def test_a_compiled_map_may_differ_by_the_rounding_of_its_precision(
    monkeypatch, parameters, precision, within, beyond, scale, n
):
    f, x = Linear(*parameters, scale=scale), rows(n, dtype=precision)
    compiled_as(monkeypatch, lambda f, x: (1 + within) * f(x))
    torch.testing.assert_close(compile_map(f, x)(x), (1 + within) * f(x))
    compiled_as(monkeypatch, lambda f, x: (1 + beyond) * f(x))
    with pytest.raises(InputError, match=f"differs from the map by {beyond:.0e}|by {beyond:g}"):
        compile_map(f, x)


def test_a_compiled_map_with_another_derivative_is_refused(monkeypatch):
    compiled_as(monkeypatch, lambda f, x: f(x) + 0.01 * (x - x.detach()))
    with pytest.raises(InputError, match="differs"):
        compile_map(Linear(), rows())


def test_compiled_graphs_keep_their_buffers_within_the_context_only():
    from torch._functorch import config

    with config.patch(donated_buffer=True):
        with reusable_graphs():
            assert config.donated_buffer is False
        assert config.donated_buffer is True
