"""What a budget of nats earns spread over prompts, against as many nats for each: docs/results/budget.json.

    python benchmarks/budget.py        two minutes of one core

From rewards of base samples alone. With one mean budget K the best law has one temperature for all prompts, and so
spends more where rewards spread more; with K nats for each prompt every prompt has a temperature of its own.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from earning import load, normal, rewards, split
from torch import Tensor

from hnkit.frontier.cumulant import cumulant
from hnkit.internal.files import write_json
from hnkit.internal.stats import mean_and_stderr
from hnkit.internal.versions import versions

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "budget.json"
PROMPTS, SAMPLES, NATS = 64, 512, (0.1, 0.2, 0.4, 0.66)


def spread_over_prompts(pool: Tensor, nats: float) -> dict[str, Any]:
    """The gain of the best law of `nats` a prompt on average, and of the best one of `nats` for each prompt.

    With `psi_c` the cumulants, the first is `min_beta mean_c (nats + psi_c(beta)) / beta`, the second the mean of the
    minima. Their difference is the mean over prompts of `(nats + psi_c(beta*)) / beta* - min`, none of which is
    negative, at the common beta*; to first order its error is theirs. To it is added what half of the samples come out
    more or less.

    Args:
        pool: rewards of base samples, `(prompts, samples)`.
        nats: the mean budget, in nats.

    Returns:
        Value and error of `one temperature`, `as many for each`, `difference`; `spent`, the 5, 50 and 95 % quantiles
        over prompts of what the first spends, in nats; and its `rank correlation` with the variance of the reward.
    """
    values, spent = _at(pool, nats)
    halves = [_at(half, nats)[0] for half in pool.tensor_split(2, dim=1)]
    found: dict[str, Any] = {}
    for index, name in enumerate(("one temperature", "as many for each", "difference")):
        mean, stderr = mean_and_stderr(values[index])
        lacking = mean - sum(float(half[index].mean()) for half in halves) / 2
        found[name] = (mean, math.hypot(stderr, lacking))
    ranks = torch.stack([column.argsort().argsort().double() for column in (spent, pool.var(1))])
    found["rank correlation"] = float(torch.corrcoef(ranks)[0, 1])
    found["spent"] = spent.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return found


def _at(pool: Tensor, nats: float) -> tuple[Tensor, Tensor]:
    """Gains of each prompt, `(3, prompts)`, and nats that each spends at the common temperature."""
    betas = torch.logspace(-2.5, 1.5, 801, dtype=torch.float64) / math.sqrt(float(pool.var(1).mean()))
    found = [cumulant(r, betas) for r in pool.double()]
    psi = torch.stack([prompt.psi for prompt in found])
    gains = (nats + psi) / betas
    best = int(gains.mean(0).argmin())
    common, own = gains[:, best], gains.min(1).values
    spent = betas[best] * torch.stack([prompt.gain[best] for prompt in found]) - psi[:, best]
    return torch.stack([common, own, common - own]), spent


def main() -> None:
    """Draw the rewards and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    backend, draw = load(), torch.Generator().manual_seed(11)
    pool = []
    with torch.no_grad():
        for text in split()[1][:PROMPTS]:
            parts = [rewards(backend, normal(backend, 64, draw), [text] * 64) for _ in range(SAMPLES // 64)]
            pool.append(torch.cat(parts).double())
    found = {str(nats): spread_over_prompts(torch.stack(pool), nats) for nats in NATS}
    write_json(OUT, {"prompts": PROMPTS, "samples": SAMPLES, "nats": found, "versions": versions()})


if __name__ == "__main__":
    main()
