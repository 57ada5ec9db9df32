"""The tables of docs/earning.md, from its documents in docs/results and the figures of the bundled adapter."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hnkit.output.page import Cell, Table, format_estimate
from hnkit.scaled.digits.checkpoint import model_folder
from hnkit.scaled.digits.train.adapter import read_figures

RESULTS = Path(__file__).resolve().parent / "results" / "earning.json"
RECIPES, BUDGET = RESULTS.with_name("recipes.json"), RESULTS.with_name("budget.json")
AGAIN = RESULTS.with_name("bundled-again.json")
BESIDE = {
    "regressed": ("regression on the gradient", "regression on the proximal map"),
    "maps": ("all weights", "rank 64", "rank 4", "difference", "applied twice", "given a gradient"),
    "optimisers": ("batch 8", "batch 128", "rate 3e-3", "rate 3e-4", "cosine", "momentum"),
    "samples": ("eight noises a sentence", "antithetic", "no bound"),
    "losses": ("second-order", "Arnoldi", "exact"),
}
"""Which recipes of benchmarks/recipes.py stand in which table, below the base recipe."""
TRAINING = "the bundled adapter's training"
LONGER = ("default, kinds weighed", "default, no bound", "3,000 steps")


def _records() -> dict[str, dict[str, Any]]:
    """Experiment -> its record; there is one seed of each."""
    return {record["experiment"]: record for record in json.loads(RESULTS.read_text(encoding="utf-8"))["records"]}


def _bundled_steps() -> int:
    """Steps of the training of the adapter that comes with the miniature."""
    return int(read_figures(model_folder())["steps"])


def _recipes() -> dict[str, Any]:
    """What benchmarks/recipes.py has measured."""
    found: dict[str, Any] = json.loads(RECIPES.read_text(encoding="utf-8"))
    return found


def spectrum() -> Table:
    """How fast the reward forgets the noise."""
    found = _records()["spectrum"]
    rows: list[tuple[Cell, ...]] = [(s, format_estimate(*value)) for s, value in found["correlation"].items()]
    caption = (
        f"Variance of the reward within a sentence {format_estimate(*found['variance'])}; mean Hermite degree "
        f"E|∇r|² / Var r = {format_estimate(*found['mean_degree'])}. Errors are over sentences (jackknife)."
    )
    return Table(("s", "correlation of r(g(x)) and r(g(s x + √(1-s²) z))"), tuple(rows), caption)


def tails() -> Table:
    """Norms of the reward's gradient."""
    found = _records()["tails"]
    rows: list[tuple[Cell, ...]] = []
    for name in ("image", "latents", "noise"):
        norms = [f"{value:.3g}" for value in found[name]["norms"]]
        rows.append((f"in the {name}", *norms, f"{100 * found[name]['share_of_largest_hundredth']:.0f} %"))
    headers = ("norm of the gradient", *(f"{100 * q:g} %" for q in found["quantiles"]), "share of the largest 1 %")
    return Table(headers, tuple(rows), "Quantiles; last column: of the sum of squared norms.")


def bound() -> Table:
    """Signal and noise of bounded gradients."""
    found = _records()["bound"]
    rows: list[tuple[Cell, ...]] = []
    for limit in (name for name in found if isinstance(found[name], dict)):
        entry = found[limit]
        rows.append(
            (
                "none" if limit == "inf" else limit,
                format_estimate(*entry["second_moment"]),
                format_estimate(*entry["signal"]),
                format_estimate(*entry["along_true"]),
                f"{1e4 * entry['signal'][0] / entry['second_moment'][0]:.2g} ± "
                f"{1e4 * entry['signal'][1] / entry['second_moment'][0]:.2g}",
            )
        )
    headers = ("bound c", "E|g|²", "signal |E g|²", "⟨E g, E ∇r⟩", "signal / noise, 10⁻⁴")
    caption = (
        f"{found['samples']:,} gradients in {found['groups']} groups of sentences (kind, first digit), within which "
        "the mean direction is estimated; E ∇r without a bound by Stein's identity. Errors are over eight folds."
    )
    return Table(headers, tuple(rows), caption)


def curvature() -> Table:
    """What a gradient step costs."""
    found = _records()["curvature"]
    rows: list[tuple[Cell, ...]] = [
        (name, format_estimate(*entry["gain"]), format_estimate(*entry["l2"]), format_estimate(*entry["error"]))
        for name, entry in found.items()
        if isinstance(entry, dict)
    ]
    caption = (
        "Means over eight noises, each of another sentence; E(J) is dominated by the few that lie at a jump. Where the "
        "map folds, L2 term + E(J) is a lower bound of its nats."
    )
    return Table(("map", "gain in reward", "L2 term, nats", "E(J), nats"), tuple(rows), caption)


def stored() -> Table:
    """What is learned from the same stored gradients."""
    rows: list[tuple[Cell, ...]] = []
    order = ["unbounded", "bound 12", "bound 3", "bound 1"]
    records = _records()
    for name in sorted(records, key=lambda key: [key != f"stored {kind}" for kind in order]):
        record = records[name]
        if not name.startswith("stored "):
            continue
        for scale, entry in record["scales"].items():
            l2 = entry["l2"] if isinstance(entry["l2"], float) else entry["l2"][0]
            kl, share = entry["kl"], entry["efficiency"]
            rows.append(
                (
                    name.removeprefix("stored "),
                    f"{record['recipe']['alpha']:g}",
                    scale,
                    format_estimate(*entry["gain"]),
                    f"{l2:.3g}",
                    "not measured" if kl is None else format_estimate(*kl),
                    "–" if share is None else f"{format_estimate(*(100 * value for value in share))} %",
                )
            )
    headers = ("each gradient", "alpha", "scale of f", "gain in reward", "L2 term, nats", "KL integrand, nats",
               "efficiency")  # fmt: skip
    caption = (
        "19,200 samples of 32,768 stored gradients, one seed; measured on 800 images of 200 training sentences that "
        "were left out, the KL integrand by dense Jacobians on 32 of them. Errors of efficiencies are those of the "
        "gains, without the nats'."
    )
    return Table(headers, tuple(rows), caption)


def bundled() -> Table:
    """The adapter that comes with the miniature."""
    found = read_figures(model_folder())
    best = found["best_of_reward_gain"]
    share = format_estimate(*(100 * value for value in found["efficiency"]))
    rows: list[tuple[Cell, ...]] = [
        ("gain in the trained reward", format_estimate(*found["reward_gain"])),
        *((f"that of best-of-{n}", format_estimate(*value)) for n, value in best.items()),
        ("KL integrand, exact", f"{format_estimate(*found['kl'])} nats"),
        ("L2 term", f"{found['l2']:.3f} nats"),
        ("efficiency: share of the frontier there", f"{share} %"),
        ("judge, base", format_estimate(*found["judge_base"])),
        ("judge, paired gain", format_estimate(*found["judge_gain"])),
        ("legibility, base", format_estimate(*found["legibility_base"])),
        ("legibility, paired gain", format_estimate(*found["legibility_gain"])),
    ]
    caption = (
        f"{found['steps']} steps of the preset, seed {found['seed']}; {found['prompts']} held-out sentences, "
        f"{found['images']} images, one step; KL integrand on {found['kl_images']} of them. One seed of the training: "
        "the errors are over sentences, that of the efficiency is the gain's. The judge's mean is over sentences."
    )
    return Table(("figure", "value"), tuple(rows), caption)


def scaled() -> Table:
    """The bundled map at other scales."""
    rows: list[tuple[Cell, ...]] = [
        (
            scale, format_estimate(*entry["gain"]), f"{entry['l2'][0]:.3f}", format_estimate(*entry["kl"]),
            "–" if entry["efficiency"] is None else format_estimate(*(100 * v for v in entry["efficiency"])),
        )
        for scale, entry in _records()["scaled"]["scales"].items()
    ]  # fmt: skip
    caption = (
        "800 images of 200 training sentences, which the adapter was trained on; KL integrand by dense Jacobians on 32 "
        "of them. Errors of efficiencies are those of the gains, without the nats'."
    )
    return Table(("scale of f", *_EARNED), tuple(rows), caption)


def beside(names: Sequence[str]) -> Table:
    """Recipes at the end of their training, below the base recipe after as many steps."""
    document = _recipes()
    found = {row["recipe"]: row for row in document["rows"] if row["averaged"] and row["recipe"] in names}
    shown = [found[name] for name in names if name in found]
    (samples,) = {row["step"] * row["batch"] for row in shown}
    base = [
        row for row in document["rows"]
        if row["recipe"] == "base" and row["averaged"] and row["step"] * row["batch"] == samples
    ]  # fmt: skip
    rows: list[tuple[Cell, ...]] = [
        (
            row["recipe"], str(len(row["seeds"])), *_earned(row), _twice(row, "difference", 100),
            "{} of {}".format(*row["folds"]),
        )
        for row in [*base, *shown]
    ]  # fmt: skip
    headers = ("recipe", "seeds", *_EARNED, "points above base", "orientation reversed")
    caption = (
        f"{samples:,} samples each; {document['images']} images of {document['sentences']} "
        f"training sentences that were left out. {_ERRORS}; differences are at the same seeds and noises."
    )
    return Table(headers, tuple(rows), caption)


def smoothness() -> Table:
    """How far the same recipe goes for rewards that forget the noise sooner or later."""
    document = _recipes()
    smooth = document["smoothness"]
    step = 160
    rows: list[tuple[Cell, ...]] = []
    for reward, correlations in smooth.items():
        recipe = "base" if reward == next(iter(smooth)) else reward
        found = [r for r in document["rows"] if r["recipe"] == recipe and r["step"] == step and r["averaged"]]
        rows += [
            (
                reward,
                *(format_estimate(*value) for value in correlations.values()),
                str(len(row["seeds"])),
                *_earned(row),
            )
            for row in found
        ]
    levels = next(iter(smooth.values()))
    headers = ("reward", *(f"correlation at {s}" for s in levels), "seeds", *_EARNED)
    caption = (
        f"{step} steps of 32, at alpha 0.25 for the miniature's own reward and 2 for the others; {document['images']} "
        f"images of {document['sentences']} training sentences that were left out. Correlation of the rewards at x and "
        f"at s x + √(1-s²) z, within a sentence. {_ERRORS}."
    )
    return Table(headers, tuple(rows), caption)


def temperatures() -> Table:
    """What a temperature buys, beside the temperature of the frontier at the nats that were spent."""
    document = _recipes()
    shown = ("base", "alpha 0.1", "alpha 0.5", "default", "3,000 steps", "the bundled adapter")
    rows: list[tuple[Cell, ...]] = [
        (
            row["recipe"], str(row["step"] or _bundled_steps()), f"{row['alpha']:g}", str(len(row["seeds"])),
            *_earned(row), _over_seeds(row["temperature"]), f"{row['efficiency'][0] * row['temperature'][0]:.2f}",
        )
        for row in document["rows"]
        if row["recipe"] in shown and row["averaged"] and row["efficiency"] is not None
    ]  # fmt: skip
    headers = ("recipe", "steps", "alpha", "seeds", *_EARNED, "alpha(nats) of the frontier", "times efficiency")
    return Table(headers, tuple(rows), f"{_ERRORS}.")


def spread() -> str:
    """How the bundled map spreads its nats over sentences, in a sentence."""
    found = _recipes()["spread"]
    low, middle, high = found["quantiles"]
    return (
        f"The L2 term of the bundled map (gone on with for a few steps) lies between {low:.2g} and {high:.2g} nats at "
        f"nine sentences of ten, median {middle:.2g}; its rank correlation with the variance of the reward is "
        f"{format_estimate(*found['rank correlation'])}.\n"
    )


def recipe_steps() -> Table:
    """What more steps bring, and the average of the weights."""
    document = _recipes()
    rows: list[tuple[Cell, ...]] = [
        (
            row["recipe"], f"{row['step']} of {row['batch']}",
            "average" if row["averaged"] else "last", str(len(row["seeds"])), *_earned(row),
        )
        for row in document["rows"]
        if row["recipe"] in ("base", "default", *LONGER, TRAINING)
    ]  # fmt: skip
    headers = ("recipe", "steps", "weights", "seeds", *_EARNED)
    caption = (
        "Alpha: 0.15 for the default and its variants, 0.3 for the bundled adapter, else 0.25. That one was trained "
        f"on these sentences too. {_ERRORS}."
    )
    return Table(headers, tuple(rows), caption)


def recipe_kinds() -> Table:
    """What is earned on each kind of sentence, met in proportion or as often as there are sentences of it."""
    rows: list[tuple[Cell, ...]] = [
        (
            row["recipe"], row["kind"], str(row["sentences"]), str(len(row["seeds"])), _twice(row, "gain"),
            format_estimate(*row["l2"]) if row["l2"][1] else f"{row['l2'][0]:.3f}",
        )
        for row in _recipes()["kinds"]
    ]  # fmt: skip
    return Table(
        ("recipe", "kind", "sentences", "seeds", "gain in reward", "L2 term, nats"), tuple(rows), f"{_ERRORS}."
    )


def recipe_folds() -> Table:
    """What the fold penalty does to a map that folds, and its price."""
    document = _recipes()
    rows: list[tuple[Cell, ...]] = [
        (
            row["recipe"], str(len(row["seeds"])), _over_seeds(row["lowest"]), _over_seeds(row["beyond -1"], 100, " %"),
            f"{row['folds'][0]} of {row['folds'][1]}", *_earned(row),
        )
        for row in document["rows"]
        if "lowest" in row
    ]  # fmt: skip
    headers = ("recipe", "seeds", "mean λ_min", "below -1", "orientation reversed", *_EARNED)
    last = next(row for row in document["rows"] if "lowest" in row and row["step"])
    caption = (
        f"{last['step']} steps of {last['batch']} from the adapter; λ_min: of (J + J')/2, from dense Jacobians at 48 "
        f"noises. The adapter was trained on these sentences too, so that only differences count. {_ERRORS}."
    )
    return Table(headers, tuple(rows), caption)


_EARNED = ("gain in reward", "L2 term, nats", "KL integrand, nats", "efficiency, %")
_ERRORS = "Where there are two errors, the first is over seeds, the second over sentences and noises"


def _earned(row: dict[str, Any]) -> tuple[Cell, ...]:
    """Gain, L2 term, KL integrand and efficiency of a row."""
    l2 = format_estimate(*row["l2"]) if row["l2"][1] else f"{row['l2'][0]:.3f}"
    return _twice(row, "gain"), l2, _twice(row, "kl"), _twice(row, "efficiency", 100)


def _twice(row: dict[str, Any], key: str, factor: float = 1) -> str:
    """A mean with its two errors, over seeds and over sentences; of one seed the first is not known."""
    if row.get(key) is None:
        return "–"
    value, seeds = row[key]
    sentences = factor * row[f"{key} over sentences"]
    places = max(0, 1 - math.floor(math.log10(sentences)))
    first = "unknown" if seeds is None else f"{factor * seeds:.{places}f}"
    return f"{factor * value:.{places}f} ± {first} ± {sentences:.{places}f}"


def _over_seeds(estimate: Sequence[float | None], factor: float = 1, unit: str = "") -> str:
    """A mean over seeds, with its error where there are several."""
    value, stderr = (None if number is None else factor * number for number in estimate)
    return (f"{value:.2g}" if stderr is None else format_estimate(value or 0.0, stderr)) + unit


def budget() -> Table:
    """One temperature for all prompts against as many nats for each."""
    document = json.loads(BUDGET.read_text(encoding="utf-8"))
    gains = ("one temperature", "as many for each", "difference")
    rows: list[tuple[Cell, ...]] = []
    for nats, found in document["nats"].items():
        low, middle, high = found["spent"]
        share = found["difference"][0] / found["as many for each"][0]
        spent = f"{low:.2g} to {high:.2g}, median {middle:.2g}"
        rows.append((nats, *(format_estimate(*found[name]) for name in gains), f"{100 * share:.1f} %", spent,
                     f"{found['rank correlation']:.2f}"))  # fmt: skip
    headers = ("nats a prompt", *(f"gain, {name}" for name in gains), "share", "nats spent on a prompt",
               "rank correlation of these with the variance of the reward")  # fmt: skip
    caption = (
        f"{document['prompts']} training sentences that were left out, {document['samples']} base images each; errors "
        "are over sentences. Nats spent at one temperature: 5 % to 95 % of the sentences."
    )
    return Table(headers, tuple(rows), caption)


def lead() -> str:
    """What the bundled adapter earns, in a sentence."""
    found = read_figures(model_folder())
    share = format_estimate(*(100 * value for value in found["efficiency"]))
    negative = (found["folds"] or (0, 0))[0]
    more = " (or more, for it folds)," if negative else ","
    return (
        f"The hypernetwork that comes with the miniature (`--adapter bundled`, {found['steps']} steps of the "
        f"preset `long`, one seed) gains {format_estimate(*found['reward_gain'])} in the trained reward for "
        f"{format_estimate(*found['kl'])} nats{more} {share} % of what these could buy, and moves "
        f"the judge's mean by {format_estimate(*found['judge_gain'])}: on the held-out sentences, each counting the "
        "same ([why not more, and how often these were looked at](EARNING)).\n"
    )


def again() -> Table:
    """The bundled adapter beside its figures by another way."""
    sets, card = json.loads(AGAIN.read_text(encoding="utf-8"))["sets"], read_figures(model_folder())
    rows: list[tuple[Cell, ...]] = [
        (
            "held-out, as above", str(card["prompts"]), format_estimate(*card["reward_gain"]), f"{card['l2']:.3f}",
            format_estimate(*card["kl"]), format_estimate(*(100 * value for value in card["efficiency"])),
            "{} of {}".format(*card["folds"]),
        )
    ]  # fmt: skip
    for name, found in sets.items():
        share = format_estimate(*(100 * value for value in found["efficiency"]))
        figures = (format_estimate(*found[key]) for key in ("gain", "l2", "kl"))
        folds = f"{found['folds']} of {found['noises']}"
        rows.append((f"{name}, again", str(found["sentences"]), *figures, share, folds))
    caption = (
        "Again: at other noises, without hnkit's own estimates of KL and frontier, by `python "
        "benchmarks/bundled_again.py`: determinants of dense Jacobians by numpy in float64, base rewards reweighted; "
        "errors are over sentences, that of the efficiency a bootstrap of gain, nats and frontier together. The "
        "training sentences are drawn from all of them, 40 first and then 160 more, since the first gave a share that "
        "looked high."
    )
    return Table(("sentences", "how many", *_EARNED, "orientation reversed"), tuple(rows), caption)


TABLES: dict[str, Callable[[], Table]] = {
    "earning-spectrum": spectrum,
    "earning-tails": tails,
    "earning-bound": bound,
    "earning-curvature": curvature,
    "earning-stored": stored,
    "earning-bundled": bundled,
    "earning-again": again,
    "earning-steps": recipe_steps,
    "earning-kinds": recipe_kinds,
    "earning-scaled": scaled,
    "earning-folds": recipe_folds,
    "earning-temperatures": temperatures,
    "earning-budget": budget,
    "earning-smoothness": smoothness,
    **{f"earning-{name}": functools.partial(beside, recipes) for name, recipes in BESIDE.items()},
}
