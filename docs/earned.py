"""The tables of docs/earning.md, from docs/results/earning.json and the figures of the bundled adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hnkit.output.page import Cell, Table, format_estimate
from hnkit.scaled.digits.checkpoint import model_folder
from hnkit.scaled.digits.train.adapter import read_figures

RESULTS = Path(__file__).resolve().parent / "results" / "earning.json"


def _records() -> dict[str, dict[str, Any]]:
    """Experiment -> its record; there is one seed of each."""
    return {record["experiment"]: record for record in json.loads(RESULTS.read_text(encoding="utf-8"))["records"]}


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
        "were left out, the KL integrand by dense Jacobians on 32 of them."
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
        "the errors are over sentences."
    )
    return Table(("figure", "value"), tuple(rows), caption)


def scaled() -> str:
    """The bundled map at another scale, in a sentence."""
    ((scale, entry),) = _records()["scaled"]["scales"].items()
    share = format_estimate(*(100 * value for value in entry["efficiency"]))
    return (
        f"On 800 images of 200 training sentences the map of its first 414 steps, taken {scale} times as large, gains "
        f"{format_estimate(*entry['gain'])} for {format_estimate(*entry['kl'])} nats: {share} % of the frontier "
        "there.\n"
    )


def lead() -> str:
    """What the bundled adapter earns, in a sentence."""
    found = read_figures(model_folder())
    return (
        f"The hypernetwork that comes with the miniature (`--adapter bundled`, {found['steps']} steps of the "
        f"preset `long`) gains {format_estimate(*found['reward_gain'])} in the trained reward for "
        f"{format_estimate(*found['kl'])} nats, {100 * found['efficiency'][0]:.0f} % of what they could buy, and moves "
        f"the judge's mean by {format_estimate(*found['judge_gain'])} ([why not more](EARNING)).\n"
    )


TABLES = {
    "earning-spectrum": spectrum,
    "earning-tails": tails,
    "earning-bound": bound,
    "earning-curvature": curvature,
    "earning-stored": stored,
    "earning-bundled": bundled,
}
