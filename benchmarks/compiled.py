"""What `backend.compile = "inductor"` gains and costs on the CPU: training steps with and without, in one run.

    python benchmarks/compiled.py            docs/results/compiled.json, some minutes of CPU time

Networks are of the real classes with random weights and small layers, on one thread. Both kinds of step are taken in
turn, and their times are CPU times, of the process and of the compilers that it has waited for, so that what else the
machine does stands in neither. Nothing that was compiled before is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # so that the compiler's time is this process's

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import full_size

from hnkit import NoiseLoss
from hnkit.internal.versions import versions
from hnkit.maps import ConditionedMap
from hnkit.scaled.pipelines.backend import PipelineBackend

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "compiled.json"
LAYERS = {
    **full_size.SMALL,
    "SanaTransformer2DModel": full_size.SMALL["SanaTransformer2DModel"]
    | {"num_attention_heads": 8, "num_layers": 6, "num_cross_attention_heads": 4, "cross_attention_dim": 256},
    "FluxTransformer2DModel": full_size.SMALL["FluxTransformer2DModel"] | {"num_layers": 3, "num_single_layers": 6},
}
MODELS = {"sana": 512, "flux": 256}
"""Backends, and the side of their images: 256 tokens each."""
ROWS, RANK, STEPS = 2, 16, 12


def cpu_seconds() -> float:
    """Used so far by this process and by those that it has waited for."""
    return sum(os.times()[:4])


class Trainer:
    """Steps of the L2 loss on one backend."""

    def __init__(self, backend: PipelineBackend) -> None:
        self.backend = backend
        self.condition = full_size.condition(backend, ROWS)
        self.noise = torch.randn(ROWS, *backend.noise_shape, generator=torch.Generator().manual_seed(0))
        self.loss = NoiseLoss()
        trained = [parameter for parameter in backend.hypernetwork.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self) -> float:
        """Take a step; its CPU time in seconds."""
        begun = cpu_seconds()
        f = ConditionedMap(self.backend.hypernetwork, self.condition)
        terms = self.loss(
            f, self.noise, lambda x: self.backend.generate(x, self.condition), lambda images: images[:, 0].mean((1, 2))
        )
        self.optimizer.zero_grad(set_to_none=True)
        terms.total.mean().backward()
        self.optimizer.step()
        self.value = float(terms.total.detach().mean())
        return cpu_seconds() - begun


def measured(name: str, steps: int) -> dict[str, Any]:
    """Seconds of a step with and without, in turn, and of compiling."""
    model = full_size.make(name, True, LAYERS, size=MODELS[name], rank=RANK)
    plain = Trainer(model.backend())
    for _ in range(2):
        plain.step()
    begun = cpu_seconds()
    compiled = Trainer(model.backend(compile="inductor"))
    for _ in range(2):
        compiled.step()
    compiling = cpu_seconds() - begun
    pairs = [(plain.step(), compiled.step()) for _ in range(steps)]
    ratios = sorted(one / other for one, other in pairs)
    return {
        "parameters": model.parameters,
        "steps": steps,
        "seconds": statistics.median(one for one, _ in pairs),
        "seconds_compiled": statistics.median(other for _, other in pairs),
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[steps // 4], ratios[-1 - steps // 4]],
        "compiling": compiling - 2 * statistics.median(other for _, other in pairs),
        "losses_apart": abs(plain.value - compiled.value) / abs(plain.value),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {"rows": ROWS, "rank": RANK, "sizes": MODELS, "torch": versions()["torch"], "models": {}}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in MODELS:
            document["models"][name] = measured(name, arguments.steps)
            arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
