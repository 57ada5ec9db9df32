"""What the runs of benchmarks/recipes.py say together: means over seeds, and differences at the same noises.

Two errors are told apart. Over seeds: what another training would have given on these sentences. Over sentences: what
other sentences and noises would have given these maps; it is that of the mean over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hnkit import Frontier
from hnkit.internal.stats import mean_and_stderr

BASE, BUNDLED = "base", "the bundled adapter, gone on"
BATCH = 32
"""Samples in a step of what recipes are set against."""
Key = tuple[str, int, bool]
"""Recipe, step, whether the weights are averaged."""


def summary(records: Sequence[dict[str, Any]], frontier: Frontier) -> list[dict[str, Any]]:
    """A row for each recipe, number of steps and kind of weights, against the base recipe after as many samples.

    What goes on from the bundled adapter is set against going on from it with the loss alone.

    Args:
        records: what `recipes.job` wrote.
        frontier: of the sentences that the maps were measured on, in their order.
    """
    runs: dict[Key, dict[int, dict[str, Any]]] = {}
    for record in records:
        runs.setdefault((record["recipe"], record["step"], record["averaged"]), {})[record["seed"]] = record
    rows = []
    for (name, step, averaged), found in runs.items():
        alike = BUNDLED if name.startswith(BUNDLED) else BASE
        batch = next(iter(found.values()))["settings"]["batch"]
        reference = (alike, step * batch // BATCH, True)
        against = runs.get(reference, {}) if reference != (name, step, averaged) else {}
        rows.append(_row(name, step, averaged, found, frontier) | _difference(found, against, frontier))
    return rows


def _row(name: str, step: int, averaged: bool, found: dict[int, dict[str, Any]], frontier: Frontier) -> dict[str, Any]:
    runs = list(found.values())
    row: dict[str, Any] = {
        "recipe": name, "step": step, "averaged": averaged, "seeds": sorted(found),
        "batch": runs[0]["settings"]["batch"], "alpha": runs[0]["settings"]["alpha"],
        "seconds": sum(run["seconds"] for run in runs) / len(runs),
        "folds": [sum(run["folds"][0] for run in runs), sum(run["folds"][1] for run in runs)],
        "norm": max((run["norm"] for run in runs if run["norm"] is not None), default=None),
    }  # fmt: skip
    for key in ("gain", "l2", "kl"):
        row[key] = over_seeds([run[key][0] for run in runs])
    gains, squares = (_mean_of(runs, key) for key in ("gains", "squares"))
    row["gain over sentences"] = mean_and_stderr(gains)[1]
    row["kl over sentences"] = math.hypot(*(mean_and_stderr(v)[1] for v in (squares, _mean_of(runs, "errors"))))
    shares = [_share(run, frontier) for run in runs]
    row["efficiency"] = None
    if all(share is not None for share in shares):
        row["efficiency"] = over_seeds([share for share in shares if share is not None])
        row["efficiency over sentences"] = _over_sentences([(run, 1.0) for run in runs], frontier)
        row["temperature"] = over_seeds([frontier.point(run["kl"][0]).alpha for run in runs])
    if "lowest" in runs[0]:
        lowest = [torch.tensor(run["lowest"], dtype=torch.float64) for run in runs]
        row["lowest"] = over_seeds([float(values.mean()) for values in lowest])
        row["beyond -1"] = over_seeds([float((values < -1).double().mean()) for values in lowest])
    return row


def _difference(
    found: dict[int, dict[str, Any]], against: dict[int, dict[str, Any]], frontier: Frontier
) -> dict[str, Any]:
    """Differences to the other runs of the same seeds, which saw the same noises; none where there are none."""
    seeds = sorted(found.keys() & against.keys())
    if not seeds:
        return {}
    pairs = [(found[seed], against[seed]) for seed in seeds]
    row: dict[str, Any] = {"paired seeds": seeds}
    for key in ("gain", "kl"):
        row[f"{key} difference"] = over_seeds([one[key][0] - other[key][0] for one, other in pairs])
    shares = [(_share(one, frontier), _share(other, frontier)) for one, other in pairs]
    if all(one is not None and other is not None for one, other in shares):
        row["difference"] = over_seeds([one - other for one, other in shares if one is not None and other is not None])
        weighed = [(run, sign) for pair in pairs for run, sign in zip(pair, (1.0, -1.0), strict=True)]
        row["difference over sentences"] = _over_sentences(weighed, frontier)
    return row


def spread(records: Sequence[dict[str, Any]], frontier: Frontier) -> dict[str, Any] | None:
    """How the bundled map spreads its L2 term over sentences, and its rank correlation with the variance of the reward.

    `None` where it was not measured.
    """
    runs = [record for record in records if record["recipe"] == BUNDLED]
    if not runs:
        return None
    nats = torch.tensor([run["squares"] for run in runs], dtype=torch.float64).mean(0)
    variance = torch.stack([rewards.var() for rewards in frontier.base])
    ranks = torch.stack([column.argsort().argsort().double() for column in (nats, variance)])
    return {
        "quantiles": nats.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist(),
        "rank correlation": (float(torch.corrcoef(ranks)[0, 1]), 1 / math.sqrt(len(nats) - 1)),
    }


def by_kind(records: Sequence[dict[str, Any]], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Gain and L2 term of the last step's average by kind of sentence, a row for each recipe and kind.

    Args:
        records: what `recipes.job` wrote.
        kinds: of the sentences that the maps were measured on, in their order.
    """
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        before = runs.setdefault(record["recipe"], {}).get(record["seed"])
        if record["averaged"] and (before is None or before["step"] < record["step"]):
            runs[record["recipe"]][record["seed"]] = record
    rows = []
    for name, found in runs.items():
        for kind in dict.fromkeys(kinds):
            at = torch.tensor([place for place, other in enumerate(kinds) if other == kind])
            gains, squares = (
                torch.tensor([run[key] for run in found.values()], dtype=torch.float64)[:, at]
                for key in ("gains", "squares")
            )
            rows.append({
                "recipe": name, "kind": kind, "sentences": len(at), "seeds": sorted(found),
                "gain": over_seeds(gains.mean(1).tolist()), "l2": over_seeds(squares.mean(1).tolist()),
                "gain over sentences": mean_and_stderr(gains.mean(0))[1],
            })  # fmt: skip
    return rows


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean with its standard error over seeds; `None` of one seed, which says nothing about it."""
    mean, stderr = mean_and_stderr(torch.tensor(values, dtype=torch.float64))
    return mean, None if math.isnan(stderr) else stderr


def _mean_of(runs: Sequence[dict[str, Any]], key: str) -> Tensor:
    """The mean over runs of what each has at every sentence or noise, at those that all have."""
    fewest = min(len(run[key]) for run in runs)
    return torch.tensor([run[key][:fewest] for run in runs], dtype=torch.float64).mean(0)


def _share(run: dict[str, Any], frontier: Frontier) -> float | None:
    """The efficiency of a run, where the base samples carry the frontier at its nats."""
    nats = run["kl"][0]
    return run["gain"][0] / frontier.point(nats).gain if nats > 0 and frontier.carries(nats) else None


def _over_sentences(weighed: Sequence[tuple[dict[str, Any], float]], frontier: Frontier) -> float:
    """Standard error over sentences of the sum of signed efficiencies, divided by the number of positive ones.

    To first order a gain at a sentence moves an efficiency by `1 / R*`, and a nat at a noise by `-gain R*' / R*^2`; the
    same sentences and noises meet with all maps, so that what is common to two maps cancels. Nats are known at the
    first noises alone, their L2 term at all.
    """
    count = sum(sign > 0 for _, sign in weighed)
    fewest = min(len(run["errors"]) for run, _ in weighed)
    moved: Tensor = torch.zeros(len(weighed[0][0]["gains"]), dtype=torch.float64)
    rest: Tensor = torch.zeros(fewest, dtype=torch.float64)
    for run, sign in weighed:
        point = frontier.point(run["kl"][0])
        slope = run["gain"][0] * point.alpha / point.gain**2
        gains, squares, errors = (torch.tensor(run[key], dtype=torch.float64) for key in ("gains", "squares", "errors"))
        moved += sign / count * (gains / point.gain - slope * squares)
        rest -= sign / count * slope * errors[:fewest]
    return math.hypot(mean_and_stderr(moved)[1], mean_and_stderr(rest)[1])
