"""Maps that rise in steps narrower than samples lie apart, whose slopes a mean over the samples misses.

As the temperature falls, the optimal map becomes such a map: it jumps from mode to mode of the tilted law. Then
`E[tr J]` lives on a set that samples hardly ever hit, its standard error says nothing, and a test of it neither.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from hnkit.checks.check import Finding, mean_finding
from hnkit.errors import NotApplicable
from hnkit.jacobian import dense_jacobian
from hnkit.maps import NoiseMap

_FINE, _BROAD = 1e-6, 0.1
_MOST_DIMENSIONS = 64


def explained_by_steps(finding: Finding, f: NoiseMap, x: Tensor, *, continuous: bool) -> Finding:
    """A finding about `E[tr J]` by a mean over samples; where it fails, whether steps of `f` are the reason.

    They are if Stein's identity fails with the traces at the samples, although those are right by secants of length
    2e-6, and holds with the slopes of secants of length 0.2, which see every step. An error in the code that made the
    finding is none of this: everything is computed from `f` again.

    Args:
        finding: what was found.
        f: the map.
        x: `(n, *shape)` samples; the reason is looked for in float64 and up to 64 dimensions.
        continuous: whether `f` is known to be so, and the identity to hold. The map that the caller cannot vouch for
            keeps its verdict, since its KL from these samples is as wrong.

    Returns:
        The finding, with the reason in its note if it is known.

    Raises:
        NotApplicable: the finding fails, the steps explain it, and `f` is continuous.
    """
    dim = x[0].numel()
    if finding.slack >= 0 or not math.isfinite(finding.slack) or x.dtype != torch.float64 or dim > _MOST_DIMENSIONS:
        return finding
    traces = dense_jacobian(f, x).diagonal(dim1=1, dim2=2).sum(1)
    with torch.no_grad():
        alignment = (x * f(x)).flatten(1).sum(1)
        fine, broad = (_secant_traces(f, x, h) for h in (_FINE, _BROAD))
    # The broad secants smooth the density of x as well, by h^2/6 (c^2 - 1) of a step at c: a hundredth at c = 3.
    seen = mean_finding(alignment - broad, 0.0, floor=0.02 * float(broad.abs().mean()))
    off = (traces - fine).abs() / (1e-3 + fine.abs())
    missed = mean_finding(alignment - traces, 0.0)
    if not (seen.slack >= 0 and float(off.median()) < 1e-4 and missed.slack < 0):
        return finding
    reason = (
        f"the map rises in steps that {len(x)} samples do not resolve: E[tr J] is "
        f"{float(broad.mean()):.3g} by secants of length {2 * _BROAD:g}, {float(traces.mean()):.3g} by the samples"
    )
    if continuous:
        raise NotApplicable(reason)
    return replace(finding, note=reason)


def _secant_traces(f: NoiseMap, x: Tensor, h: float) -> Tensor:
    """Sum over the coordinates i of the slope of `f_i` along secants of length 2h: `(n,)`."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for i in range(x[0].numel()):
        step = torch.zeros_like(x[0])
        step.flatten()[i] = h
        total += (f(x + step) - f(x - step)).flatten(1)[:, i] / (2 * h)
    return total
