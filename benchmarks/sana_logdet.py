"""E(J) of a real SANA-Sprint hypernetwork: Arnoldi with its error bar, and the exact log-determinant at one point.

    python benchmarks/sana_logdet.py                        # full size on a GPU: 0.6B transformer, 1024 px, d = 32,768
    python benchmarks/sana_logdet.py --tiny                 # the same script on the CPU, small layers, d = 512
    python benchmarks/sana_logdet.py --tiny --size 256      # d = 2,048

Random weights of the published configuration; the LoRA factors are random too, and the last layer's is scaled so that
the local norm |J(x)|_2 at the first point is `--norm` (the delta is linear in it). The exact matrix is streamed into
one preallocated d x d array in float64 and factored in place. `--write` puts the figures into docs/results/.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from full_size import Model, condition, machine, make
from torch import Tensor

from hnkit import noise_kl
from hnkit.internal.files import write_json
from hnkit.internal.stats import Estimate
from hnkit.lipschitz.local import local_norms
from hnkit.maps import ConditionedMap

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "bench-sana-logdet.json"
_PASSES = 8
"""Passes after which the pace of the others is known."""


@dataclass(frozen=True)
class Subject:
    """A hypernetwork with random LoRA factors, and points.

    Attributes:
        f: the map; its weights collect no gradients, so that a graph of it keeps no activations for them.
        x: the points, the first of which has the local norm.
        norm: that norm.
        size: image side in pixels.
        dtype: of the network.
    """

    f: ConditionedMap
    x: Tensor
    norm: float
    size: int
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        """Noise dimension d."""
        return self.x[0].numel()


class TooLongError(Exception):
    """The exact log-determinant would not be ready in time; `seconds` is what it would take."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"it would take {seconds:.0f} s")
        self.seconds = seconds


def subject(model: Model, size: int, count: int, norm: float) -> Subject:
    """The hypernetwork of a model at an image size, with `count` points."""
    backend = model.backend(size=size, lora_autocast=True)
    f = ConditionedMap(backend.hypernetwork, condition(backend, count))
    x = torch.randn(count, *backend.noise_shape, generator=torch.Generator().manual_seed(2)).to(backend.device)
    return Subject(f, x, randomise(f, x, norm), size, backend._base.dtype)


def randomise(f: ConditionedMap, x: Tensor, norm: float) -> float:
    """Random LoRA factors, the last layer's scaled to the local norm wanted at the first point; returns the norm.

    The delta is linear in the last layer's factor, and so is the norm.
    """
    generator = torch.Generator().manual_seed(1)
    last = []
    for name, parameter in f.hypernetwork.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            value = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            parameter.data.copy_(0.1 * value)
            if "proj_out" in name:
                last.append(parameter)
    if not last:
        raise SystemExit("the last layer has no LoRA factor: this is not the configuration the script is made for")
    f.hypernetwork.requires_grad_(False)
    first = f.select(torch.zeros(1, dtype=torch.long))
    found = float(local_norms(first, x[:1], tolerance=1e-2, cycles=2).value)
    for parameter in last:
        parameter.data.mul_(norm / found)
    return norm


def estimated(case: Subject, probes: int, chunk: int | None) -> dict[str, Any]:
    """E(J) and the KL over all points by Arnoldi, and the products per second."""
    began = time.perf_counter()
    options: dict[str, Any] = {"probes": probes, "chunk": chunk, "certify": False, "check": False}
    estimate = noise_kl(case.f, case.x, method="arnoldi", generator=torch.Generator().manual_seed(3), **options)
    seconds = time.perf_counter() - began
    return {
        "dtype": str(case.dtype), "size": case.size, "dim": case.dim, "local_norm": case.norm,
        "samples": len(case.x), "probes": probes, "error": estimate.error, "kl": estimate.value,
        "error_stderr": Estimate.of(estimate.parts.error).stderr, "kl_stderr": estimate.stderr, "l2": estimate.l2,
        "symmetry_index": estimate.symmetry_index, "steps": estimate.steps,
        "products_per_second": estimate.num_vjp / seconds,
    }  # fmt: skip


def exact_at_first(
    case: Subject, probes: int, chunk: int | None, most: float = float("inf"), tell: Callable[..., None] | None = None
) -> dict[str, Any]:
    """E(J) at the first point, exactly and by Arnoldi.

    Raises:
        TooLongError: it would take more than `most` seconds, by the pace of its first products.
    """
    first = case.f.select(torch.zeros(1, dtype=torch.long))
    options: dict[str, Any] = {"chunk": chunk, "certify": False, "check": False}
    began = time.perf_counter()
    point = noise_kl(
        first, case.x[:1], method="arnoldi", probes=probes, generator=torch.Generator().manual_seed(4), **options
    )
    marks: list[tuple[float, int]] = []

    def paced(done: int, total: int) -> None:
        if case.x.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        marks.append((now, done))
        start, before = marks[0]
        if len(marks) > _PASSES:  # counted from the second: the first pass warms up
            left = (now - start) / (done - before) * (total - done)
            if now - began + left > most:
                raise TooLongError(now - began + left)
        if tell is not None:
            tell(done, total, began=began)

    began = time.perf_counter()
    exact = noise_kl(first, case.x[:1], progress=paced, **options)
    return {
        "exact_size": case.size, "exact_dim": case.dim, "exact_error": exact.error,
        "exact_seconds": time.perf_counter() - began, "point_error": point.error,
        "point_probe_stderr": point.probe_stderr, "point_probes": probes,
        "score": (point.error - exact.error) / point.probe_stderr,
    }  # fmt: skip


def bar(done: int, total: int, *, began: float) -> None:
    """One line with the time left."""
    spent = time.perf_counter() - began
    left = spent / done * (total - done)
    print(f"\r{done:,} of {total:,}, {spent:.0f} s spent, {left:.0f} s left ", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print; write the figures with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small layers, for a machine without a GPU")
    parser.add_argument("--size", type=int, help="image side in pixels; default 1024 (tiny: 128)")
    parser.add_argument("--norm", type=float, default=0.3, help="local norm at the first point")
    parser.add_argument("--samples", type=int, default=4, help="points of the stochastic estimate, 2 or more")
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--chunk", type=int, help="rows per pass; default: chosen from d and the device")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--out", type=Path, default=RESULT, help="where --write writes; given, it is written")
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("the full size needs a GPU: use --tiny here")
    size = arguments.size or (128 if arguments.tiny else 1024)
    case = subject(sana(arguments.tiny), size, max(2, arguments.samples), arguments.norm)
    print(f"{machine(arguments.tiny)}; {case.dtype}; d = {case.dim:,}; |J(x_0)|_2 = {case.norm:.3f}")
    found = estimated(case, arguments.probes, arguments.chunk)
    print(
        f"arnoldi, {found['samples']} points: E(J) = {found['error']:.6g} +- {found['error_stderr']:.2g}, "
        f"KL = {found['kl']:.6g} +- {found['kl_stderr']:.2g}, {found['products_per_second']:.1f} VJP/s"
    )
    found |= exact_at_first(case, arguments.probes, arguments.chunk, tell=bar)
    print(file=sys.stderr)
    print(
        f"at one point: arnoldi {found['point_error']:.6g} +- {found['point_probe_stderr']:.2g}, exact "
        f"{found['exact_error']:.6g}, {found['score']:+.1f} standard errors apart"
    )
    print(f"exact: {case.dim:,} products and one factorisation in {found['exact_seconds']:.0f} s")
    if arguments.write or arguments.out != RESULT:
        figures = {"machine": machine(arguments.tiny), "tiny": arguments.tiny, **found}
        if not arguments.tiny:
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        write_json(arguments.out, figures)


def sana(tiny: bool) -> Model:
    """SANA-Sprint 0.6B, or small layers of the same classes."""
    return make("sana", tiny, **({"rank": 8, "lora_alpha": 16.0} if tiny else {}))


if __name__ == "__main__":
    main()
