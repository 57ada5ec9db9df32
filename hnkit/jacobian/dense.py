"""J_f(x) of a batch-first map as a dense matrix, in passes of bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.jacobian.operator import RowJacobian, check_batch, check_finite, forward_product, rows_per_pass
from hnkit.maps import NoiseMap, at_rows, slices

Mode = Literal["auto", "reverse", "forward"]


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
    width = chunk or rows_per_pass(x[0].numel(), x.device)
    for part in slices(x.shape[0], width):
        rows = torch.arange(part.start, part.stop, device=x.device)
        arguments = (out[part], f, x, rows, width, samples, progress)
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
    (inner, points), names = at_rows(f, x, index), index if samples is None else samples[index]
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
