"""The frontier of a comparison: from candidates of best-of-N where they exist, and from scores of images alone.

Here the noise is one number, the reward is the steered noise itself, and f a shift: nats, frontier and the distance
from the tilted law are known.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from hnkit.backend import image_noise
from hnkit.frontier import Frontier
from hnkit.injection import NoiseInjection
from hnkit.internal.stats import rounded_down
from hnkit.kl import noise_kl
from hnkit.scaled.compare.baselines import Cost
from hnkit.scaled.compare.evaluation import Evaluation, Row
from hnkit.scaled.compare.frontier import base_rewards, frontier_part, frontier_table, network_gap
from hnkit.scaled.compare.labels import COLOURS, network_label
from hnkit.scaled.compare.nats import NetworkKL, network_kl, rows_within
from hnkit.scaled.compare.page import _share
from hnkit.scaled.compare.plots import _frontier as draw_frontier
from hnkit.toy.backend import ToyBackend, ToyOptions


def evaluation(
    name: str, shift: float, seed: int, *, prompts: int = 5, images: int = 4, candidates: int = 0
) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in range(prompts):
        for image in range(images):
            pool = torch.randn(candidates, generator=generator).tolist()
            reward = max(pool) if pool else shift + float(torch.randn((), generator=generator))
            rows.append(Row(f"p{prompt}", image, "", {"reward": reward}, pool))
    return Evaluation(name, 1, tuple(rows), Cost(), 0.0)


def figures(kl: float, method: str = "exact") -> dict[str, object]:
    return {"kl": kl, "kl_stderr": 0.01, "method": method}


def measured(ours: Evaluation, shift: float, prompts: int, seeds: int, method: str = "exact") -> NetworkKL:
    """The integrand of eq. 53 of x -> x + shift at the noises of the images: `x shift + shift^2 / 2`."""
    by_prompt = base_rewards(ours.rows, pooled=False)
    chosen = list(by_prompt)[:prompts]
    values = [(float(by_prompt[p][k]) - shift) * shift + shift**2 / 2 for k in range(seeds) for p in chosen]
    return NetworkKL(tuple(range(prompts)), seeds, figures(sum(values) / len(values), method), tuple(values))


def test_the_candidates_of_best_of_n_are_the_base_samples():
    base, pool = evaluation("base", 0.0, 0), evaluation("best-of-n", 0.0, 1, candidates=20)
    ours = evaluation("hypernoise", 0.5, 2)
    kl = NetworkKL((0, 1, 2, 3, 4), 2, figures(0.2), (0.2,) * 10)
    document = frontier_part(base, [ours, pool], pool, {}, {"hypernoise": kl}, {"hypernoise": 1.0})
    samples = base_rewards(pool.rows)
    assert {len(values) for values in samples.values()} == {80}
    assert document["base_samples"] == 400
    frontier = Frontier(list(samples.values()))
    method = document["methods"]["hypernoise"]
    assert method["efficiency"] == method["gain"] / frontier.point(0.2).gain
    assert method["efficiency_stderr"] > 0
    assert (method["nats"], method["nats_stderr"]) == (0.2, 0.01)
    best = document["methods"]["best-of-n"]
    assert best["nats"] is None
    assert best["gap"] is None
    assert best["nats_lower_bound"] <= math.log(20) - 19 / 20
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def jackknifed(exponents):
    """`log E exp` without its bias of order 1/n: each sample is left out in turn."""
    n, weights = len(exponents), exponents.exp()
    left = torch.stack([torch.cat([weights[:i], weights[i + 1 :]]).mean().log() for i in range(n)])
    return n * weights.mean().log() - (n - 1) * left.mean()


def test_the_gap_is_that_of_the_prompts_that_were_measured():
    """Far from its target the bound is found, at its target it is zero; rewards and KL are of the same samples."""
    pool = evaluation("best-of-n", 0.0, 1, prompts=40, candidates=25)
    base = base_rewards(pool.rows)
    alpha = 0.7
    truth = {shift: (shift - 1 / alpha) ** 2 / 2 for shift in (-1.0, 1 / alpha)}
    for shift, nats in truth.items():
        ours = evaluation("hypernoise", shift, 2, prompts=40)
        kl = measured(ours, shift, 30, 3)
        gap = network_gap(kl, base_rewards(ours.rows, pooled=False), base, alpha)
        assert gap is not None
        assert gap.prompts == 30
        assert gap.lower <= nats
        assert gap.lower > 0.6 * nats - 0.01
        # the same from first principles: the integrand less r / alpha, prompt by prompt
        steered = list(base_rewards(ours.rows, pooled=False).items())[:30]
        terms = [kl.of_prompt(index) - r[:3] / alpha for index, (_, r) in enumerate(steered)]
        log_z = [jackknifed(base[p] / alpha) for p, _ in steered]
        assert gap.estimate == pytest.approx(float(torch.cat(terms).mean() + torch.stack(log_z).mean()))
        document = frontier_part(pool, [ours], pool, {}, {"hypernoise": kl}, {"hypernoise": alpha})
        assert document["methods"]["hypernoise"]["gap"]["lower"] == gap.lower
        table = frontier_table({"frontier": document})
        assert table.rows[0][-1] == f"at least {rounded_down(gap.lower, 3)}"
        assert "95 % probability" in table.caption


def test_a_gap_is_of_the_prompts_that_were_measured():
    """The same record at other places of the comparison's prompts is set beside the rewards of these."""
    pool = evaluation("best-of-n", 0.0, 1, prompts=20, candidates=200)
    ours = evaluation("hypernoise", 0.5, 2, prompts=20)
    base, steered = base_rewards(pool.rows), base_rewards(ours.rows, pooled=False)
    names, places = list(steered), (1, 7, 13, 19)
    kl = NetworkKL(places, 2, figures(0.2), tuple(0.1 * k for k in range(8)))
    gap = network_gap(kl, steered, base, 1.0)
    assert gap is not None
    kept = [names[place] for place in places]
    alone = network_gap(
        NetworkKL((0, 1, 2, 3), 2, kl.figures, kl.per_sample),
        {name: steered[name] for name in kept}, {name: base[name] for name in kept}, 1.0,
    )  # fmt: skip
    assert gap == alone


@pytest.mark.parametrize(
    ("prompts", "method", "alpha"), [(1, "exact", 1.0), (5, "second-order", 1.0), (5, "l2", 1.0), (5, "exact", None)]
)
def test_no_certificate_without_its_hypotheses(prompts, method, alpha):
    pool = evaluation("best-of-n", 0.0, 1, prompts=prompts, candidates=20)
    ours = evaluation("hypernoise", 0.5, 2, prompts=prompts)
    kl = measured(ours, 0.5, prompts, 2, method)
    document = frontier_part(pool, [ours], pool, {}, {"hypernoise": kl}, {"hypernoise": alpha})
    assert document["methods"]["hypernoise"]["gap"] is None
    assert "95 % probability a hypernetwork" not in frontier_table({"frontier": document}).caption
    assert ("One prompt only: no certificate" in frontier_table({"frontier": document}).caption) == (prompts == 1)


def test_rows_are_measured_twice_a_prompt_where_there_are_two_seeds():
    assert rows_within(38, 4, 64) == (32, 2)
    assert rows_within(8, 4, 64) == (8, 4)
    assert rows_within(38, 1, 64) == (38, 1)
    assert rows_within(38, 2, 2) == (1, 2)
    assert rows_within(3, 2, 4) == (2, 2)


def test_the_kl_is_measured_at_the_noises_of_the_images(make_backend):
    """A twin by hand: `noise_kl` of one prompt's map at the noises that `evaluate` gives it."""
    backend = make_backend("sana")
    with torch.no_grad():
        for parameter in backend.hypernetwork.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    prompts = ["a red house", "two dogs", "a cat", "three cats"]
    found = network_kl(backend, prompts, 2, 4, 7)
    assert (found.places, found.seeds, found.figures["prompts"]) == ((0, 2), 2, 2)
    for index, place in enumerate(found.places):
        x = image_noise(backend, backend.encode([prompts[place]] * 2).of_images(7, range(2)))
        twin = noise_kl(backend.map_for([prompts[place]] * 2), x, method="exact").per_sample
        torch.testing.assert_close(found.of_prompt(index), twin.double().cpu(), rtol=1e-3, atol=1e-4)


def test_too_few_samples_or_a_constant_reward_are_said():
    base = evaluation("base", 0.0, 0)
    document = frontier_part(base, [], None, {}, {}, {})
    assert document["frontier"] == []
    assert "rewards of the base; give 8 or more a prompt" in document["remark"]
    flat = Evaluation("base", 1, tuple(Row("p", k, "", {"reward": 1.0}) for k in range(20)), Cost(), 0.0)
    assert "constant" in frontier_part(flat, [], None, {}, {}, {})["remark"]
    assert not frontier_table({"frontier": document}).rows


def test_with_injected_noise_the_nats_are_the_proved_bound_s():
    """A deployed network: its nats are the bound's, of the first images' deltas, and there is no gap."""
    backend = ToyBackend(ToyOptions())
    with torch.no_grad():
        backend.hypernetwork.body[0].bias.fill_(0.3)
    backend.injection = NoiseInjection(0.25)
    found = network_kl(backend, ["a", "b", "c"], 2, 6, seed=0)
    expected = 0.75 / 0.5 * 0.09 * backend.noise_shape[0]
    assert found.figures["injected"]["nats"] == pytest.approx(expected)
    ours = evaluation("hypernoise", 0.5, 2, images=2)
    base, pool = evaluation("base", 0.0, 0), evaluation("best-of-n", 0.0, 1, candidates=20)
    document = frontier_part(base, [ours], pool, {}, {"hypernoise": found}, {"hypernoise": 1.0})
    method = document["methods"]["hypernoise"]
    assert method["nats"] == pytest.approx(expected)
    assert method["gap"] is None
    assert "at least" not in frontier_table({"frontier": document}).rows[0][-1]


def test_a_method_has_one_colour_in_every_plot_of_a_comparison():
    points = [{"nats": nats, "gain": nats**0.5, "stderr": 0.1} for nats in (0.1, 0.2, 0.4)]
    method = {"nats": 0.2, "gain": 0.3, "stderr": 0.1, "nats_lower_bound": 0.1}
    names = ("hypernoise", "reno", "direct")
    found = {"frontier": points, "best_of": [], "most_nats": 0.4, "methods": dict.fromkeys(names, method)}
    axes = draw_frontier(found).axes[0]
    drawn = {container.get_label(): container[0].get_color() for container in axes.containers}
    assert drawn == {network_label(name): COLOURS[name] for name in names}
    assert axes.lines[0].get_color() not in drawn.values()


def test_shares_of_right_images_have_two_decimals_whatever_they_are():
    shown = [_share(value) for value in (1.0, 0.5, 0.926, 0.0, None, math.nan)]
    assert shown == ["1.00", "0.50", "0.93", "0.00", "–", "–"]
