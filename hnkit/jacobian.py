"""J_f(x) of a batch-first map, as a matrix-free operator and as a dense matrix.

The rows of a batch are independent, so one vector-Jacobian product of the whole batch is one product per row. The
network runs in its own precision; every product is returned in float64. Vector-Jacobian products work with any
attention kernel; forward mode and double backward need the mathematical one, see `math_attention`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnkit.errors import InputError, MissingDerivativeError, NonFiniteError
from hnkit.maps import ConditionedMap, NoiseMap, select_rows

Mode = Literal["auto", "reverse", "forward"]

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


def check_batch(x: Tensor) -> None:
    """Refuse what cannot be a batch of noise.

    Raises:
        InputError: `x` is not a floating-point tensor of shape `(n, *shape)` with at least one row and one entry.
        NonFiniteError: an entry is NaN or infinite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"x is {kind}: give a floating-point tensor of shape (n, *shape)")
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
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = str(y.dtype) if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"the map returned {kind}: it must return a floating-point tensor like its input")
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
            except (RuntimeError, NotImplementedError):
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


def dense_jacobian(f: NoiseMap, x: Tensor, *, mode: Mode = "auto", chunk: int | None = None) -> Tensor:
    """The Jacobian of every row as a dense matrix, by `d` products per row in passes of bounded memory.

    Reverse mode records the graph of replicated rows once and pulls `d` basis vectors back through it; forward mode
    pushes them through. For a square Jacobian reverse mode is the cheaper of the two (its forward part is paid once),
    so `"auto"` uses it wherever the map supports it.

    Args:
        f: batch-first map, rows independent.
        x: `(n, *shape)`.
        mode: `"auto"`, `"reverse"` or `"forward"`.
        chunk: rows per pass through the network, which bounds the memory beside the result; `None`: about 2^17
            noise entries on the CPU, 2^19 on an accelerator.

    Returns:
        `(n, d, d)` in float64, `[i, j, k] = d f_j / d x_k` at row `i`.

    Raises:
        InputError: a bad argument, or a map without gradient.
        NonFiniteError: a non-finite Jacobian; the message names the sample.
    """
    check_batch(x)
    n, dim = x.shape[0], x[0].numel()
    result = torch.empty(n, dim, dim, dtype=torch.float64, device=x.device)
    fill_dense_jacobian(result, f, x, mode=mode, chunk=chunk)
    return result


def fill_dense_jacobian(
    out: Tensor,
    f: NoiseMap,
    x: Tensor,
    *,
    mode: Mode = "auto",
    chunk: int | None = None,
    samples: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the Jacobians of the rows of `x` into `out` of shape `(n, d, d)` and any floating-point type.

    As `dense_jacobian`, for a matrix that the caller allocated. `samples` names the rows in error messages;
    `progress` is called with the number of products finished since its last call.
    """
    if mode not in ("auto", "reverse", "forward"):
        raise InputError(f"unknown mode {mode!r}: accepted are auto, reverse, forward")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk {chunk} is not positive: give the number of rows per pass, or None")
    n, dim = x.shape[0], x[0].numel()
    width = chunk or rows_per_pass(dim, x.device)
    for start in range(0, n, width):
        rows = torch.arange(start, min(n, start + width), device=x.device)
        arguments = (out[rows[0] : rows[-1] + 1], f, x, rows, width, samples, progress)
        try:
            _fill(*arguments, forward=mode == "forward")
        except InputError:
            raise
        except (RuntimeError, NotImplementedError):
            if mode != "auto":
                raise
            _fill(*arguments, forward=True)


def _replicas(dim: int, rows: int, width: int) -> int:
    """Basis vectors per pass: at most `width` rows in all, and passes of equal size."""
    passes = -(-dim // max(1, width // rows))
    return -(-dim // passes)


def _basis_block(like: Tensor, rows: int, replicas: int, start: int, dim: int) -> Tensor:
    """Basis vectors `start ... start + replicas - 1` (zero beyond `dim`) for each of `rows` rows."""
    block = torch.zeros(rows, replicas, dim, dtype=like.dtype, device=like.device)
    index = torch.arange(min(replicas, dim - start), device=like.device)
    block[:, index, start + index] = 1.0
    return block


def _fill(
    out: Tensor,
    f: NoiseMap,
    x: Tensor,
    rows: Tensor,
    width: int,
    samples: Tensor | None,
    progress: Callable[[int], None] | None,
    forward: bool,
) -> None:
    """The Jacobians of one pass of `rows`: their rows by vector-Jacobian products, or their columns if `forward`."""
    count, dim = rows.numel(), x[0].numel()
    replicas = _replicas(dim, count, width)
    index = rows.repeat_interleave(replicas)
    inner, points, names = select_rows(f, index), x[index], index if samples is None else samples[index]
    operator = None if forward else RowJacobian(inner, points, samples=names)
    target = out.mT if forward else out
    for start in range(0, dim, replicas):
        stop = min(dim, start + replicas)
        basis = _basis_block(points, count, replicas, start, dim).reshape(points.shape)
        if operator is not None:
            products = operator.pull(basis)
        else:
            products = forward_product(inner, points, basis)
            check_finite(products.flatten(1), "a Jacobian-vector product", names)
        target[:, start:stop] = products.reshape(count, replicas, dim)[:, : stop - start]
        if progress is not None:
            progress((stop - start) * count)


def compile_map(f: NoiseMap, x: Tensor, backend: str = "inductor") -> NoiseMap:
    """`f` through `torch.compile`, after its value and a product with its Jacobian agreed with those of `f` itself.

    Compiled graphs have no forward mode and no double backward: vector-Jacobian products only.

    Args:
        f: the map; of a `ConditionedMap` its network is compiled.
        x: `(n, *shape)` points to compare at.
        backend: of `torch.compile`.

    Raises:
        InputError: the map does not compile, or the compiled one differs by more than the rounding of its precision.
    """
    inner = f.hypernetwork if isinstance(f, ConditionedMap) else f
    try:
        quick = torch.compile(inner, backend=backend)
        compiled: NoiseMap = replace(f, hypernetwork=cast(Any, quick)) if isinstance(f, ConditionedMap) else quick
        probe = torch.ones(x.shape[0], x[0].numel(), device=x.device)
        expected, found = RowJacobian(f, x), RowJacobian(compiled, x)
        pairs = [(expected.value, found.value), (expected.vjp(probe), found.vjp(probe))]
    except (RuntimeError, TypeError) as error:
        raise InputError(f"the map does not compile ({str(error).splitlines()[0]}): drop compile") from error
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in getattr(inner, "parameters", tuple)())
    tolerance = 5e-2 if half else 1e-8 if x.dtype == torch.float64 else 1e-3
    for reference, value in pairs:
        error_norm, scale = float((value - reference).norm()), float(reference.norm())
        if error_norm > tolerance * scale:
            raise InputError(
                f"the compiled map differs from the map by {error_norm / scale:.2g} of its size: drop compile"
            )
    return compiled


@contextmanager
def reusable_graphs() -> Iterator[None]:
    """Let compiled graphs be pulled through more than once; they free their buffers otherwise."""
    from torch._functorch import config  # torch.compile has no public switch for this

    with config.patch(donated_buffer=False):
        yield


def check_map(f: NoiseMap, x: Tensor, *, rows: int = 8) -> None:
    """Refuse a map that is no batch-first, row-wise, deterministic, differentiable `f(x) -> delta`.

    Costs a handful of evaluations on the first `rows` rows of `x`.

    Args:
        f: the map.
        x: `(n, *shape)` points to try it at.
        rows: at most this many rows are used.

    Raises:
        InputError: the map raises, returns another shape or type, is not a function of its input (dropout), mixes
            rows or depends on a row's position (batch normalisation in training mode, a condition without
            `select(index)`), or is not differentiable.
        NonFiniteError: f(x) or its derivative is not finite; the message names the sample.
    """
    check_batch(x)
    if not callable(f):
        raise InputError(f"the map is {type(f).__name__}: give a callable f(x) -> delta")
    index = torch.arange(min(rows, x.shape[0]), device=x.device)
    if index.numel() == 1:
        index = index.repeat(2)
    points = x.detach()[index]
    changed = points.clone()
    changed[-1] = 0.5 - changed[-1]
    back = index.flip(0)
    try:
        with torch.no_grad():
            whole = select_rows(f, index)
            first = evaluate(whole, points)
            again = evaluate(whole, points)
            perturbed = evaluate(whole, changed)
            reversed_rows = evaluate(select_rows(f, back), points.flip(0)).flip(0)
        check_finite(first.flatten(1), "f(x)", index)
        if not _same(first, again):
            raise InputError(
                "the map returns different values for the same x: switch dropout off (eval mode) or fix its randomness"
            )
        if not _same(first[:-1], perturbed[:-1]):
            raise InputError(
                "the map couples rows: changing one row changes others (batch normalisation in training mode?); rows "
                "must be independent, call eval() or use another normalisation"
            )
        if not _same(first, reversed_rows):
            raise InputError(
                "the map depends on the position of a row: if it closes over per-row conditions, give it a method "
                "select(index) that returns the map of those rows"
            )
        operator = RowJacobian(whole, points, samples=index)
        operator.vjp(torch.ones(points.shape[0], operator.dim, device=x.device))
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:  # the user's map may raise anything: say so in one line, keep the cause
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the map failed on input {tuple(points.shape)}: {type(error).__name__}: {reason}") from error


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding; all evaluations compared have one batch size, hence the same kernels."""
    scale = max(float(a.abs().max()), float(b.abs().max()))
    tolerance = 1e-10 if a.dtype == torch.float64 else 2e-3
    return float((a.double() - b.double()).abs().max()) <= tolerance * scale
