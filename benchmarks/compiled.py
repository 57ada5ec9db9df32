"""What `backend.compile = "inductor"` gains and costs on the CPU: training steps with and without, in one run.

    python benchmarks/compiled.py            docs/results/compiled.json, some minutes of CPU time
    python benchmarks/compiled.py sana       one network; the others stay as they are

Networks are of the real classes with random weights and small layers, on one thread. Both kinds of step are taken in
turn, and their times are CPU times, of the process and of the compilers that it has waited for, so that what else the
machine does stands in neither. Nothing that was compiled before is used.

That compiled code ran is not taken on trust: in torch's own profile of one more step, every call of a repeated block is
a region that was compiled, forward and back, or there are no figures.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # so that the compiler's time is this process's

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parent))
import full_size

from hnkit import NoiseLoss
from hnkit.internal.versions import versions
from hnkit.maps import ConditionedMap
from hnkit.scaled.pipelines.backend import PipelineBackend
from hnkit.scaled.pipelines.memory import repeated_blocks

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


@dataclass(frozen=True)
class Run:
    """What ran in one step, by torch's profile of it.

    Attributes:
        forward: compiled regions.
        backward: backward passes of compiled regions.
    """

    forward: int
    backward: int


def profiled(trainer: Trainer) -> Run:
    """How often compiled code runs in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.step()
    names = collections.Counter(event.name for event in profile.events() or ())
    return Run(
        sum(count for name, count in names.items() if name.startswith("Torch-Compiled Region")),
        names["CompiledFunctionBackward"],
    )


def block_calls(trainer: Trainer) -> int:
    """How often a step runs a repeated block of f or of the generator, recomputations among them, uncompiled."""
    backend, calls = trainer.backend, 0
    kinds = {type(block) for net in (backend.network, backend.hypernetwork.twin) for block in repeated_blocks(net)}

    def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            return forward(*arguments, **named)

        return run

    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "forward", counted(kind.forward)))
        trainer.step()
    return calls


def measured(name: str, steps: int) -> dict[str, Any]:
    """Seconds of a step with and without, in turn, and of compiling.

    Raises:
        RuntimeError: a block ran that was not compiled.
    """
    counters.clear()
    model = full_size.make(name, True, LAYERS, size=MODELS[name], rank=RANK)
    plain = Trainer(model.backend())
    for _ in range(2):
        plain.step()
    calls = block_calls(plain)
    begun = cpu_seconds()
    compiled = Trainer(model.backend(compile="inductor"))
    for _ in range(2):
        compiled.step()
    compiling = cpu_seconds() - begun
    ran = profiled(compiled)  # both have now taken as many steps
    if not ran.forward == calls >= ran.backward > 0:
        raise RuntimeError(
            f"{name}: of {calls} calls of repeated blocks in a step {ran.forward} ran compiled, {ran.backward} in the "
            "backward pass: no figures"
        )
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
        "block_calls": calls,
        "regions_run": {"forward": ran.forward, "backward": ran.backward},
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "losses_apart": abs(plain.value - compiled.value) / abs(plain.value),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(MODELS), choices=MODELS, metavar="NETWORK")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"models": {}}
    document |= {"rows": ROWS, "rank": RANK, "sizes": MODELS, "torch": versions()["torch"]}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in arguments.networks:
            document["models"][name] = measured(name, arguments.steps)
            arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
