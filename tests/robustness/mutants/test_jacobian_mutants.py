"""Small errors in `hnkit/jacobian.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hnkit import InputError, NonFiniteError, RowJacobian, dense_jacobian
from hnkit.jacobian import check_finite, check_map, compile_map, reusable_graphs, rows_per_pass

SHEAR = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0], [0.5, 0.0, 1.0]], dtype=torch.float64)


def points(n=4, d=3, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


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

    J = dense_jacobian(f, points(n, dim), mode="forward", chunk=chunk)
    torch.testing.assert_close(J, torch.ones(dim, dim, dtype=torch.float64).tril().expand(n, dim, dim))
    expected = []
    for start in range(0, n, chunk):
        rows = min(chunk, n - start)
        passes = math.ceil(dim / (chunk // rows))
        expected += [rows * math.ceil(dim / passes)] * passes
    assert sizes == expected
    assert max(sizes) <= chunk


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
def test_one_row_is_a_batch(mode):
    J = dense_jacobian(lambda x: x @ SHEAR.mT, points(1), mode=mode)
    torch.testing.assert_close(J, SHEAR[None])


def test_a_vector_of_values_names_its_first_bad_sample():
    values = torch.tensor([0.0, 1.0, math.nan, math.inf])
    with pytest.raises(NonFiniteError, match="sample 2"):
        check_finite(values, "it")
    with pytest.raises(NonFiniteError, match="sample 7"):
        check_finite(values, "it", torch.tensor([5, 6, 7, 8]))


class Tokens(nn.Module):
    """softmax attention of a row over itself, with a learned key."""

    def __init__(self):
        super().__init__()
        self.key = nn.Parameter(torch.tensor([[0.5, -1.0], [0.2, 0.7]], dtype=torch.float64))
        self.fused = []

    def forward(self, x):
        self.fused.append(torch.backends.cuda.flash_sdp_enabled())
        tokens = x.unflatten(1, (3, 2))
        return nn.functional.scaled_dot_product_attention(tokens, tokens @ self.key, tokens).flatten(1)

    def by_hand(self, row, key):
        tokens = row.unflatten(0, (3, 2))
        return (torch.softmax(tokens @ (tokens @ key).mT / math.sqrt(2), 1) @ tokens).flatten()


def test_products_can_be_differentiated_in_the_parameters_and_there_alone():
    f, x, u = Tokens(), points(4, 6).requires_grad_(), points(4, 6).flip(0)
    product = RowJacobian(f, x, twice=True).vjp(u, create_graph=True)
    product.square().sum().backward()

    def loss(key):
        rows = zip(x.detach(), u, strict=True)
        pulled = [torch.func.vjp(lambda z: f.by_hand(z, key), row)[1](v)[0] for row, v in rows]
        return torch.stack(pulled).square().sum()

    torch.testing.assert_close(f.key.grad, torch.func.grad(loss)(f.key.detach()), rtol=1e-10, atol=1e-12)
    assert x.grad is None


@pytest.mark.parametrize("twice", [False, True])
def test_fused_attention_runs_unless_products_are_to_be_differentiated(twice):
    f, x = Tokens(), points(4, 6)
    with torch.nn.attention.sdpa_kernel([*map(torch.nn.attention.SDPBackend, range(3))]):
        operator = RowJacobian(f, x, twice=twice)
        default = RowJacobian(f, x)
    assert f.fused == [not twice, True]
    torch.testing.assert_close(operator.value, default.value)


def test_products_carry_no_graph_unless_asked():
    f, x = Tokens(), points(4, 6)
    operator = RowJacobian(f, x, twice=True)
    assert not operator.vjp(x).requires_grad
    assert not operator.pull(x).requires_grad
    assert not dense_jacobian(f, x).requires_grad


# Compiled maps: torch.compile is replaced by what could come out of it.


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
    f, x = Linear(*parameters, scale=scale), points(n, dtype=precision)
    compiled_as(monkeypatch, lambda f, x: (1 + within) * f(x))
    torch.testing.assert_close(compile_map(f, x)(x), (1 + within) * f(x))
    compiled_as(monkeypatch, lambda f, x: (1 + beyond) * f(x))
    with pytest.raises(InputError, match=f"differs from the map by {beyond:.0e}|by {beyond:g}"):
        compile_map(f, x)


def test_a_compiled_map_with_another_derivative_is_refused(monkeypatch):
    compiled_as(monkeypatch, lambda f, x: f(x) + 0.01 * (x - x.detach()))
    with pytest.raises(InputError, match="differs"):
        compile_map(Linear(), points())


def test_compiled_graphs_keep_their_buffers_within_the_context_only():
    from torch._functorch import config

    with config.patch(donated_buffer=True):
        with reusable_graphs():
            assert config.donated_buffer is False
        assert config.donated_buffer is True


# Maps that are none.


class Drifting:
    """A map that moves by a step at each call."""

    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self, x):
        self.calls += 1
        return x + self.calls * self.step


@pytest.mark.parametrize("step", [0.1, -0.1])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_a_map_that_drifts_either_way_is_refused(step, dtype):
    with pytest.raises(InputError, match="different values for the same x"):
        check_map(Drifting(step), points(dtype=dtype))


@pytest.mark.parametrize(("dtype", "rounding", "coupling"), [(SINGLE, 1e-5, 0.1), (DOUBLE, 1e-13, 1e-6)])
def test_rows_may_be_coupled_by_rounding_and_no_more(dtype, rounding, coupling):
    x = points(dtype=dtype)
    check_map(lambda x: x + rounding * x.mean(0), x)
    with pytest.raises(InputError, match="couples rows"):
        check_map(lambda x: x + coupling * x.mean(0), x)


def test_rows_coupled_through_what_a_constant_shift_leaves_alone_are_seen():
    with pytest.raises(InputError, match="couples rows"):
        check_map(lambda x: x + 0.1 * nn.functional.layer_norm(x, (3,)).mean(0), points())


def test_a_derivative_that_overflows_is_refused():
    with pytest.raises(NonFiniteError, match="vector-Jacobian product is not finite at sample 0"):
        check_map(lambda x: x + (x - x.detach()) * 1e30 * 1e30, points(dtype=SINGLE))


@pytest.mark.parametrize(
    ("error", "words"), [(ValueError("what went wrong\nand where"), "ValueError: what went wrong$"),
                         (AssertionError(), "AssertionError: AssertionError$")]
)  # fmt: skip
def test_the_first_line_of_what_a_map_raises_is_told(error, words):
    def f(x):
        raise error

    with pytest.raises(InputError, match=words) as caught:
        check_map(f, points())
    assert caught.value.__cause__ is error
