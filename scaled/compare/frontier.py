"""Every method of a comparison on the frontier of reward per nat, from images that the comparison has made already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.frontier import GapBound, Rewards, frontier_document, gap_lower_bound, methods_on_frontier, no_frontier
from hnkit.frontier.measured import FAITHFUL
from hnkit.frontier.page import nats_text, share
from hnkit.internal.stats import rounded_down
from hnkit.internal.values import or_nan
from hnkit.output.page import Table, format_estimate
from hnkit.scaled.compare.evaluation import Evaluation, Row
from hnkit.scaled.compare.labels import Document, network_label
from hnkit.scaled.compare.nats import NetworkKL

REWARD = "reward"


def frontier_part(
    base: Evaluation,
    methods: Sequence[Evaluation],
    pool: Evaluation | None,
    nats: Mapping[str, float],
    measured: Mapping[str, NetworkKL],
    alphas: Mapping[str, float | None],
) -> dict[str, Any]:
    """What `hnkit frontier` would say of the methods, in the trained reward.

    Args:
        base: the base's images.
        methods: the images of every other method.
        pool: best-of-N's images, whose candidates are base samples; `None`: the base's images are all there are.
        nats: method -> an upper bound of its nats that is known without a measurement.
        measured: network -> its KL, at the noises of its first images.
        alphas: network -> the temperature of its target; `None`: it has none.

    Returns:
        The document of `hnkit.frontier.frontier_document`; where there is no frontier, an empty one whose `remark`
        says why.
    """
    samples = base_rewards(base.rows if pool is None else pool.rows)
    table = {"base": Rewards(samples)}
    for evaluation in methods:
        name, rewards = evaluation.method, base_rewards(evaluation.rows, pooled=False)
        if name in measured:
            gap = network_gap(measured[name], rewards, samples, alphas.get(name))
            table[name] = Rewards(rewards, *measured[name].nats, gap, bool(measured[name].figures.get("injected")))
        else:
            table[name] = Rewards(rewards, nats.get(name), nats_at_most=name in nats)
    try:
        frontier, found = methods_on_frontier(table)
    except InputError as reason:  # too few base samples, or a reward that is constant over the base
        return no_frontier(f"No frontier of reward per nat: {reason}.")
    return frontier_document(frontier, found)


def network_gap(
    measured: NetworkKL, steered: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float | None
) -> GapBound | None:
    """How far a network is at least from the tilted law of its temperature, over the prompts that were measured.

    `None` where there is no temperature, one prompt, a method of the KL that leaves out a part of it, injected noise,
    whose KL is bounded from above alone, or a reward that is not finite.
    """
    faithful = measured.figures["method"] in FAITHFUL and not measured.figures.get("injected")
    if alpha is None or len(measured.places) < 2 or not faithful:
        return None
    names = list(steered)
    prompts = [names[place] for place in measured.places]
    kl = [measured.of_prompt(index) for index in range(len(prompts))]
    rewards = [steered[prompt][: measured.seeds] for prompt in prompts]
    bases = [base[prompt] for prompt in prompts]
    if not all(bool(values.isfinite().all()) for values in [*rewards, *bases]):
        return None
    return gap_lower_bound(kl, rewards, bases, alpha)


def base_rewards(rows: Sequence[Row], *, pooled: bool = True) -> dict[str, Tensor]:
    """Prompt -> rewards of its images, or of the candidates that they were chosen from."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.prompt, []).extend(row.pool if pooled and row.pool else (row.scores[REWARD],))
    return {prompt: torch.tensor(values, dtype=torch.float64) for prompt, values in found.items()}


# --- on the page ------------------------------------------------------------------------------------------------


def frontier_table(document: Document) -> Table:
    """Nats, gain in the trained reward, and efficiency of every method; empty where there is no frontier."""
    found = document.get("frontier") or {"methods": {}}
    body = []
    for name, method in found["methods"].items():
        body.append(
            (
                network_label(name),
                nats_text(method),
                format_estimate(method["gain"], or_nan(method["stderr"])),
                share(method) or "–",
                "–" if method["gap"] is None else f"at least {rounded_down(method['gap']['lower'], 3)}",
            )
        )
    caption = (
        "Gain in the trained reward, which the methods maximise. Efficiency is the gain as a share of the most that "
        "any law of so many nats can gain, estimated from rewards of base images alone. Nats of best-of-N are an upper "
        "bound, nats of networks the mean KL integrand (the KL where x + f(x) is injective, else a lower bound of it), "
        "with injected noise the proved bound of the KL; the efficiency at an upper bound is an estimate from below, "
        "and 'at least' is a 95 % bound by the rewards alone. "
    )
    return Table(
        ("method", "nats", "gain in reward", "efficiency", "nats from its target"), tuple(body), caption + _gaps(found)
    )


def _gaps(found: Mapping[str, Any]) -> str:
    """What the certified gaps hold of, or why there are none."""
    bounds = [method["gap"] for method in found["methods"].values() if method["gap"] is not None]
    if bounds:
        return (
            f"Nats from its target: with {100 * bounds[0]['confidence']:.0f} % probability a hypernetwork's law is so "
            f"far from the law that its temperature names, at least, on the mean over "
            f"{bounds[0]['prompts']} prompts."
        )
    if found.get("prompts") == 1:
        return "One prompt only: no certificate of the distance from the target, which costs log(40) nats over prompts."
    return ""
