"""Everything that only a card can tell, in under nine minutes on one of the H100 class: docs/results/device.json.

    python benchmarks/device.py                           # on a GPU: every part, each under its own limit
    python benchmarks/device.py --parts steps             # one part; the others stay as they are
    python benchmarks/device.py --budget 360              # every part, as far as 360 seconds go
    python benchmarks/device.py --limit exact=250         # one part's limit, in seconds
    python benchmarks/device.py --plan                    # no GPU: what `hnkit train --plan` says of the same steps
    python benchmarks/device.py --tiny --out x.json       # the same on a CPU with small layers, within a minute

The libraries are imported once. On a card each part is then a child process with a limit: it ends by itself before
that, and is stopped there if it does not. What it has measured is written as it comes, and stays when it fails. Weights
are random and of the published sizes; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "device.json"
sys.path.insert(0, str(Path(__file__).resolve().parent))
Figures = dict[str, Any]
_CASE = 15.0
"""Seconds that the next case of a part may take: its backend, a step that warms up and the measured ones."""


@dataclass(frozen=True)
class Turn:
    """One run of a part.

    Attributes:
        tiny: whether on a CPU with small layers.
        ends: when it has to be over, by `time.monotonic`.
        out: where its figures go.
    """

    tiny: bool
    ends: float
    out: Path

    @property
    def left(self) -> float:
        """Seconds that are left, a reserve for the way out taken off."""
        return self.ends - time.monotonic() - 5

    def keep(self, figures: Figures) -> Figures:
        """Write what has been measured so far."""
        half = self.out.with_suffix(".half")
        half.write_text(json.dumps(figures))
        half.replace(self.out)
        return figures


@dataclass(frozen=True)
class Part:
    """One part of the report.

    Attributes:
        name: its key in the report.
        limit: seconds that it may take on a card.
        run: makes its figures.
    """

    name: str
    limit: float
    run: Callable[[Turn], Figures]


def steps(turn: Turn) -> Figures:
    """Training steps of SANA 0.6B with each memory option, by the backend and by a plain loop."""
    import sana_full

    rows: list[Figures] = []
    batches, rounds = ((1,), 1) if turn.tiny else ((1, 3), 3)
    # the published reward models are too large for a CPU's minute
    cases = [case for case in sana_full.CASES if not (turn.tiny and case.rewards is not None)]
    for row in sana_full.measured(sana_full.sana(turn.tiny), cases, batches, rounds):
        rows.append(row)
        turn.keep({"rows": rows})
        if turn.left < _CASE:
            return {"rows": rows, "left_out": "the cases after these: no time was left"}
    return {"rows": rows}


def log_det(turn: Turn) -> Figures:
    """Products of f per second, and E(J) with its error bar: of SANA 0.6B at 1024 px, d = 32,768."""
    import sana_logdet

    model, size = sana_logdet.sana(turn.tiny), 64 if turn.tiny else 1024
    points, probes, chunk = (2, 2, None) if turn.tiny else (8, 8, 8)
    case = sana_logdet.subject(model, size, points, 0.3)
    sana_logdet.estimated(replace(case, f=case.f.select(_first()), x=case.x[:1]), 1, chunk)  # the first run warms up
    return sana_logdet.estimated(case, probes, chunk) | _peak(turn)


def exact(turn: Turn) -> Figures:
    """The exact log-determinant at one point: at 1024 px if it fits the time, else at 512 px."""
    import sana_logdet

    model, found = sana_logdet.sana(turn.tiny), {}
    probes, chunk = (4 if turn.tiny else 16), 8
    for size in (64, 32) if turn.tiny else (1024, 512):
        case = sana_logdet.subject(model, size, 1, 0.3)
        try:
            found |= sana_logdet.exact_at_first(case, probes, chunk, most=turn.left)
        except sana_logdet.TooLongError as error:
            found |= {"too_long": {"size": size, "dim": case.dim, "seconds": error.seconds}}
            turn.keep(found)
            continue
        break
    return found | _peak(turn)


def flux(turn: Turn) -> Figures:
    """Training steps of FLUX.1-schnell at its full size, 512 px, with every block recomputed."""
    import sana_full
    from full_size import make

    small = {"size": 32, "rank": 8, "lora_alpha": 16.0, "max_sequence_length": 16} if turn.tiny else {}
    model = make("flux", turn.tiny, **small)
    found: Figures = {"parameters": model.parameters, "rows": []}
    half = {**sana_full.ALL, "lora_autocast": True}
    cases = [sana_full.Case(options, (1,), False) for options in (sana_full.ALL, half, {**half, "quantize": "fp8"})]
    for row in sana_full.measured(model, cases, (), 1 if turn.tiny else 2):
        found["rows"].append(row)
        turn.keep(found)
        if turn.left < _CASE:
            break
    return found


def agreement(turn: Turn) -> Figures:
    """The bundled miniature on the card against the CPU: images, f, gradients and E(J), relative distances."""
    import torch

    from hnkit import noise_kl
    from hnkit.backend import backend_factory

    torch.backends.cudnn.allow_tf32 = False  # convolutions would have 10 bits, and be no CPU's
    factory = backend_factory("digits")
    found: dict[str, list[torch.Tensor]] = {}
    for device in ("cpu", "cpu" if turn.tiny else "cuda"):
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


def tests(turn: Turn) -> Figures:
    """The tests that need a card, in this process."""
    import pytest

    os.environ["HNKIT_CARD"] = "cpu" if turn.tiny else "cuda"
    words = ["-q", "-m", "cuda", "-o", "pythonpath=", "-p", "no:cacheprovider", "--durations=8"]
    words += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests" / "device")]
    said = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = pytest.main(words, plugins=[_Kept(turn)])
    lines = said.getvalue().strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    found: Figures = {"summary": lines[-1] if lines else "no output", "failures": failures}
    if status:
        found |= {"failed": f"pytest ended with {int(status)}", "output": said.getvalue()[-8000:]}
    return found


@dataclass
class _Kept:
    """A plugin of pytest: what has passed is known if the part is stopped."""

    turn: Turn
    outcomes: dict[str, str] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.partition("::")[2]] = report.outcome
            counts = collections.Counter(self.outcomes.values())
            self.turn.keep({"summary": ", ".join(f"{count} {outcome}" for outcome, count in counts.items())})


LOADING = 45.0
"""Seconds that importing the libraries may take, once, on a machine that has just started."""
PARTS = (
    Part("steps", 120, steps),
    Part("log_det", 60, log_det),
    Part("flux", 60, flux),
    Part("tests", 75, tests),
    Part("agreement", 25, agreement),
    Part("exact", 150, exact),
)
"""In order of worth for their time; with the loading the limits add up to less than nine minutes."""


def plan_of_steps() -> Figures:
    """What a plan counts for the cases of the part `steps` at a batch of one: peaks in GiB, and the card's roofline."""
    import sana_full

    from hnkit.config import resolve_config
    from hnkit.scaled.pipelines.factory import PREFERENCES
    from hnkit.training.plan.cards import SHARE, find_card
    from hnkit.training.plan.plan import Counter

    common = ["train.batch=1", "train.accumulate=1", "train.optimizer=sgd", "train.momentum=0"]
    peaks, seconds = {}, {}
    for case in sana_full.CASES:
        options = {"vae_checkpointing": False, **case.options}
        flags = [f"backend.{name}={json.dumps(value)}" for name, value in options.items()]
        rewards = ["redness=1"]
        if case.rewards is not None:
            names = {name.removeprefix("rewards."): weight for name, weight in PREFERENCES.items()}
            rewards = [f"{name}={weight}" for name, weight in names.items()]
            flags += [f"rewards.{n}.{key}={json.dumps(value)}" for n in names for key, value in case.rewards.items()]
        config = resolve_config(backend="sana", overrides=[*common, *flags], rewards=rewards)
        need = Counter(config).need((), 1, find_card("h100"))
        peaks[case.title], seconds[case.title] = need.peak / 2**30, SHARE * need.seconds
        print(f"{peaks[case.title]:6.1f} GiB  {case.title or 'none'}", flush=True)
    return {"batch": 1, "card": find_card("h100").title, "peak_gib": peaks, "roofline_seconds": seconds}


def _first() -> Any:
    import torch

    return torch.zeros(1, dtype=torch.long)


def _peak(turn: Turn) -> Figures:
    import torch

    return {} if turn.tiny else {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def main() -> int:
    """Run the parts one after the other; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small layers, for a machine without a GPU")
    parser.add_argument("--plan", action="store_true", help="count, and write beside what is measured")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS), help="comma-separated")
    parser.add_argument("--budget", type=float, default=535.0, help="seconds of all parts together")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="of one part")
    parser.add_argument("--out", type=Path, default=RESULT, help="the report")
    arguments = parser.parse_args()
    by_name = {part.name: part for part in PARTS}
    for text in arguments.limit:
        name, _, seconds = text.partition("=")
        if name not in by_name or not seconds.isdigit():
            parser.error(f"--limit {text!r}: write PART=SECONDS, PART one of {', '.join(by_name)}")
        by_name[name] = replace(by_name[name], limit=float(seconds))
    unknown = [name for name in arguments.parts.split(",") if name not in by_name]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: accepted are {', '.join(by_name)}")
    if arguments.tiny and arguments.out == RESULT:
        parser.error("--tiny says nothing about a card: name another report with --out")
    document: Figures = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.plan:
        document["plan"] = plan_of_steps()
        _write(arguments.out, document)
        return 0
    began = time.monotonic()
    preload()
    print(f"loaded after {time.monotonic() - began:.0f} s", flush=True)
    import torch

    run = measured_here if arguments.tiny else measured
    found = run(Part("card", 60.0, card))
    if "failed" in found:
        parser.error("the full size needs a GPU: use --tiny here")
    document |= {"machine": found["machine"], "tiny": arguments.tiny, "torch": torch.__version__}
    chosen = [by_name[name] for name in arguments.parts.split(",")]
    return int(_run(chosen, document, arguments, began, run))


def _run(
    parts: Sequence[Part],
    document: Figures,
    arguments: argparse.Namespace,
    began: float,
    run: Callable[[Part], Figures],
) -> bool:
    """Run the parts within the budget and write the report after each; whether one failed."""
    failed = False
    for part in parts:
        left = arguments.budget - (time.monotonic() - began)
        limit = min(600.0 if arguments.tiny else part.limit, left)
        if limit < 10 and not arguments.tiny:
            print(f"{part.name}: left out, {left:.0f} s are left", flush=True)
            continue
        found = document[part.name] = run(replace(part, limit=limit))
        failed |= "failed" in found
        _write(arguments.out, document)
    return failed


def _write(out: Path, document: Figures) -> None:
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measured_here(part: Part) -> Figures:
    """The figures of one part with small layers on the CPU, in this process; and the seconds that it took."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        figures = part.run(Turn(True, time.monotonic() + part.limit, Path(folder) / "part.json"))
    print(f"{part.name}: {figures.get('failed', 'done')} after {time.perf_counter() - began:.0f} s", flush=True)
    return figures | {"took": time.perf_counter() - began}


def measured(part: Part, tiny: bool = False) -> Figures:
    """The figures of one part, whole or as far as it came, and why it failed; and the seconds that it took.

    The part runs in a child of this process, which has the libraries already and a CUDA context of its own: an error on
    the card ends that part alone.
    """
    print(f"{part.name}: at most {part.limit:.0f} s", flush=True)
    began = time.perf_counter()
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "part.json", Path(folder) / "log"
        child = multiprocessing.get_context("fork").Process(target=_alone, args=(part, tiny, out, log))
        child.start()
        child.join(part.limit)
        if child.is_alive():
            child.kill()
            child.join()
            figures = {"failed": f"stopped at its limit of {part.limit:.0f} s"}
        elif child.exitcode:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
            # CUDA's errors go on for lines of advice after the one that says what it was
            said = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Expired)\b", line)]
            ended = f"ended by signal {-child.exitcode}" if child.exitcode < 0 else lines[-1]
            figures = {"failed": said[-1] if said else ended, "output": "\n".join(lines[-40:])}
        if out.exists():
            figures = json.loads(out.read_text()) | figures
    print(f"  {figures.get('failed', 'done')} after {time.perf_counter() - began:.0f} s", flush=True)
    return figures | {"took": time.perf_counter() - began}


def _alone(part: Part, tiny: bool, out: Path, log: Path) -> None:
    """Run a part in this process, whose output goes to a file."""
    file = log.open("w", buffering=1)  # open as long as the process lives
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file
    turn = Turn(tiny, time.monotonic() + part.limit, out)
    turn.keep(part.run(turn))


def preload() -> None:
    """Import what the parts need, before there is a child; it must not touch the card, which no fork survives."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else a library that asks whether there is a card touches it
    for name in ("torch", "diffusers", "peft", "transformers", "pytest", "sana_full", "sana_logdet", "hnkit"):
        importlib.import_module(name)
    from hnkit.scaled.backends import BACKENDS  # and the classes of the pipelines, which diffusers imports when asked

    assert BACKENDS
    for name in ("SanaSprintPipeline", "FluxPipeline", "AutoencoderDC", "AutoencoderKL"):
        getattr(importlib.import_module("diffusers"), name)


def card(turn: Turn) -> Figures:
    """The name of the card."""
    import torch

    if turn.tiny or torch.cuda.is_available():
        return {"machine": "CPU, small layers" if turn.tiny else torch.cuda.get_device_name()}
    return {"failed": "no card"}


if __name__ == "__main__":
    sys.exit(main())
