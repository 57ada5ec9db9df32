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
import platform
import sys
import time
from pathlib import Path

import diffusers
import torch
from sana_full import load, random_condition
from torch import Tensor

from hnkit import noise_kl
from hnkit.internal.files import write_json
from hnkit.lipschitz.local import local_norms
from hnkit.maps import ConditionedMap
from hnkit.scaled.pipelines.families.sana import SanaOptions

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "bench-sana-logdet.json"


def randomise(f: ConditionedMap, x: Tensor, norm: float) -> float:
    """Random LoRA factors, the last layer's scaled to the local norm wanted at the first point; returns the norm."""
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
    first = f.select(torch.zeros(1, dtype=torch.long))
    found = float(local_norms(first, x[:1], tolerance=1e-2, cycles=2).value)
    for parameter in last:
        parameter.data.mul_(norm / found)
    return float(local_norms(first, x[:1], tolerance=1e-2, cycles=2).value)


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
    device = torch.device("cpu" if arguments.tiny else "cuda")
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    size = arguments.size or (128 if arguments.tiny else 1024)
    backend = load(
        SanaOptions(size=size, rank=8 if arguments.tiny else 128, cache_dir=""), arguments.tiny, device, dtype
    )
    count = max(2, arguments.samples)
    f = ConditionedMap(backend.hypernetwork, random_condition(backend, count, 40, dtype))
    x = torch.randn(count, *backend.noise_shape, generator=torch.Generator().manual_seed(2)).to(device)
    dim = x[0].numel()
    norm = randomise(f, x, arguments.norm)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, one thread"
    print(f"{machine}; {dtype}; d = {dim:,}; |J(x_0)|_2 = {norm:.3f}")

    probes = {"probes": arguments.probes, "chunk": arguments.chunk, "certify": False}
    began = time.perf_counter()
    estimate = noise_kl(f, x, method="arnoldi", generator=torch.Generator().manual_seed(3), **probes)
    seconds = time.perf_counter() - began
    print(
        f"arnoldi, {count} points: E(J) = {estimate.error:.6g}, KL = {estimate}, {estimate.num_vjp / seconds:.1f} VJP/s"
    )

    first = f.select(torch.zeros(1, dtype=torch.long))
    point = noise_kl(first, x[:1], method="arnoldi", generator=torch.Generator().manual_seed(4), **probes)
    began = time.perf_counter()
    exact = noise_kl(
        first, x[:1], chunk=arguments.chunk, certify=False, progress=lambda *at: bar(*at, began=began)
    )  # fmt: skip
    exact_seconds = time.perf_counter() - began
    print(file=sys.stderr)
    score = (point.error - exact.error) / point.probe_stderr
    print(
        f"at one point: arnoldi {point.error:.6g} +- {point.probe_stderr:.2g}, exact {exact.error:.6g}, "
        f"{score:+.1f} standard errors apart"
    )
    print(f"exact: {dim:,} products and one factorisation in {exact_seconds:.0f} s")
    if arguments.write or arguments.out != RESULT:
        figures = {
            "machine": machine, "dtype": str(dtype), "tiny": arguments.tiny, "size": size, "dim": dim,
            "local_norm": norm,
            "samples": count, "probes": arguments.probes, "error": estimate.error, "kl": estimate.value,
            "kl_stderr": estimate.stderr, "l2": estimate.l2, "symmetry_index": estimate.symmetry_index,
            "steps": estimate.steps, "products_per_second": estimate.num_vjp / seconds,
            "point_error": point.error, "point_probe_stderr": point.probe_stderr, "exact_error": exact.error,
            "exact_seconds": exact_seconds, "score": score,
        }  # fmt: skip
        if device.type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        write_json(arguments.out, figures)


if __name__ == "__main__":
    main()
