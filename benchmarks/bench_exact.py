"""The exact KL against what one would write first, and against the cost of its products alone.

    pytest -m '' benchmarks/bench_exact.py -s          measure, print, and check the ratios
    python benchmarks/bench_exact.py                   measure and write docs/results/bench-exact.json

`naive` is `vmap(jacrev(f))` followed by `slogdet`; `products` are n d bare vector-Jacobian products at the batch size
that is fastest for them. Each is measured in a process of its own: CPU seconds (the better of two calls), and the
growth of the peak resident memory in the first call.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "bench-exact.json"
CASES = {"mlp": "MLP, d = 256, n = 64", "conv": "convolutions, d = 768, n = 16"}
METHODS = ("hnkit", "naive", "products")
BATCHES = (128, 256, 512, 1024)


def case(name: str) -> tuple[nn.Module, Tensor]:
    """The map and the noise of a case."""
    torch.manual_seed(0)
    if name == "mlp":
        layers = [nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 256)]
        return nn.Sequential(*layers).eval(), torch.randn(64, 256)
    widths = (3, 16, 16, 3)
    layers = []
    for i in range(3):
        layers += [nn.Conv2d(widths[i], widths[i + 1], 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1]).eval(), torch.randn(16, 3, 16, 16)


def hnkit(f: nn.Module, x: Tensor) -> object:
    """The exact KL; what the others do not do, trying the map and looking for certificates, is switched off."""
    from hnkit import noise_kl

    return noise_kl(f, x, check=False, certify=False).value


def naive(f: nn.Module, x: Tensor) -> object:
    """The same number by the shortest code."""
    dim = x[0].numel()
    J = torch.func.vmap(torch.func.jacrev(lambda z: f(z[None])[0].flatten()))(x).reshape(len(x), dim, dim).double()
    trace = J.diagonal(dim1=1, dim2=2).sum(1)
    log_det = torch.linalg.slogdet(torch.eye(dim, dtype=torch.float64) + J).logabsdet
    return float((f(x).flatten(1).double().square().sum(1) / 2 + trace - log_det).detach().mean())


def products(batch: int) -> Callable[[nn.Module, Tensor], object]:
    """As many as n d vector-Jacobian products, `batch` rows at a time, and nothing else."""

    def run(f: nn.Module, x: Tensor) -> object:
        total = x.shape[0] * x[0].numel()
        rows = x.repeat(-(-batch // x.shape[0]), *[1] * (x.ndim - 1))[:batch].requires_grad_()
        y = f(rows)
        cotangent = torch.ones_like(y)
        for _ in range(-(-total // batch)):
            torch.autograd.grad(y, rows, cotangent, retain_graph=True)
        return None

    return run


def child(name: str, method: str) -> None:
    """Measure one method in this process and print the figures as JSON."""
    torch.set_num_threads(1)
    f, x = case(name)
    candidates = {b: products(b) for b in BATCHES} if method == "products" else {0: globals()[method]}
    warm = torch.randn(2, *x.shape[1:])
    found: dict[str, Any] = {}
    for batch, call in candidates.items():
        if method != "products":
            call(f, warm)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        value = call(f, x)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        times = []
        for _ in range(2):
            start = time.process_time()
            call(f, x)
            times.append(time.process_time() - start)
        seconds = min(times)
        if not found or seconds < found["seconds"]:
            found = {"seconds": seconds, "peak_mib": peak, "value": value, "batch": batch}
    print(json.dumps(found))


def measure() -> dict[str, Any]:
    """Every case and method, with ratios."""
    cases = {}
    for name, title in CASES.items():
        runs = {}
        for method in METHODS:
            command = [sys.executable, __file__, "--child", name, method]
            output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
            runs[method] = json.loads(output.splitlines()[-1])
        ours = runs["hnkit"]
        cases[name] = {
            "title": title,
            "runs": runs,
            "time_over_naive": ours["seconds"] / runs["naive"]["seconds"],
            "memory_over_naive": ours["peak_mib"] / runs["naive"]["peak_mib"],
            "time_over_products": ours["seconds"] / runs["products"]["seconds"],
        }
    machine = f"{platform.machine()} CPU, one thread, torch {torch.__version__.split('+')[0]}"
    return {"machine": machine, "cases": cases}


def show(document: dict[str, Any]) -> None:
    """Print the ratios."""
    for found in document["cases"].values():
        print(
            f"{found['title']}: {found['time_over_naive']:.2f} of the naive time, "
            f"{found['memory_over_naive']:.2f} of its memory, {found['time_over_products']:.2f} of the bare products"
        )


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """One measurement for all checks."""
    found = measure()
    show(found)
    return found


LIMITS = {"mlp": (1.5, 0.5, 2.2), "conv": (0.6, 0.3, 1.6)}
"""Of time and memory over the naive way, and of time over bare products: for the small MLP the aim of 1.3 is missed."""


@pytest.mark.parametrize("name", CASES)
def test_exact_kl(document: dict[str, Any], name: str) -> None:
    """Same number, less memory, and a time that stays where it was measured, with room for a busy machine."""
    found = document["cases"][name]
    assert found["runs"]["hnkit"]["value"] == pytest.approx(found["runs"]["naive"]["value"], rel=1e-4)
    naive, memory, products = LIMITS[name]
    assert found["time_over_naive"] < naive
    assert found["memory_over_naive"] < memory
    assert found["time_over_products"] < products


def main() -> None:
    """Measure and write the figures that the documentation shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    found = measure()
    show(found)
    from hnkit.internal.files import write_json

    write_json(RESULT, found)


if __name__ == "__main__":
    main()
