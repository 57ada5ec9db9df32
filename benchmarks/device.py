"""Everything that only a card can tell, in under nine minutes on one of the H100 class: docs/results/device.json.

    python benchmarks/device.py                  # on a GPU: every part, each under its own limit
    python benchmarks/device.py --parts steps    # one part; the others stay as they are
    python benchmarks/device.py --tiny --out x.json       # the same on a CPU with small layers, in about a minute

Each part is a process of its own that is stopped at its limit, and is written to the report as it ends: what was
measured before a part failed or ran out of time is not lost. Weights are random and of the published sizes; nothing is
downloaded. Figures of `hnkit train --plan` stand beside the measured ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "device.json"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """One part of the report.

    Attributes:
        name: its key in the report.
        limit: seconds that it may take on a card.
        run: makes its figures; `tiny` says whether on a CPU with small layers.
    """

    name: str
    limit: int
    run: Callable[[bool], dict[str, Any]]


def agreement(tiny: bool) -> dict[str, Any]:
    """The bundled miniature on the card against the CPU: images, f, gradients and E(J), relative distances."""
    from hnkit import noise_kl
    from hnkit.backend import backend_factory

    factory = backend_factory("digits")
    found: dict[str, list[torch.Tensor]] = {}
    for device in ("cpu", "cpu" if tiny else "cuda"):
        backend = factory.load(factory.options(device=device, rank=4))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in backend.hypernetwork.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
        assert backend.prompts is not None
        condition = backend.encode(backend.prompts()[0][:2])
        x = torch.randn(2, *backend.noise_shape, generator=torch.Generator().manual_seed(2)).to(device)
        delta = backend.hypernetwork(x, condition)
        images = backend.generate(x + delta, condition)
        (images.square().mean() + delta.square().mean()).backward()
        gradients = [p.grad.flatten() for p in backend.hypernetwork.parameters() if p.grad is not None]
        f = backend.map_for(list(condition.prompts))
        error = noise_kl(f, x, method="exact", check=False).per_sample
        parts = (images.flatten(), delta.flatten(), torch.cat(gradients), error)
        found.setdefault("reference" if not found else "card", [part.detach().double().cpu() for part in parts])
    names = ("images", "delta", "gradients", "kl")
    pairs = zip(names, found["reference"], found["card"], strict=True)
    distances = {name: float((a - b).norm() / a.norm()) for name, a, b in pairs}
    return {"distances": distances, "agree": max(distances.values()) < 1e-3}


def steps(tiny: bool) -> dict[str, Any]:
    """Training steps of SANA 0.6B with each memory option, by the backend and by a plain loop, beside the plan."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.json"
        batches, rounds = ("1", "1") if tiny else ("1,3", "3")
        words = ["--batches", batches, "--rounds", rounds, "--out", str(out), *(["--tiny"] if tiny else [])]
        subprocess.run([sys.executable, str(HERE / "sana_full.py"), *words], check=True, cwd=HERE)
        document = json.loads(out.read_text())
    return {**document, "plan": {} if tiny else _planned_steps()}


def _planned_steps() -> dict[str, float]:
    """Peak of a plan in GiB for each choice of options at a batch of one, with the step's own reward."""
    from hnkit.config import resolve_config
    from hnkit.training.plan.cards import find_card
    from hnkit.training.plan.plan import Counter

    off = [f"backend.{name}=false" for name in ("vae_checkpointing", "generator_checkpointing")]
    overrides = [*off, "train.batch=1", "train.accumulate=1", "train.optimizer=sgd", "train.momentum=0"]
    counter = Counter(resolve_config(backend="sana", overrides=overrides, rewards=["redness=1"]))
    choices = ((), ("vae_checkpointing",), ("vae_checkpointing", "generator_checkpointing"), tuple(counter.savers))
    return {", ".join(changes): counter.need(changes, 1, find_card("h100")).peak / 2**30 for changes in choices}


def log_det(tiny: bool) -> dict[str, Any]:
    """Products of f per second, E(J) with its error bar at d = 32,768, and the exact log-determinant at one point."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "log-det.json"
        words = ["--samples", "2", "--probes", "2", "--out", str(out), *(["--tiny", "--size", "64"] if tiny else [])]
        subprocess.run([sys.executable, str(HERE / "sana_logdet.py"), *words], check=True, cwd=HERE)
        figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def flux(tiny: bool) -> dict[str, Any]:
    """Evaluations and gradients of FLUX.1-schnell's network at full size with random weights, blocks recomputed."""
    import diffusers

    from hnkit.scaled.lora.twin import LoraSpec, lora_targets, make_twin
    from hnkit.scaled.pipelines import memory
    from hnkit.scaled.pipelines.published import PUBLISHED_MODELS

    device, dtype = (torch.device("cpu"), torch.float32) if tiny else (torch.device("cuda"), torch.bfloat16)
    config = dict(PUBLISHED_MODELS["black-forest-labs/FLUX.1-schnell"].components["transformer"])
    if tiny:
        config |= {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            base = diffusers.FluxTransformer2DModel.from_config(config)
    finally:
        torch.set_default_dtype(before)
    base.requires_grad_(False).eval()
    twin = make_twin(base, LoraSpec(16 if tiny else 128, 640.0, lora_targets(base)), zero_base="proj_out")
    memory.set_checkpointing(base, True)
    memory.set_checkpointing(twin, True)
    side, tokens = (8, 16) if tiny else (32, 512)
    positions = torch.zeros(side * side, 3, device=device, dtype=dtype)
    inputs = {
        "timestep": torch.ones(1, device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, 768, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, tokens, 4096, device=device, dtype=dtype),
        "txt_ids": torch.zeros(tokens, 3, device=device, dtype=dtype),
        "img_ids": positions,
        "return_dict": False,
    }
    noise = torch.randn(1, side * side, 64, device=device, dtype=dtype)
    seconds = []
    for turn in range(2 if tiny else 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        moved = noise + twin(noise, **inputs)[0].to(dtype)
        (base(moved, **inputs)[0].float().square().mean() + (moved - noise).float().square().sum() / 2).backward()
        twin.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            seconds.append(time.perf_counter() - start)
    found: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "parameters": sum(p.numel() for p in base.parameters()),
    }
    return found | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device.type == "cuda" else {})


PARTS = (
    Part("agreement", 60, agreement),
    Part("steps", 210, steps),
    Part("log_det", 170, log_det),
    Part("flux", 90, flux),
)
"""In order of worth for their time; the limits add up to less than nine minutes."""


def machine(tiny: bool) -> str:
    """What the figures are of."""
    return f"{platform.machine()} CPU, small layers" if tiny else torch.cuda.get_device_name()


def main() -> int:
    """Run the parts one after the other, each in a process of its own; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small layers, for a machine without a GPU")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=RESULT, help="the report")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    by_name = {part.name: part for part in PARTS}
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("the full size needs a GPU: use --tiny here")
    if arguments.inner:
        arguments.out.write_text(json.dumps(by_name[arguments.inner].run(arguments.tiny)))
        return 0
    unknown = [name for name in arguments.parts.split(",") if name not in by_name]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: accepted are {', '.join(by_name)}")
    if arguments.tiny and arguments.out == RESULT:
        parser.error("--tiny says nothing about a card: name another report with --out")
    document: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    document |= {"machine": machine(arguments.tiny), "tiny": arguments.tiny, "torch": torch.__version__}
    failed = False
    for name in arguments.parts.split(","):
        part = by_name[name]
        document[name] = measured(replace(part, limit=600) if arguments.tiny else part, arguments.tiny)
        failed |= "failed" in document[name]
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return int(failed)


def measured(part: Part, tiny: bool) -> dict[str, Any]:
    """The figures of one part, or why there are none; and the seconds that it took."""
    print(f"{part.name}: at most {part.limit} s", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        words = ["--inner", part.name, "--out", str(out), *(["--tiny"] if tiny else [])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        }
        try:
            subprocess.run(
                [sys.executable, __file__, *words], check=True, timeout=part.limit, env=environment,
                capture_output=True, text=True,
            )  # fmt: skip
            figures: dict[str, Any] = json.loads(out.read_text())
        except subprocess.TimeoutExpired:
            figures = {"failed": f"stopped at its limit of {part.limit} s"}
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines() or ["no message"]
            figures = {"failed": lines[-1]}
    print(f"  {figures.get('failed', 'done')}", flush=True)
    return figures | {"took": time.perf_counter() - began}


if __name__ == "__main__":
    sys.exit(main())
