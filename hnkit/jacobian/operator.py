"""J_f(x) of a batch-first map as a matrix-free operator, one row of the batch at a time.

The rows of a batch are independent, so one vector-Jacobian product of the whole batch is one product per row. The
network runs in its own precision; every product is returned in float64. Vector-Jacobian products work with any
attention kernel; forward mode and double backward need the mathematical one, see `math_attention`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnkit.errors import InputError, MissingDerivativeError, NonFiniteError
from hnkit.maps import NoiseMap

# Elements (rows x d) of one pass through the network: enough to keep the device busy, small enough for its memory.
_PASS_ELEMENTS = {"cpu": 2**17}
_PASS_ELEMENTS_DEVICE = 2**19


@contextmanager
def math_attention() -> Iterator[None]:
    """Run scaled-dot-product attention through its mathematical definition.

    Fused attention kernels have neither forward-mode derivatives nor a double backward. A graph recorded inside this
    context consists of elementary operations, so it may be differentiated twice anywhere, also after the context.
    """
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def recording() -> Iterator[None]:
    """Record the autograd graph even where the caller switched gradients off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def rows_per_pass(dim: int, device: torch.device) -> int:
    """Rows of width `dim` that go through a network together by default; depends on nothing else."""
    return max(1, _PASS_ELEMENTS.get(device.type, _PASS_ELEMENTS_DEVICE) // dim)


def _not_dense(value: object) -> str | None:
    """What a value is instead of a dense tensor of floating-point numbers; `None` if it is one."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
    return None if value.is_floating_point() else str(value.dtype)


def check_batch(x: Tensor) -> None:
    """Refuse what cannot be a batch of noise.

    Raises:
        InputError: `x` is not a floating-point tensor of shape `(n, *shape)` with at least one row and one entry.
        NonFiniteError: an entry is NaN or infinite.
    """
    if (kind := _not_dense(x)) is not None:
        raise InputError(f"x is {kind}: give a dense floating-point tensor of shape (n, *shape)")
    if x.ndim < 2 or x.numel() == 0:
        raise InputError(f"x has shape {tuple(x.shape)}: give (n, *shape) with at least one row and one entry per row")
    check_finite(x.detach().flatten(1), "x")


def check_finite(values: Tensor, what: str, samples: Tensor | None = None) -> None:
    """Raise `NonFiniteError`, naming the first sample, unless `values` of shape `(rows, ...)` are all finite.

    Args:
        values: shape `(rows, ...)`.
        what: what the values are, for the message.
        samples: `(rows,)` the sample each row belongs to; `None`: row i is sample i.
    """
    if bool(torch.isfinite(values.sum())):
        return  # one pass instead of several; a sum that overflows is looked at again
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    row = int((~finite.flatten(1).all(1) if values.ndim > 1 else ~finite).nonzero()[0])
    sample = row if samples is None else int(samples[row])
    raise NonFiniteError(f"{what} is not finite at sample {sample}: check the map there, or its precision")


def evaluate(f: NoiseMap, x: Tensor) -> Tensor:
    """`f(x)`, checked to be a floating-point tensor of the shape of `x`."""
    y = f(x)
    if (kind := _not_dense(y)) is not None:
        raise InputError(f"the map returned {kind}: it must return a dense floating-point tensor like its input")
    if y.shape != x.shape:
        raise InputError(
            f"the map returned shape {tuple(y.shape)} for input {tuple(x.shape)}: f(x) must have the shape of x"
        )
    return y


def is_constant_at(f: NoiseMap, x: Tensor) -> bool:
    """Whether `f` ignores its input near `x`, judged by a finite change of every entry.

    A constant map legitimately leaves no gradient (`J = 0`); a map that detaches its input leaves none either, but
    changes with it.
    """
    with torch.no_grad():
        return bool(torch.equal(evaluate(f, x), evaluate(f, x + 0.25)))


_NO_GRADIENT = (
    "the map changes with x but returns no gradient with respect to it: remove detach(), no_grad(), numpy() or integer "
    "conversions from the map"
)


class RowJacobian:
    """J of `f` at each row of `x`, as an operator on `(rows, d)` vectors.

    The graph of `f` is recorded once and reused by every `vjp`. A `jvp` runs forward-mode differentiation, or double
    backward where an operation of the map has no forward mode.

    Args:
        f: batch-first map, rows independent.
        x: `(rows, *shape)`.
        samples: `(rows,)` sample that each row belongs to, for error messages; `None`: row i is sample i.
        twice: record the graph so that products can be differentiated again (used by the losses).

    Attributes:
        rows: number of rows.
        dim: entries per row, `d`.
        num_vjp: transposed products so far, counted per row.
        num_jvp: products so far, counted per row.
        value: `f(x)` as `(rows, d)`, float64, detached.

    Raises:
        InputError: `f(x)` is no tensor of the shape of `x`, or carries no gradient.
        NonFiniteError: `f(x)` is not finite; the message names the sample.
    """

    def __init__(self, f: NoiseMap, x: Tensor, *, samples: Tensor | None = None, twice: bool = False) -> None:
        self._f = f
        self._samples = samples
        self.rows = x.shape[0]
        self.dim = x[0].numel()
        self.num_vjp = 0
        self.num_jvp = 0
        self._dual_jvp: Callable[[Tensor], Tensor] | None = None
        with recording():
            self._x = x.detach().clone().requires_grad_()
            if twice:
                with math_attention():
                    self.output = evaluate(f, self._x)
            else:
                self.output = evaluate(f, self._x)
        self.value = self.output.detach().reshape(self.rows, self.dim).double()
        check_finite(self.value, "f(x)", samples)
        self._constant = False
        if not self.output.requires_grad:
            self._require_constant()

    def leaves(self) -> list[Tensor]:
        """The parameters of the map: what `f(x)` was computed from and collects gradients, but for the noise."""
        return graph_leaves(self.output, self._x)

    def _require_constant(self) -> None:
        if not is_constant_at(self._f, self._x):
            raise InputError(_NO_GRADIENT)
        self._constant = True

    def _checked(self, product: Tensor, what: str) -> Tensor:
        result = product.reshape(self.rows, self.dim).double()
        check_finite(result, what, self._samples)
        return result

    def vjp(self, u: Tensor, *, create_graph: bool = False) -> Tensor:
        """`J^T u` for every row.

        Args:
            u: `(rows, d)`, any floating-point type.
            create_graph: return a tensor that can be differentiated with respect to the map's parameters; needs
                `twice=True` at construction.

        Returns:
            `(rows, d)`, float64, detached unless `create_graph`.

        Raises:
            NonFiniteError: the product is not finite; the message names the sample.
        """
        product = self.pull(u, create_graph=create_graph)
        with recording():
            result = product.reshape(self.rows, self.dim).double()
        return result if create_graph else result.detach()

    def pull(self, u: Tensor, *, create_graph: bool = False) -> Tensor:
        """As `vjp`, in the shape and precision of x."""
        self.num_vjp += self.rows
        if self._constant:
            return torch.zeros_like(self._x)
        cotangent = u.to(self.output).reshape(self.output.shape)
        with recording():
            (product,) = torch.autograd.grad(
                self.output, self._x, cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        if product is None:
            self._require_constant()
            return torch.zeros_like(self._x)
        check_finite(product.detach().flatten(1), "a vector-Jacobian product", self._samples)
        return product

    def jvp(self, v: Tensor) -> Tensor:
        """`J v` for every row; `v` and the result are `(rows, d)`, the result float64.

        Raises:
            NonFiniteError: the product is not finite; the message names the sample.
            MissingDerivativeError: the map supports neither forward mode nor double backward.
        """
        self.num_jvp += self.rows
        if self._constant:
            return torch.zeros_like(v, dtype=torch.float64)
        tangent = v.to(self._x).reshape(self._x.shape)
        if self._dual_jvp is None:
            try:
                product = forward_product(self._f, self._x.detach(), tangent)
            except (RuntimeError, NotImplementedError, InputError):  # or it lost the tangent on the way
                self._dual_jvp = self._record_double_backward()
            else:
                return self._checked(product, "a Jacobian-vector product")
        return self._checked(self._dual_jvp(tangent), "a Jacobian-vector product")

    def _record_double_backward(self) -> Callable[[Tensor], Tensor]:
        # u -> J^T u is linear, so differentiating <J^T u, v> with respect to u gives J v at any u.
        try:
            with recording(), math_attention():
                x = self._x.detach().clone().requires_grad_()
                y = evaluate(self._f, x)
                u = torch.zeros_like(y, requires_grad=True)
                (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
                require_differentiable_again(pulled)
                torch.autograd.grad(pulled, u, torch.zeros_like(pulled), retain_graph=True)
        except RuntimeError as error:
            raise MissingDerivativeError(
                f"the map supports neither forward mode nor double backward ({str(error).splitlines()[0]}): choose a "
                "method that needs vector-Jacobian products only, such as arnoldi"
            ) from error

        def product(tangent: Tensor) -> Tensor:
            (result,) = torch.autograd.grad(pulled, u, tangent.to(pulled), retain_graph=True)
            return result

        return product


def require_differentiable_again(gradient: Tensor) -> None:
    """Refuse a gradient some part of which is the work of a `once_differentiable` function.

    torch puts a node that raises behind that part, with no edge to its inputs. A second derivative with respect to
    these passes the node over, and is silently that of the other parts alone.

    Raises:
        RuntimeError: as torch does where it meets such a node.
    """
    waiting, seen = [gradient.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a function in it is marked with once_differentiable")
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]


def graph_leaves(output: Tensor, noise: Tensor | None = None) -> list[Tensor]:
    """The tensors that `output` was computed from and that collect gradients, but for the noise itself."""
    found: dict[int, Tensor] = {}
    seen = set()
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not noise:
            found[id(variable)] = variable
        pending += [parent for parent, _ in node.next_functions]
    return list(found.values())


def forward_product(f: NoiseMap, x: Tensor, tangent: Tensor) -> Tensor:
    """`J_f(x) tangent` by forward-mode differentiation, detached; all three of shape `(rows, *shape)`."""
    with torch.inference_mode(False), torch.no_grad(), math_attention(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), tangent.to(x))  # type: ignore[no-untyped-call]
        unpacked = forward_ad.unpack_dual(evaluate(f, dual))  # type: ignore[no-untyped-call]
    product: Tensor | None = unpacked.tangent
    if product is None:
        if not is_constant_at(f, x):
            raise InputError(_NO_GRADIENT)
        return torch.zeros_like(x)
    return product.detach()  # a map may switch gradients on
