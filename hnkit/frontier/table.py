"""Anyone's method on the frontier: a table of rewards in, gains and efficiencies out; no model is needed."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.frontier.certified import GapBound, nats_lower_bound
from hnkit.frontier.curve import LEAST_SAMPLES, Frontier, over_prompts
from hnkit.internal.stats import mean_and_stderr
from hnkit.internal.values import finite, parsed_number, shown

_LONGEST = 100
"""Characters of a method's name, which stands in tables and legends."""


@dataclass(frozen=True)
class Rewards:
    """Rewards of a method's samples, prompt by prompt, and its nats where they are known.

    Attributes:
        rewards: prompt -> `(m,)` rewards.
        nats: mean over prompts of the method's KL from the base (or an upper bound of it); `None` if unknown.
        nats_stderr: standard error of these nats; 0 where they are known exactly.
        gap: how far the method is from the tilted law of its temperature, where that was bounded.
        nats_at_most: whether the nats are a proved bound, as with injected noise, and may not all have been spent.
    """

    rewards: Mapping[str, Tensor]
    nats: float | None = None
    nats_stderr: float = 0.0
    gap: GapBound | None = None
    nats_at_most: bool = False


@dataclass(frozen=True)
class MethodGain:
    """What a method gains over the base, and what its nats could have bought.

    Attributes:
        gain: mean over prompts of the difference of mean rewards.
        stderr: its standard error over prompts, with Student's factor where they are few; NaN where there is one.
        nats_lower_bound: see the function of that name, at 95 %.
        nats: the method's nats where they are known, else `None`.
        nats_stderr: standard error of these nats; 0 where they are exact, or are not known.
        efficiency: `gain / R*(nats)`, `None` where the nats are unknown or beyond what the samples carry. (At the
            nats that its rewards alone show, every method would be efficient: its nats must be known.)
        efficiency_stderr: standard error of the efficiency over prompts; NaN where there is one.
        gap: how far the method is from the tilted law of its temperature, where that was bounded.
        nats_at_most: whether the nats are a proved bound: the efficiency is then an estimate from below.
    """

    gain: float
    stderr: float
    nats_lower_bound: float
    nats: float | None
    efficiency: float | None
    nats_stderr: float = 0.0
    efficiency_stderr: float | None = None
    gap: GapBound | None = None
    nats_at_most: bool = False


def read_rewards(path: str | Path) -> dict[str, Rewards]:
    """Read a CSV with the columns prompt, method, reward and, if nats are known, nats (any order, others ignored).

    A method's nats are the mean over prompts of the mean over its rows, with the error of that mean where the rows of a
    prompt differ, as samples of an integrand do. A method called `best-of-N` has at most `log N - (N - 1) / N` nats,
    which are used where the column is absent or empty.

    Raises:
        InputError: the file cannot be read, a column is missing, or a value is no finite number (the line is named).
    """
    file = Path(path)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines)
            missing = {"prompt", "method", "reward"} - set(table.fieldnames or ())
            if missing:
                raise InputError(
                    f"{file}: no column {', '.join(sorted(missing))}; give a CSV with a header and the columns prompt, "
                    "method, reward"
                )
            if twice := [name for name, count in Counter(table.fieldnames or ()).items() if count > 1]:
                raise InputError(f"{file}: {twice.pop()!r} is the name of more than one column; leave one of them out")
            rewards: dict[str, dict[str, list[float]]] = {}
            nats: dict[str, dict[str, list[float]]] = {}
            for row in table:
                where = f"{file}, line {table.line_num}"
                if any(row.get(None) or ()):
                    raise InputError(f"{where}: more fields than the header has; quote a prompt that has a comma")
                prompt, method = row["prompt"] or "", (row["method"] or "").strip()
                if not method:
                    raise InputError(f"{where}: no method; give a name, `base` for samples of the base")
                if len(method) > _LONGEST:
                    raise InputError(
                        f"{where}: a method of {len(method)} characters; give a name of {_LONGEST} at most"
                    )
                rewards.setdefault(method, {}).setdefault(prompt, []).append(_number(row["reward"], f"{where}: reward"))
                if row.get("nats"):
                    nats.setdefault(method, {}).setdefault(prompt, []).append(_number(row["nats"], f"{where}: nats"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} is no CSV file in UTF-8 ({error})") from None
    for method, given in nats.items():
        if lacking := [prompt for prompt in rewards[method] if prompt not in given]:
            raise InputError(f"{file}: method {method!r} has nats on some prompts only, none on {lacking[0]!r}")
    return {method: _rewards(method, prompts, nats.get(method)) for method, prompts in rewards.items()}


def _number(text: str | None, what: str) -> float:
    value = parsed_number(text or "")
    if not math.isfinite(value):
        raise InputError(f"{what} {shown(text)} is no finite number; leave such rows out, and say so")
    return value


def _rewards(
    method: str, prompts: Mapping[str, Sequence[float]], nats: Mapping[str, Sequence[float]] | None
) -> Rewards:
    rewards = {prompt: torch.tensor(values, dtype=torch.float64) for prompt, values in prompts.items()}
    if nats:
        mean = math.fsum(math.fsum(values) / len(values) for values in nats.values()) / len(nats)
        # One row says nothing of its own error, and rows that agree are a figure of the prompt, not samples.
        samples = [torch.tensor(values, dtype=torch.float64) for values in nats.values() if min(values) < max(values)]
        errors = [mean_and_stderr(values)[1] for values in samples]
        error = math.hypot(*errors) / len(nats)
        if mean + 5 * error < 0:  # single samples of an integrand may be negative
            raise InputError(f"method {method!r} has {mean:.4g} nats on average; a KL is not negative: mend the column")
        return Rewards(rewards, mean, error)
    named = re.fullmatch(r"best-of-([1-9][0-9]{0,299})", method)
    if named:
        n = int(named[1])
        return Rewards(rewards, math.log(n) - (n - 1) / n, nats_at_most=True)
    return Rewards(rewards)


def methods_on_frontier(
    table: Mapping[str, Rewards], *, base: str = "base", seed: int = 0
) -> tuple[Frontier, dict[str, MethodGain]]:
    """The frontier of the base samples of a table, and every other method of it measured against it.

    Args:
        table: method -> its rewards, as `read_rewards` gives them.
        base: which of the methods is the base.
        seed: the seed of the bootstrap.

    Raises:
        InputError: there is no base, or a method lacks a prompt of the base or has one that the base lacks.
    """
    if base not in table:
        raise InputError(
            f"no method is called {base!r}, which is to be the base: there are {', '.join(table) or 'none'}"
        )
    prompts = list(table[base].rewards)
    base_rewards = [table[base].rewards[prompt] for prompt in prompts]
    for prompt, values in table[base].rewards.items():
        if len(values) < LEAST_SAMPLES:
            raise InputError(
                f"prompt {prompt!r}: {len(values)} rewards of the base; give {LEAST_SAMPLES} or more a prompt"
            )
    frontier = Frontier(base_rewards, seed=seed)
    found = {}
    for name, method in table.items():
        if name == base:
            continue
        if different := set(prompts) ^ set(method.rewards):
            raise InputError(f"method {name!r} and the base differ in prompts, {sorted(different)[0]!r} among them")
        rewards = [method.rewards[prompt] for prompt in prompts]
        gains = torch.stack([r.mean() - b.mean() for r, b in zip(rewards, base_rewards, strict=True)])
        gain = over_prompts(gains)
        share = None
        if method.nats is not None and frontier.carries(method.nats):
            share = frontier.efficiency_estimate(gains, method.nats, method.nats_stderr)
        bound = nats_lower_bound(base_rewards, rewards)
        efficiency, spread = (None, None) if share is None else (share.value, share.stderr)
        found[name] = MethodGain(
            gain.value, gain.stderr, bound, method.nats, efficiency, method.nats_stderr, spread, method.gap,
            method.nats_at_most,
        )  # fmt: skip
    return frontier, found


def no_frontier(remark: str) -> dict[str, Any]:
    """The document where there is no frontier; `remark` says why."""
    return {"frontier": [], "best_of": [], "methods": {}, "remark": remark}


def frontier_document(frontier: Frontier, methods: Mapping[str, MethodGain]) -> dict[str, Any]:
    """The JSON document of a frontier: its points, best-of-N up to the samples of a prompt, and the methods by name."""
    least = min(len(r) for r in frontier.base)
    counts = [n for n in (2, 4, 8, 16, 32, 50, 64, 100, 128, 256) if n <= least]
    document: dict[str, Any] = finite(
        {
            "prompts": len(frontier.base),
            "base_samples": sum(len(r) for r in frontier.base),
            "most_nats": frontier.most_nats,
            "frontier": [asdict(point) for point in frontier.curve()],
            "best_of": [asdict(frontier.best_of(n)) for n in counts],
            "methods": {name: asdict(method) for name, method in methods.items()},
        }
    )
    return document
