"""The hypernetwork that comes with the miniature: trained by the preset `long`, measured once on held-out sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.adapters import adapter_folder, load_trained
from hnkit.backend import BackendBase
from hnkit.config import CONFIG_FILE, resolve_config
from hnkit.figures.measured_map import VERDICT_SAMPLES
from hnkit.frontier import Frontier
from hnkit.internal.files import atomic_write, write_json
from hnkit.internal.folders import VERDICT_FILE
from hnkit.internal.seeds import generator_for
from hnkit.internal.stats import Estimate, mean_and_stderr, ratio_and_stderr, rounded_to_error
from hnkit.kl.divergence import KLEstimate, noise_kl
from hnkit.kl.verdict import L2Verdict, l2_verdict
from hnkit.maps import at_rows
from hnkit.output.page import Card
from hnkit.output.verdict import RunFigures, verdict_card
from hnkit.scaled.digits.checkpoint import ADAPTER_FOLDER, write_checksums
from hnkit.scaled.digits.rewards import legibility
from hnkit.scaled.digits.scenes import eval_prompts
from hnkit.training.run import train

PRESET = "long"
FIGURES_FILE = "figures.json"
CARD_FILE = "README.md"
BEST_OF = (2, 4, 50)


def train_adapter(work: Path, out: Path, *, seed: int, steps: int | None = None) -> None:
    """Train by the preset, or go on with it, measure, and put the adapter into the model folder.

    Args:
        work: Folder of the run; a run that was interrupted there goes on.
        out: The model folder.
        seed: Seed of the training.
        steps: Optimiser steps; the preset's by default. The rate is constant, so that a run of fewer can be gone on
            with.
    """
    length = [] if steps is None else [f"train.steps={steps}"]
    config = resolve_config(backend="digits", preset=PRESET, overrides=[f"train.seed={seed}", *length])
    run = work / f"hypernetwork-{seed}"
    result = train(config, resume=run) if run.exists() else train(config, out=run)
    if not result.finished:
        raise SystemExit(result.exit_code)
    bundle_adapter(run, out, seed=seed, steps=result.step)


def bundle_adapter(run: Path, out: Path, *, seed: int, steps: int) -> None:
    """Measure the adapter of a run on the held-out sentences and copy it, with its card, into a model folder.

    Args:
        run: A finished run, or what `hnkit export` made of one.
        out: The model folder; an adapter that is there is replaced.
        seed: Seed of the training, for the card.
        steps: Optimiser steps of the training, for the card.
    """
    backend, _ = load_trained("digits", run)
    figures = {"preset": PRESET, "seed": seed, "steps": steps, **held_out_figures(backend, eval_prompts())}
    target = out / ADAPTER_FOLDER
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(adapter_folder(run), target, ignore=shutil.ignore_patterns(".*"))
    config = resolve_config(resume=run, overrides=[f"train.steps={steps}"])
    atomic_write(target / CONFIG_FILE, config.to_toml())
    write_json(target / FIGURES_FILE, figures)
    write_json(target / VERDICT_FILE, verdict(figures).to_json())
    atomic_write(target / CARD_FILE, card(figures, (target / CARD_FILE).read_text(encoding="utf-8")))
    for path in (target, *target.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    write_checksums(out)


@torch.no_grad()
def held_out_figures(
    backend: BackendBase,
    prompts: Sequence[str],
    *,
    images: int = 4,
    kl_images: int = 1,
    base_images: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Reward, nats and efficiency, judge and legibility, each steered image beside the base image of its noise.

    Args:
        backend: The miniature with its adapter loaded.
        prompts: Sentences, two or more.
        images: Images of each sentence.
        kl_images: Those of them at whose noises the KL integrand is taken, by dense Jacobians.
        base_images: Base images of each sentence, for the frontier and best-of-N.
        seed: Seed of the noise.

    Returns:
        Figures by name; a pair is a mean and its standard error over sentences.
    """
    assert backend.judge is not None
    assert backend.default_reward is not None
    scores: dict[str, Callable[[Tensor, Sequence[str]], Tensor]] = {
        "reward": backend.default_reward,
        "judge": backend.judge,
        "legibility": legibility(),
    }
    base: list[Tensor] = []
    noises: list[Tensor] = []
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in scores}
    for index, prompt in enumerate(prompts):
        noise = torch.randn(base_images, *backend.noise_shape, generator=generator_for(seed, "adapter figures", index))
        pictures = backend.generate(noise, backend.encode([prompt] * base_images))
        base.append(backend.default_reward(pictures, [prompt] * base_images).double())
        noises.append(noise[:images])
        names = [prompt] * images
        moved = noise[:images] + backend.map_for(names)(noise[:images])
        steered = backend.generate(moved, backend.encode(names))
        for name, score in scores.items():
            before, after = score(pictures[:images], names).double(), score(steered, names).double()
            rows[name].append((float(before.mean()), float((after - before).mean())))
    tables = {name: torch.tensor(values, dtype=torch.float64).T for name, values in rows.items()}
    figures: dict[str, Any] = {"prompts": len(prompts), "images": images * len(prompts)}
    for name, (before, gain) in tables.items():
        figures |= {f"{name}_base": mean_and_stderr(before), f"{name}_gain": mean_and_stderr(gain)}
    x = torch.cat([noise[:kl_images] for noise in noises])
    f = backend.map_for([prompt for prompt in prompts for _ in range(kl_images)])
    with torch.enable_grad():
        kl = noise_kl(f, x, method="exact")
        first = at_rows(f, x, min(len(x), VERDICT_SAMPLES))
        advice = l2_verdict(*first, generator=generator_for(seed, "l2 verdict"))
    frontier = Frontier(base)
    gain, error = figures["reward_gain"]
    bought = frontier.point(kl.value).gain
    best = {n: frontier.best_of(n) for n in BEST_OF if n <= base_images}
    return figures | {
        "kl": (kl.value, kl.stderr),
        "l2": kl.l2,
        **_about_the_kl(kl, advice),
        "kl_images": len(x),
        "frontier": bought,
        "efficiency": (gain / bought, error / bought),
        "best_of_reward_gain": {str(n): (b.gain, b.stderr) for n, b in best.items()},
    }


def _about_the_kl(kl: KLEstimate, advice: L2Verdict) -> dict[str, Any]:
    """What the verdict needs besides the two figures."""
    folds = kl.folds
    return {
        "l2_stderr": mean_and_stderr(kl.parts.l2)[1],
        "l2_off": ratio_and_stderr(kl.parts.l2 - kl.per_sample, kl.per_sample),
        "l2_good": advice.good,
        "advice": advice.advice,
        "local_norm": advice.local_norm,
        "injective": kl.injective,
        "folds": None if folds is None else (folds.negative, folds.samples),
    }


def verdict(figures: Mapping[str, Any]) -> Card:
    """The card that commands show of the adapter, from its held-out figures."""
    return verdict_card(
        RunFigures(
            kl=Estimate(*figures["kl"]),
            l2=Estimate(figures["l2"], figures["l2_stderr"]),
            relative_error=Estimate(*figures["l2_off"]),
            l2_good=figures["l2_good"],
            advice=figures["advice"],
            injective=figures["injective"],
            folds=figures["folds"] and tuple(figures["folds"]),
            local_norm=figures["local_norm"],
            gain=Estimate(*figures["reward_gain"]),
            judge=Estimate(*figures["judge_gain"]),
            efficiency=Estimate(*figures["efficiency"]),
        )
    )


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
