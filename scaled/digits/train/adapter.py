"""The hypernetwork that comes with the miniature: trained by the preset `long`, measured once on held-out sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.adapters import adapter_folder, load_trained
from hnkit.backend import BackendBase
from hnkit.config import CONFIG_FILE, resolve_config
from hnkit.frontier.measured import FrontierSettings, network_on_frontier
from hnkit.internal.files import atomic_write, write_json
from hnkit.internal.seeds import generator_for
from hnkit.internal.stats import mean_and_stderr, rounded_to_error
from hnkit.rewards import RewardSum
from hnkit.scaled.digits.checkpoint import ADAPTER_FOLDER, write_checksums
from hnkit.scaled.digits.rewards import legibility
from hnkit.scaled.digits.scenes import eval_prompts
from hnkit.training.run import train

PRESET = "long"
FIGURES_FILE = "figures.json"
CARD_FILE = "README.md"
IMAGES = 4
"""Images of each held-out sentence."""
BEST_OF = (2, 4, 50)


def train_adapter(work: Path, out: Path, *, seed: int) -> None:
    """Train by the preset, or go on with it, measure, and put the adapter into the model folder.

    Args:
        work: Folder of the run; a run that was interrupted there goes on.
        out: The model folder.
        seed: Seed of the training.
    """
    config = resolve_config(backend="digits", preset=PRESET, overrides=[f"train.seed={seed}"])
    run = work / f"hypernetwork-{seed}"
    result = train(config, resume=run) if run.exists() else train(config, out=run)
    if not result.finished:
        raise SystemExit(result.exit_code)
    backend, alpha = load_trained("digits", run)
    figures = {"preset": PRESET, "seed": seed, "steps": result.step, **held_out_figures(backend, alpha)}
    bundle_adapter(run, out, figures)


def bundle_adapter(run: Path, out: Path, figures: Mapping[str, Any]) -> None:
    """Copy the adapter of a run, its configuration and figures into a model folder.

    Args:
        run: The finished run.
        out: The model folder; an adapter that is there is replaced.
        figures: What the card says, from `held_out_figures`.
    """
    target = out / ADAPTER_FOLDER
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(adapter_folder(run), target)
    shutil.copyfile(run / CONFIG_FILE, target / CONFIG_FILE)
    write_json(target / FIGURES_FILE, figures)
    atomic_write(target / CARD_FILE, card(figures, (target / CARD_FILE).read_text(encoding="utf-8")))
    for path in (target, *target.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    write_checksums(out)


@torch.no_grad()
def held_out_figures(
    backend: BackendBase, alpha: float | None, *, prompts: Sequence[str] | None = None, base_samples: int = 128
) -> dict[str, Any]:
    """Reward, nats and efficiency, judge and legibility on the held-out sentences.

    Args:
        backend: The miniature with its adapter loaded.
        alpha: The temperature of its training.
        prompts: Sentences; all held-out ones by default.
        base_samples: Base images a sentence for the frontier.

    Returns:
        Figures by name; a pair is a mean and its standard error over sentences.
    """
    assert backend.judge is not None
    assert backend.default_reward is not None
    texts = list(eval_prompts() if prompts is None else prompts)
    settings = FrontierSettings(base_samples=base_samples, samples=IMAGES, batch=64)
    found = network_on_frontier(backend, RewardSum([backend.default_reward]), texts, settings, alpha=alpha)
    (method,) = found.methods.values()
    scores = {"judge": backend.judge, "legibility": legibility()}
    tables = paired_scores(backend, texts, scores)
    best = {str(n): found.frontier.best_of(n) for n in BEST_OF if n <= base_samples}
    return {
        "prompts": len(texts),
        "images": IMAGES * len(texts),
        "reward_gain": (method.gain, method.stderr),
        "kl": (found.kl, found.kl_stderr),
        "l2": found.l2,
        "efficiency": (method.efficiency, method.efficiency_stderr),
        "gap_lower_bound": None if found.gap is None else found.gap.lower,
        "best_of_reward_gain": {n: (b.gain, b.stderr) for n, b in best.items()},
        **{
            f"{name}_{kind}": mean_and_stderr(values)
            for name, kinds in tables.items()
            for kind, values in kinds.items()
        },
    }


def paired_scores(
    backend: BackendBase, prompts: Sequence[str], scores: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Means of each sentence by each score: of base images, and of the gain of steered ones from the same noise."""
    rows: dict[str, dict[str, list[Tensor]]] = {name: {"base": [], "gain": []} for name in scores}
    for index, prompt in enumerate(prompts):
        names = [prompt] * IMAGES
        noise = torch.randn(IMAGES, *backend.noise_shape, generator=generator_for(0, "adapter figures", index))
        condition = backend.encode(names)
        moved = noise + backend.map_for(names)(noise)
        base, steered = (backend.generate(x, condition) for x in (noise, moved))
        for name, score in scores.items():
            before, after = score(base, names).double(), score(steered, names).double()
            rows[name]["base"].append(before.mean())
            rows[name]["gain"].append((after - before).mean())
    return {name: {kind: torch.stack(parts) for kind, parts in kinds.items()} for name, kinds in rows.items()}


def card(figures: Mapping[str, Any], written: str) -> str:
    """The card that training wrote, with the held-out figures before the code that uses the adapter."""
    best = figures["best_of_reward_gain"]
    others = ", ".join(f"best-of-{n} {rounded_to_error(*value)}" for n, value in best.items())
    efficiency = [100 * value for value in figures["efficiency"]]
    lines = [
        "## Held-out figures",
        "",
        f"Trained by `python -m hnkit.scaled.digits.train adapter`, preset `{figures['preset']}`, seed "
        f"{figures['seed']}, {figures['steps']} steps. Measured once, on {figures['prompts']} held-out sentences, "
        f"{figures['images']} images, one step; ± is one standard error.",
        "",
        "| figure | value |",
        "| --- | --- |",
        f"| gain in the trained reward | {rounded_to_error(*figures['reward_gain'])} ({others}) |",
        f"| KL integrand, exact | {rounded_to_error(*figures['kl'])} nats |",
        f"| L2 term | {figures['l2']:.3f} nats |",
        f"| share of the frontier at these nats | {rounded_to_error(*efficiency)} % |",
        f"| judge, base | {rounded_to_error(*figures['judge_base'])} |",
        f"| judge, paired gain | {rounded_to_error(*figures['judge_gain'])} |",
        f"| legibility, base | {rounded_to_error(*figures['legibility_base'])} |",
        f"| legibility, paired gain | {rounded_to_error(*figures['legibility_gain'])} |",
        "",
        "",
    ]
    before, heading, after = written.partition("## Use\n")
    return before + "\n".join(lines) + heading + after


def read_figures(folder: Path) -> dict[str, Any]:
    """The figures of the adapter in a model folder."""
    figures: dict[str, Any] = json.loads((folder / ADAPTER_FOLDER / FIGURES_FILE).read_text(encoding="utf-8"))
    return figures
