"""Dense Jacobians against torch.func, in passes of bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from hnkit import InputError, NonFiniteError, RowJacobian, dense_jacobian
from hnkit.jacobian import (
    check_map,
    fill_dense_jacobian,
    math_attention,
    rows_per_pass,
)
from hnkit.maps import Condition, ConditionedMap
from tests.hnkit.functions import DIM, SHEAR, attention, points, rows


class NoBackward(torch.autograd.Function):
    """x^2 with a forward mode only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return x.square()

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no backward here")


def reference(f, x: Tensor) -> Tensor:
    d = x[0].numel()
    with math_attention():
        return vmap(jacrev(lambda z: f(z[None])[0].flatten()))(x).reshape(x.shape[0], d, d)


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 1000])
def test_dense_jacobian(mode: str, chunk: int | None) -> None:
    f, x = attention(), points()
    J = dense_jacobian(f, x, mode=mode, chunk=chunk)
    assert J.dtype == torch.float64
    assert J.shape == (5, DIM, DIM)
    torch.testing.assert_close(J, reference(f, x), rtol=1e-10, atol=1e-12)


def test_dense_falls_back_to_forward_mode() -> None:
    x = points(2)
    expected = torch.diag_embed(2 * x.flatten(1))
    torch.testing.assert_close(dense_jacobian(NoBackward.apply, x), expected)
    with pytest.raises(RuntimeError, match="no backward here"):
        dense_jacobian(NoBackward.apply, x, mode="reverse")


@pytest.mark.parametrize("f", [lambda x: torch.zeros_like(x), lambda x: 0 * x, lambda x: torch.ones_like(x)])
def test_constant_maps_have_a_zero_jacobian(f) -> None:
    x = points(2)
    check_map(f, x)
    for mode in ("reverse", "forward"):
        assert not dense_jacobian(f, x, mode=mode).any()
    operator = RowJacobian(f, x)
    assert not operator.vjp(x.flatten(1)).any()
    assert not operator.jvp(x.flatten(1)).any()


def test_progress_counts_products() -> None:
    done: list[int] = []
    out = torch.empty(5, DIM, DIM)
    fill_dense_jacobian(out, attention(), points(), chunk=4, progress=done.append)
    assert sum(done) == 5 * DIM
    torch.testing.assert_close(out, reference(attention(), points()).float())


def test_bad_options() -> None:
    with pytest.raises(InputError, match="mode 'backward'"):
        dense_jacobian(lambda z: z, points(), mode="backward")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="chunk 0"):
        dense_jacobian(lambda z: z, points(), chunk=0)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_non_finite_names_the_sample(chunk: int) -> None:
    x = points(4, shape=(3,))
    x[2] = 0.0
    with pytest.raises(NonFiniteError, match="sample 2"):
        dense_jacobian(lambda z: z / z.norm(dim=1, keepdim=True), x, chunk=chunk)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(0, 3), "shape"),
        (torch.zeros(3, 0), "shape"),
        (torch.zeros(3, 2, dtype=torch.int64), "int64"),
        (None, "NoneType"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), "sample 1"),
    ],
)
def test_refuses_what_is_no_batch(x, words: str) -> None:
    with pytest.raises(InputError, match=words):
        dense_jacobian(lambda z: z, x)


def test_conditioned_maps_follow_their_rows() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, condition: Condition) -> Tensor:
            return x * condition.tensors["scale"][:, None]

    scale = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    f = ConditionedMap(Scaled(), Condition(("a", "b", "c"), {"scale": scale}))
    x = points(3, shape=(4,))
    for chunk in (1, 2, 5):
        J = dense_jacobian(f, x, chunk=chunk)
        torch.testing.assert_close(J, scale[:, None, None] * torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    check_map(f, x)


@pytest.mark.parametrize(("kind", "elements"), [("cpu", 2**17), ("cuda", 2**19), ("meta", 2**19)])
@pytest.mark.parametrize("dim", [1, 100, 4096, 2**20])
def test_a_pass_holds_as_many_rows_as_its_elements_allow_and_one_at_least(kind, elements, dim):
    rows = rows_per_pass(dim, torch.device(kind))
    assert rows >= 1
    assert rows == 1 or rows * dim <= elements
    assert (rows + 1) * dim > elements


@pytest.mark.parametrize(
    ("n", "dim", "chunk"), [(2, 10, 13), (2, 10, 9), (2, 10, 3), (3, 10, 3), (5, 7, 2), (1, 5, 99)]
)
def test_a_dense_jacobian_takes_the_fewest_passes_of_at_most_chunk_rows(n, dim, chunk):
    sizes = []

    def f(x):
        sizes.append(x.shape[0])
        return x.cumsum(1)

    J = dense_jacobian(f, rows(n, dim), mode="forward", chunk=chunk)
    torch.testing.assert_close(J, torch.ones(dim, dim, dtype=torch.float64).tril().expand(n, dim, dim))
    expected = []
    for start in range(0, n, chunk):
        held = min(chunk, n - start)
        passes = math.ceil(dim / (chunk // held))
        expected += [held * math.ceil(dim / passes)] * passes
    assert sizes == expected
    assert max(sizes) <= chunk


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
def test_one_row_is_a_batch(mode):
    J = dense_jacobian(lambda x: x @ SHEAR.mT, rows(1), mode=mode)
    torch.testing.assert_close(J, SHEAR[None])
