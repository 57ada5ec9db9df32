"""What a run says of itself: the L2 term is never called KL, and an error bar of 0 is not an unknown one."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

import hnkit.training.session
from hnkit.config import RunConfig, TrainConfig, resolve_config
from hnkit.training.plots import training_plots
from hnkit.training.report import _sections
from hnkit.training.run import train
from hnkit.training.view import TrainView, loss_term
from tests.hnkit.fake_backend import FakeFactory

TERMS = {
    ("objective='hypernoise'", "kl='l2'"): ("l2", "L2 term"),
    ("objective='hypernoise'", "kl='second-order'"): ("kl", "KL (second-order)"),
    ("objective='direct'", "kl='l2'"): None,
}


@pytest.mark.parametrize(("overrides", "term"), TERMS.items())
def test_steps_name_the_term_for_what_it_is(overrides, term, tmp_path, monkeypatch):
    lines = io.StringIO()
    steps = ("steps=2", "batch=4", "measure_samples=8", "validate_samples=2", "measure_every=1")
    if term is None:
        factory = FakeFactory()
        monkeypatch.setattr(hnkit.training.session, "backend_factory", lambda name: factory)
        train_config = TrainConfig(steps=2, batch=4, validate_samples=2, objective="direct", measure_samples=8)
        config = RunConfig("fake", factory.options(), train_config)
    else:
        chosen = [f"train.{override}" for override in (*steps, *overrides)]
        config = resolve_config(backend="toy", preset="item-e", overrides=chosen)
    assert loss_term(config.train) == term
    train(config, out=tmp_path / "run", console=Console(file=lines, width=200))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    taken = [record for record in records if "loss" in record]
    steps_said = [line for line in lines.getvalue().splitlines() if line.startswith("step 1/2")]
    assert len(taken) == 2
    assert len(steps_said) == 1
    for key in ("l2", "kl"):
        assert all((key in record) == (term is not None and term[0] == key) for record in taken)
    assert ("L2 term" in steps_said[0]) == (term == ("l2", "L2 term"))
    assert ("kl" in steps_said[0].lower()) == (term is not None and term[0] == "kl")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert ("no divergence term" if term is None else f"loss with the {term[1]}") in card


@pytest.mark.parametrize("key", ["l2", "kl"])
def test_runs_of_earlier_versions_are_drawn(key):
    """They have every term under "kl"; the caption names it by the configuration."""
    config = resolve_config(backend="toy", preset="item-e", overrides=["train.kl='l2'"])
    steps = [{"step": k, "loss": 1.0, key: 0.25 * k, "reward": 2.0} for k in (1, 2)]
    (plot,) = training_plots(steps, None, config.train)
    assert plot.caption.startswith("Loss, L2 term and reward")
    figure = plot.draw()
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == [
        "Loss, nats", "L2 term, nats", "Reward",
    ]  # fmt: skip
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.25, 0.5]


def test_measured_lines_have_an_error_bar_on_every_figure():
    lines = io.StringIO()
    figures = {"kl": 1.5, "kl_stderr": 0.25, "bias_bound": None, "l2": 1.0, "l2_stderr": None, "gap": None}
    TrainView(Console(file=lines, width=200), quiet=False).measured({"step": 3, "measurement": figures})
    assert lines.getvalue() == "step 3: KL 1.50 ± 0.25 nats, L2 term 1 ± unknown\n"


def test_messages_are_broken_between_words_on_a_terminal_and_not_at_all_elsewhere():
    score = {
        "base": 11.33,
        "steered": 11.58,
        "gain": 0.25,
        "gain_stderr": 0.12,
        "non_finite": {"base": 0, "steered": 0},
    }
    entry = {"step": 500, "validation": {"scores": {f"reward {k}": score for k in range(6)}, "held_out": True}}
    printed = []
    for terminal in (False, True):
        lines = io.StringIO()
        view = TrainView(Console(file=lines, width=80, force_terminal=terminal, color_system=None), quiet=False)
        view.measured(entry)
        view.say("go on with hnkit train --resume " + "a/" * 60, whole=True)
        printed.append(lines.getvalue().splitlines())
    assert [len(lines) for lines in printed] == [2, 5]
    *wrapped, last = printed[1]
    assert [" ".join(wrapped), last] == printed[0]
    assert max(map(len, wrapped)) <= 80
    assert sum(line.count("0.25 ± 0.12") for line in wrapped) == 6


@pytest.mark.parametrize(("stderr", "shown"), [(0.0, "exactly 0.5"), (None, "0.5 ± unknown"), (0.1, "0.50 ± 0.10")])
def test_a_standard_error_of_zero_is_known(stderr, shown):
    score = {"role": "trained", "base": 1.0, "steered": 1.5, "gain": 0.5, "gain_stderr": stderr}
    score["non_finite"] = {"base": 0, "steered": 0}
    report = {"measurement": None, "closed_form": None, "validation": {"scores": {"r": score}}, "config": {}}
    sections = _sections({**report, "versions": {}}, [], None, "")
    assert sections[0].blocks[0].rows[0][-1] == shown
