"""Maps through `torch.compile`, compared with the map itself before they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.jacobian.operator import RowJacobian
from hnkit.maps import ConditionedMap, NoiseMap


def compile_map(f: NoiseMap, x: Tensor, backend: str = "inductor") -> NoiseMap:
    """`f` through `torch.compile`, after its value and a product with its Jacobian agreed with those of `f` itself.

    Compiled graphs have no forward mode and no double backward: vector-Jacobian products only.

    Args:
        f: the map; of a `ConditionedMap` its network is compiled.
        x: `(n, *shape)` points to compare at.
        backend: the backend of `torch.compile`.

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
