"""Reward per nat at the end of a run, where everything is known: noise on the line, its own reward, and f a shift.

The law of x + s is the tilted law of the temperature 1 / s, so that it gains the most that its `s^2 / 2` nats can buy:
its efficiency is 1. From the target of the temperature alpha it is `(s - 1 / alpha)^2 / 2` nats.
"""

from __future__ import annotations

import json
import math
import re
from html import escape
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor

from hnkit.config import TrainConfig
from hnkit.errors import InputError
from hnkit.frontier import page
from hnkit.internal.stats import Estimate
from hnkit.output.verdict import card_from, read_card
from hnkit.training.nats import reward_per_nat, sizes
from hnkit.training.validate import Evaluator, Validation
from tests.hnkit.training.training_runs import fake_config, records, run

FALSE_ALARM = 1e-6
SHIFT, PROMPTS = 0.6, [f"prompt {k}" for k in range(12)]


class Shifted:
    """An evaluator whose outputs are the noise, whose reward is its value plus the prompt's number, and f = SHIFT."""

    def __init__(
        self, seed: int, *, alpha: float = 1.0, samples: int = 96, constant: bool = False, injection: float = 0.0
    ) -> None:
        self.settings = TrainConfig(alpha=alpha, validate_samples=samples, measure_samples=48, injection=injection)
        self.backend = SimpleNamespace(noise_shape=(1,))
        self.measured_prompts = [PROMPTS[row % 12] for row in range(48)]
        self.generator, self.constant = torch.Generator().manual_seed(seed), constant
        self.made, self.images = 0, set()

    def noise(self, count: int, _: str) -> Tensor:
        return torch.randn(count, 1, generator=self.generator, dtype=torch.float64)

    def rewards_of(self, prompts: list[str], numbers: list[int], noise: Tensor, *, steered: bool) -> Tensor:
        self.images |= {(prompt, number, steered) for prompt, number in zip(prompts, numbers, strict=True)}
        self.made += len(prompts)
        offset = torch.tensor([float(prompt.split()[1]) for prompt in prompts], dtype=torch.float64)
        return (0.0 if self.constant else 1.0) * (noise[:, 0] + SHIFT * steered + offset)

    def validation(self) -> Validation:
        count = self.settings.validate_samples
        prompts = [PROMPTS[row % 12] for row in range(count)]
        noise = self.noise(count, "validate")
        numbers = list(range(count))
        base, steered = (self.rewards_of(prompts, numbers, noise, steered=moved) for moved in (False, True))
        self.made = 0
        score = {"gain": float((steered - base).mean()), "gain_stderr": 0.0}
        return Validation(
            {"scores": {"reward": score}}, tuple(prompts), base, steered, torch.full((count,), 0.2, dtype=torch.float64)
        )

    def measurement(self, method: str = "exact") -> Any:
        values = self.noise(48, "measure")[:, 0] * SHIFT + SHIFT**2 / 2  # eq. 53 of a shift
        return SimpleNamespace(kl=Estimate(SHIFT**2 / 2, 0.0), method=method, per_sample=values)


def document(seed: int, **options: Any) -> dict[str, Any]:
    evaluator = Shifted(seed, **options)
    return reward_per_nat(evaluator, evaluator.validation(), evaluator.measurement())


def test_a_shift_is_as_efficient_as_any_law():
    found = [document(seed)["methods"]["hypernetwork"] for seed in range(40)]
    values = torch.tensor([method["efficiency"] for method in found], dtype=torch.float64)
    radius = norm.isf(FALSE_ALARM / 2) * float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - 1) < radius
    # error bars are made for an interval that covers with 95 %: they may be wide, for few prompts, and not narrow
    covered = sum(abs(method["efficiency"] - 1) <= 1.96 * method["efficiency_stderr"] for method in found)
    assert covered >= binom.isf(1 - FALSE_ALARM, len(found), 0.95)
    ratio = float(values.std()) / (sum(method["efficiency_stderr"] for method in found) / len(found))
    assert 0.2 < ratio < 1.2


@pytest.mark.parametrize("alpha", [1 / SHIFT, 1.0])
def test_the_distance_from_the_target_is_not_overstated(alpha):
    truth, repetitions = (SHIFT - 1 / alpha) ** 2 / 2, 60
    gaps = [document(seed, alpha=alpha)["methods"]["hypernetwork"]["gap"] for seed in range(repetitions)]
    assert sum(gap["lower"] > truth for gap in gaps) <= binom.isf(FALSE_ALARM, repetitions, 0.05)
    told = [gap for gap in gaps if gap["estimate"] is not None]  # where few samples are effective, only the bound is
    assert len(told) > 20
    estimates = torch.tensor([gap["estimate"] for gap in told], dtype=torch.float64)
    assert float(estimates.mean()) == pytest.approx(truth, abs=0.15)
    # KL and rewards are of other noises: their errors add, the one of a spread SHIFT, the other of 1 / alpha. Steered
    # and base rewards are of the same, so that their errors cancel in part, and the error bar is too large.
    spread = float(estimates.std())
    assert 0.4 < spread / (sum(gap["stderr"] for gap in told) / len(told)) < 2.5


def test_no_more_outputs_are_made_than_the_validation_made():
    evaluator = Shifted(0)
    found = reward_per_nat(evaluator, evaluator.validation(), evaluator.measurement())
    assert found["extra_outputs"] == evaluator.made <= 96
    assert len(evaluator.images) == evaluator.made + 2 * 96  # no image is made twice: its randomness would be the same
    assert found["base_samples"] > found["extra_outputs"]  # those of the validation count as well


@pytest.mark.parametrize(
    ("arguments", "prompts", "base", "steered"),
    [
        ((158, 8, 2, 0.6), 8, 20, 5),  # 6.5 exp(1.2) = 21.6 samples
        ((100, 8, 0, 0.0), 10, 8, 2),
        ((100, 3, 0, 0.0), 3, 8, 2),
        ((100, 1, 100, 0.3), 1, 0, 0),  # one prompt, whose validation is all
        ((100, 8, 2, 50.0), 2, 30, 8),  # nats that no sample carries: the most samples, and no overflow
        ((100, 8, 2, None), 2, 30, 8),
        ((16, 8, 2, 0.1), 2, 6, 2),
    ],
)
def test_sizes(arguments, prompts, base, steered):
    found = sizes(*arguments)
    budget, available = arguments[:2]
    assert found.prompts == min(prompts, available, budget // (base + steered) if base else available)
    assert (found.base, found.steered) == (base, steered)
    assert found.outputs <= budget


def test_too_small_a_budget_says_which_is_enough():
    with pytest.raises(InputError, match=r"train\.validate_samples = 20 or more") as stop:
        sizes(19, 8, 0, 0.1)
    assert "19 validation samples pay for no frontier" in str(stop.value)
    assert sizes(20, 8, 0, 0.1).prompts == 2


def test_where_there_is_no_frontier_a_sentence_says_so():
    constant, few = document(0, constant=True), document(0, samples=2)
    assert "constant" in constant["remark"]
    assert "pay for no frontier" in few["remark"]
    for found in (constant, few):
        assert found["methods"] == {}
        assert page.sentences(found) == [found["remark"]]


def test_nats_that_are_not_known_have_no_efficiency_and_no_gap():
    evaluator = Shifted(0)
    method = reward_per_nat(evaluator, evaluator.validation(), None)["methods"]["hypernetwork"]
    assert (method["nats"], method["efficiency"], method["gap"]) == (None, None, None)
    second = reward_per_nat(evaluator, evaluator.validation(), evaluator.measurement("second-order"))
    assert second["methods"]["hypernetwork"]["gap"] is None
    assert second["methods"]["hypernetwork"]["efficiency"] is not None


def test_injected_noise_has_the_nats_of_its_bound_and_no_gap():
    evaluator = Shifted(0, injection=0.5)
    method = reward_per_nat(evaluator, evaluator.validation(), evaluator.measurement())["methods"]["hypernetwork"]
    assert method["nats"] == pytest.approx(0.2)
    assert method["gap"] is None
    assert method["efficiency"] is not None


def test_a_run_ends_with_its_frontier(tmp_path, fake):
    run(fake_config(validate_samples=32, measure_samples=16), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    entries = [record["frontier"] for record in records(tmp_path / "run") if "frontier" in record]
    assert entries == [report["frontier"]]
    method = report["frontier"]["methods"]["hypernetwork"]
    assert report["frontier"]["prompts"] == 2
    assert method["gain"] == report["validation"]["scores"]["reward"]["gain"]
    assert method["nats"] == report["measurement"]["kl"]
    assert method["gap"]["alpha"] == 1.0
    html = (tmp_path / "run" / "report.html").read_text()
    assert "Reward per nat" in html
    words = report["verdict"]["sentence"]
    assert "--kl" in words
    assert re.sub("</?span[^>]*>", "", html).index(escape(words)) < html.index("6 steps, 0 batches skipped")  # it leads
    assert (tmp_path / "run" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert read_card(tmp_path / "run" / "adapter") == card_from(report["verdict"])
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "- The hypernetwork gains" in card
    assert "95 %" in card


def test_direct_fine_tuning_has_a_gain_and_no_nats(tmp_path, fake):
    run(fake_config(objective="direct", validate_samples=32), tmp_path / "run")
    method = json.loads((tmp_path / "run" / "report.json").read_text())["frontier"]["methods"]["fine-tuned generator"]
    assert (method["nats"], method["efficiency"], method["gap"]) == (None, None, None)


def test_the_kl_is_of_prompts_from_all_over_their_order():
    """Prompt sets stand in the order of their kinds: of the first few alone the nats would be another kind's."""
    texts = [f"kind {k // 10}, {k}" for k in range(60)]
    settings = SimpleNamespace(measure_samples=24)
    rows = Evaluator.measured_prompts.fget(SimpleNamespace(settings=settings, prompts=texts))
    assert len(rows) == 24
    assert {text.split(",")[0] for text in rows} == {f"kind {k}" for k in range(6)}
    assert {rows.count(text) for text in rows} == {4}
