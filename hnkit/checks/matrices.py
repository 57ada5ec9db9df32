"""The checks of `verify-bound --certify`: bounds proved in ball arithmetic for the very matrices that were met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hnkit.bounds import BOUNDS
from hnkit.checks.check import Check, Finding, Registry, worst
from hnkit.errors import NotApplicable
from hnkit.figures.measured_map import MeasuredMap
from hnkit.jacobian import dense_jacobian
from hnkit.linalg.enclosures import BallCertificate, certify_bounds
from hnkit.logdet import log_det_error

CERTIFIED_CHECKS = Registry()

MAX_DIM = 64
"""Above so many dimensions the enclosures take minutes."""

_WORK = 2**17  # d^3 operations on balls, over all matrices of one map: about ten seconds
_MATRICES = 4


@dataclass
class Certified:
    """The first few dense Jacobians of a map, with their certificates.

    Args:
        measured: the map.
    """

    measured: MeasuredMap

    @cached_property
    def jacobians(self) -> Tensor:
        """`(m, d, d)` float64."""
        if self.measured.dim > MAX_DIM:
            raise NotApplicable(f"ball arithmetic is tried up to d = {MAX_DIM}; here d = {self.measured.dim}")
        count = max(1, min(_MATRICES, _WORK // self.measured.dim**3))
        return dense_jacobian(*self.measured.first(count)).cpu()

    @cached_property
    def certificates(self) -> list[BallCertificate]:
        """One for each Jacobian, with the map's certified constant as L where that is below 1."""
        constant = self.measured.certified_constant
        lipschitz = constant if constant is not None and constant < 1 else None
        return [certify_bounds(J, lipschitz=lipschitz) for J in self.jacobians]


@CERTIFIED_CHECKS.add(
    "certified-error",
    "E(J) in floating point lies in its ball enclosure, widened by 100 units of rounding",
    proof="theorem_7_bound",
)
def certified_error(certified: Certified) -> Finding:
    """The largest distance of `log_det_error` from the enclosure, relative to `|tr J| + |log|det(I+J)||`."""
    deviation = 0.0
    for J, record in zip(certified.jacobians, certified.certificates, strict=True):
        value = float(log_det_error(J))
        outside = worst(record.error.lower - value, value - record.error.upper, 0.0)
        size = abs(value) + abs(record.trace.upper) + abs(record.log_abs_det.upper)
        deviation = worst(deviation, outside / size if size > 0 else outside)
    first = certified.certificates[0]
    note = f"E(J) in [{first.error.lower!r}, {first.error.upper!r}] at the first sample"
    return Finding(deviation, 0.0, 100 * torch.finfo(torch.float64).eps, "<=", note)


def _bound(name: str, text: str, proof: str) -> None:
    """Add the check of one inequality: the largest proved share of the bound over the matrices."""

    def measure(certified: Certified) -> Finding:
        records = [certificate.bounds[name] for certificate in certified.certificates if name in certificate.bounds]
        records = [record for record in records if record.verdict != "not applicable"]
        if not records:
            notes = [c.bounds[name].note for c in certified.certificates if name in c.bounds]
            raise NotApplicable(notes[0] if notes else "no certified constant below 1")
        share, held = 0.0, True
        for record in records:
            held = held and record.verdict == "holds"
            if record.value is None or record.bound is None:
                continue
            if (
                record.verdict == "fails"
            ):  # proved false: say by how much, and fail whatever the rounding of the quotient
                excess = record.value.lower - record.bound.upper
                return Finding(max(excess, math.ulp(0.0)), 0.0, 0.0, "<=", "the inequality is proved false")
            share = worst(share, 0.0 if record.bound.lower <= 0 else record.value.upper / record.bound.lower)
        bits = max(certificate.precision for certificate in certified.certificates)
        note = f"proved for {len(records)} matrices with {bits} bits" if held else "attained, or undecided: no proof"
        return Finding(share if not share > 1 else 1.0, 1.0, 0.0, "<=", note, certified=held)

    CERTIFIED_CHECKS.add(f"certified-{name.replace(', ', '-').replace(' ', '-')}", text, proof=proof)(measure)


_bound("norm", "|J|₂ ≤ the certified Lipschitz constant, in ball arithmetic", "estimates_certificates")
for _name, _entry in BOUNDS.items():
    _bound(_name, f"{_entry.statement}, in ball arithmetic", _entry.proof)


def certified_checks(measured: MeasuredMap) -> list[Check]:
    """Enclosures of E(A) and its bounds in ball arithmetic, as checks; needs python-flint."""
    return list(CERTIFIED_CHECKS.run(Certified(measured), measured.name))
