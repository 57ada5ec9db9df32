"""The verdict card: every branch of its sentence is reached by figures that were measured, and each figure is said."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from hnkit.figures import measure
from hnkit.frontier import frontier_document, methods_on_frontier, no_frontier
from hnkit.frontier import page as frontier_page
from hnkit.frontier.table import Rewards
from hnkit.injection import NoiseInjection
from hnkit.internal.folders import VERDICT_FILE
from hnkit.internal.stats import Estimate
from hnkit.output.page import CARD_MARKS, Card, CardLine, Section, Text, render_html
from hnkit.output.terminal import Words, card_view, console, simple_table
from hnkit.output.verdict import (
    RunFigures,
    card_from,
    figures_of,
    fitting_temperature,
    l2_words,
    read_card,
    verdict_card,
    with_frontier,
)
from tests.hnkit.functions import Linear, noise, seeded


def measured(f, d=3, **options) -> RunFigures:
    """What a card rests on, by the way every command goes: from the JSON record of a measurement."""
    found = measure(f, noise(64, d), generator=seeded(), **options)
    return replace(figures_of(json.loads(json.dumps(found.to_json()))), dim=d)


def linear(slope: float, d: int = 3) -> torch.nn.Linear:
    layer = torch.nn.Linear(d, d, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(slope * torch.eye(d))
    return layer


NILPOTENT = Linear(torch.tensor([[0.0, 0.4, 0.2], [0.0, 0.0, 0.4], [0.0, 0.0, 0.0]], dtype=torch.float64))

REAL = {
    "certified": lambda: measured(linear(-0.4)),
    "l2 is right": lambda: measured(NILPOTENT),
    "contracting": lambda: measured(lambda x: 0.5 * x.tanh()),
    "expansive": lambda: measured(lambda x: 1.5 * x.tanh()),
    "folding": lambda: measured(lambda x: -2 * x.tanh()),
    "no norms": lambda: replace(figures("contracting"), local_norm=None),
    "zero": lambda: measured(lambda x: 0 * x),
    "injected": lambda: measured(lambda x: 0.5 * x.tanh(), injection=NoiseInjection(0.5)),
    "nothing": RunFigures,
    "tuned": lambda: RunFigures(tuned=True, gain=Estimate(1.0, 0.1)),
    "a check fails": lambda: replace(measured(linear(-0.4)), failing=2),
    "efficient": lambda: with_gain(beta=0.7, gain=0.7),
    "wasteful": lambda: with_gain(beta=0.7, gain=0.05),
    "cold": lambda: replace(with_gain(beta=0.7, gain=0.7), alpha=0.2),
    "hot": lambda: replace(with_gain(beta=0.7, gain=0.7), alpha=9.0),
    "exploited": lambda: replace(with_gain(beta=0.7, gain=0.7), judge=Estimate(-0.3, 0.1)),
    "not seen": lambda: replace(with_gain(beta=0.7, gain=0.7), judge=Estimate(0.1, 0.1)),
}
"""Figures that commands come to, each reaching a branch of the sentence."""

SAID = {
    "certified": ("proved injective, so that the price is the KL above", "train with --kl arnoldi"),
    "l2 is right": ("speaks against the price being the KL above", "keep --kl l2 in the loss"),
    "contracting": ("nothing seen speaks against", "--kl"),
    "expansive": ("Norms of 1 or more leave open", "raise alpha or inject noise"),
    "folding": ("The map folds, so that the price is the KL above or more", "for a proved KL"),
    "no norms": ("nothing proves that the price is no more", ""),
    "zero": ("f is 0, so that the images are the base's", "train it"),
    "injected": ("the injected noise bounds the KL", ""),
    "nothing": ("The KL was not measured", "hnkit verify-bound"),
    "tuned": ("the generator itself was fine-tuned", "hnkit compare"),
    "a check fails": ("2 checks fail", "--verbose"),
    "efficient": ("The gain is worth its nats", ""),
    "wasteful": ("Most of its nats buy nothing", "train longer before you raise the reward's weight"),
    "cold": ("The gain is worth", "train longer for alpha = 0.2, or aim at 1"),
    "hot": ("The gain is worth", "expect the nats of alpha = 1"),
    "exploited": ("The judge sees a loss", "lower the reward's weight"),
    "not seen": ("The judge sees no gain yet", ""),
}


def with_gain(beta: float, gain: float) -> RunFigures:
    """A Gaussian reward, whose frontier is `R(K) = sqrt(2 K)` and whose tilted law of beta spends `beta^2 / 2` nats."""
    base = {f"{n}": torch.randn(400, generator=seeded(n), dtype=torch.float64) for n in range(20)}
    steered = {name: rewards + gain for name, rewards in base.items()}
    frontier, methods = methods_on_frontier({"base": Rewards(base), "f": Rewards(steered, beta**2 / 2)})
    document = json.loads(json.dumps(frontier_document(frontier, methods)))
    return with_frontier(measured(linear(-0.4)), document["methods"]["f"], document["frontier"])


@cache
def figures(name: str) -> RunFigures:
    return REAL[name]()


@pytest.mark.parametrize("name", REAL)
def test_each_branch_of_the_sentence_is_reached_by_real_figures(name):
    words = verdict_card(figures(name)).sentence
    assert all(part.casefold() in words.casefold() for part in SAID[name]), words
    assert words[0].isupper() or words.startswith("f is 0") or words[0].isdigit()
    assert words.endswith(".")
    assert words.count(". ") == 0, "it is one sentence"


PLANTED = {
    "kl": Estimate(0.9, 0.01),
    "l2": Estimate(0.9, 0.01),
    "relative_error": Estimate(0.5, 0.01),
    "injective": "violated",
    "folds": (3, 64),
    "local_norm": 1.2,
    "lipschitz": 0.99,
    "bound": Estimate(0.9, 0.01),
    "gap": Estimate(0.9, 0.01),
    "gap_lower": (0.9, 0.95),
    "l2_gap": 0.9,
    "gain": Estimate(0.9, 0.01),
    "judge": Estimate(-0.9, 0.01),
    "efficiency": Estimate(0.01, 0.001),
    "efficiency_at_least": True,
    "beyond_frontier": True,
    "alpha": 0.01,
    "fitting_alpha": 99.0,
    "failing": 1,
    "tuned": True,
}


@pytest.mark.parametrize("key", PLANTED)
def test_a_wrong_figure_changes_the_words(key):
    """Beside figures of a real run, each planted one changes a line or the sentence."""
    real = replace(figures("cold"), injective="unknown")
    if key == "l2_gap":  # said where there is no distance of the map itself
        real = replace(real, gap=None, gap_lower=None)
    if key == "alpha":
        real = replace(real, fitting_alpha=1.0)
    if key == "beyond_frontier":  # said where there is no efficiency
        real = replace(real, efficiency=None, gain=Estimate(0.5, 0.1))
    assert verdict_card(replace(real, **{key: PLANTED[key]})) != verdict_card(real)


def test_every_figure_is_said():
    """Whatever is added to the record is added to the card; what guides advice is tried below."""
    fields = {field.name for field in dataclasses.fields(RunFigures)}
    assert fields - set(PLANTED) == {"l2_good", "advice", "trained_with", "dim"}


def test_what_guides_the_advice():
    open_case = RunFigures(kl=Estimate(1.0, 0.1), l2=Estimate(0.9, 0.1), relative_error=Estimate(-0.1, 0.05))
    advised = {name: verdict_card(replace(open_case, advice=name)).sentence for name in ("second-order", "exact")}
    assert "--kl second-order" in advised["second-order"]
    assert "--kl exact" in advised["exact"]
    assert "keep --kl l2" in verdict_card(replace(open_case, l2_good=True)).sentence
    far = replace(open_case, relative_error=Estimate(-0.5, 0.05), advice="l2")
    assert "--kl exact" in verdict_card(replace(far, dim=64)).sentence
    assert "--kl arnoldi" in verdict_card(replace(far, dim=4096)).sentence


def test_no_other_term_is_advised_than_the_better_one_it_was_trained_with():
    """A loss with a term as near to the KL as the advised one has nothing to gain by that."""
    off = RunFigures(kl=Estimate(1.0, 0.01), l2=Estimate(0.5, 0.01), relative_error=Estimate(-0.5, 0.01))
    record = {"text": "Use --kl arnoldi: the L2 term misses half.", "advice": "arnoldi", "samples": 16}
    look = "By a quick look at 16 samples: "  # beside the measured figure, from which it may differ
    for own, kept in (("l2", False), ("second-order", False), ("arnoldi", True), ("exact", True), (None, False)):
        words = verdict_card(replace(off, advice="arnoldi", trained_with=own)).sentence
        assert (f"keep --kl {own}" in words) == kept
        assert ("train with --kl arnoldi" in words) != kept
        advised = "" if kept else "use --kl arnoldi: "
        assert l2_words(record, own) == f"{look}{advised}the L2 term misses half."
    near = replace(off, relative_error=Estimate(-0.01, 0.001), advice="l2", trained_with="exact")
    assert "--kl l2 would do as well as --kl exact" in verdict_card(near).sentence
    good = {"text": "The L2 term is within 5 % of the KL.", "advice": "l2"}
    assert l2_words(good, "exact") == "By a quick look: the L2 term is within 5 % of the KL."


def test_a_figure_beyond_the_tolerance_is_not_called_good():
    """11.9 % off stands beside no "good enough" because other samples had shown less."""
    known = RunFigures(
        kl=Estimate(1.0, 0.1),
        l2=Estimate(0.881, 0.1),
        relative_error=Estimate(-0.119, 0.014),
        l2_good=True,
        advice="l2",
    )
    assert known.l2_matters is None
    card = verdict_card(known)
    assert card.lines[1].value.endswith("may matter")
    assert "measure more samples" in card.sentence


def test_a_distance_of_nothing_is_not_said():
    known = RunFigures(kl=Estimate(1.0, 0.1), gap_lower=(0.0, 0.95), alpha=0.15)
    assert [line.label for line in verdict_card(known).lines] == ["KL"]
    assert "target" in [line.label for line in verdict_card(replace(known, gap_lower=(0.1, 0.95))).lines]


@pytest.mark.parametrize(
    ("off", "stderr", "bias", "matters"),
    [(-0.05, 0.02, 0.0, False), (-0.05, 0.03, 0.0, None), (-0.2, 0.04, 0.0, True), (0.2, 0.04, 0.0, True),
     (-0.05, 0.02, 0.02, None), (-0.2, math.nan, 0.0, True)],
)  # fmt: skip
def test_two_standard_errors_and_the_bias_count_against_what_is_said(off, stderr, bias, matters):
    known = RunFigures(kl=Estimate(1.0, 0.1, bias), relative_error=Estimate(off, stderr))
    assert known.l2_matters is matters


def test_near_a_lower_bound_of_the_kl_is_no_praise():
    """Where the map folds the integrand bounds the KL from below: only what is below it is known to be off."""
    near = RunFigures(kl=Estimate(1.0, 0.1), l2=Estimate(1.0, 0.1), relative_error=Estimate(0.0, 0.01), l2_good=True)
    assert near.l2_matters is False
    assert replace(near, injective="violated").l2_matters is None
    assert "of that bound" not in verdict_card(near).lines[1].value
    assert "that bound" in verdict_card(replace(near, injective="violated")).lines[1].value
    above, below = (replace(near, injective="violated", relative_error=Estimate(off, 0.01)) for off in (0.5, -0.5))
    assert (above.l2_matters, below.l2_matters) == (None, True)


def test_the_temperature_of_a_gaussian_frontier_is_the_closed_form():
    """`alpha = 1 / sqrt(2 K)` for a standard normal reward."""
    for beta in (0.3, 0.7, 1.2):
        assert with_gain(beta, beta).fitting_alpha == pytest.approx(1 / beta, rel=0.05)
    assert fitting_temperature(1e9, [{"nats": 0.1, "beta": 1.0}, {"nats": 0.2, "beta": 1.5}]) is None


def table_document(**methods: tuple[float, float | None]) -> dict:
    """The document of a table of Gaussian rewards, whose methods gain so much for so many nats."""
    base = {f"{n}": torch.randn(400, generator=seeded(n), dtype=torch.float64) for n in range(20)}
    table = {"base": Rewards(base)}
    for name, (gain, nats) in methods.items():
        table[name] = Rewards({prompt: rewards + gain for prompt, rewards in base.items()}, nats)
    return json.loads(json.dumps(frontier_document(*methods_on_frontier(table))))


def test_a_table_of_rewards_has_a_card_of_its_methods():
    """The one that makes the most of its nats leads, with the temperature of them; unknown nats are said to be so."""
    card = frontier_page.card(table_document(bad=(0.05, 0.245), good=(0.7, 0.245), unknown=(0.5, None)))
    assert [line.label for line in card.lines] == ["good", "bad", "unknown"]
    assert "of what they buy" in card.lines[0].value
    assert "at least" in card.lines[2].value
    assert card.sentence.startswith("good makes the most of its nats: the gain is worth its nats")
    assert f"alpha = {1 / 0.7:.2g}" in card.sentence
    wasteful = frontier_page.card(table_document(bad=(0.05, 0.245))).sentence
    assert wasteful.startswith("bad gains ")
    assert "train longer" in wasteful
    assert "give its nats" in frontier_page.card(table_document(unknown=(0.5, None))).sentence
    assert "no method beside the base" in frontier_page.card(table_document()).sentence
    assert frontier_page.card(no_frontier("No frontier: constant.")).sentence == "No frontier: constant."
    many = frontier_page.card(table_document(**{f"m{n}": (0.1 * n, 0.2) for n in range(8)}))
    assert many.lines[-1].value == "and 3 more, in the table"


def printed(card: Card, width: int = 80) -> str:
    out = io.StringIO()
    screen = console()
    screen.file, screen.width = out, width
    screen.print(card_view(card))
    return out.getvalue()


@pytest.mark.parametrize("name", REAL)
def test_both_renderings_say_all_of_it(name):
    card = verdict_card(figures(name))
    flat = " ".join(printed(card).split())
    page = re.sub("</?span[^>]*>", "", html.unescape(render_html("t", [], card=card)))
    for line in card.lines:
        assert line.value in flat
        assert line.value in page
        assert line.note in page
        assert f"{line.label} " in flat + " "
    assert flat.endswith(card.sentence)
    assert page.index(card.sentence) > page.index("<h1>")


@pytest.mark.parametrize("name", REAL)
def test_the_card_fits_the_last_ten_lines(name):
    """With the line that names the report, and the line of checks that verify-bound adds."""
    lines = printed(verdict_card(figures(name))).splitlines()
    assert len(lines) <= 9 - (name in ("certified", "contracting", "expansive", "folding"))
    assert max(map(len, lines)) <= 80


def test_no_name_is_cut():
    card = Card((CardLine("prompt-optimisation", "gain 0.5"), CardLine("a" * 40, "gain 0.1")), "Good.")
    assert "prompt-optimisation" in printed(card)
    assert printed(card).count("a") >= 40
    assert "prompt-optimisation  " in str(card)


@pytest.mark.parametrize("width", [30, 44, 60, 80])
def test_no_figure_of_a_table_is_cut(width):
    """Too narrow for the columns, it becomes a list; it never loses a digit."""
    rows = [("+ prompt optimisation", "0.825 ± 0.013", "0.042 ± 0.016", ""), ("base", "0.783 ± 0.021", "–", "12.5 %")]
    out = io.StringIO()
    screen = console()
    screen.file, screen.width = out, width
    screen.print(simple_table(("method", "judge's mean", "gain", "efficiency"), rows))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for text in ("judge's mean", "0.825 ± 0.013", "0.042 ± 0.016", "0.783 ± 0.021", "12.5 %"):
        assert any(text in line for line in lines)
    assert ("–––" in out.getvalue().replace("─", "–")) == (width >= 60)


def test_no_figure_is_broken_across_lines():
    for width in range(30, 81):
        out = io.StringIO()
        screen = console()
        screen.file, screen.width = out, width
        screen.print(
            Words("aa bb " * 9 + "at least 12.5 ± 0.3 nats (95 %), -7 ± 2 % of alpha = 0.25, --kl second-order now")
        )
        for line in out.getvalue().splitlines():
            assert not line.rstrip().endswith(("±", "=", "at least", "--kl", "12.5", "-7"))
            assert not line.startswith(("±", "nats", "%", "0.25"))


def test_no_figure_is_broken_on_a_page():
    """Browsers break lines at spaces, after bars and after hyphens: what holds together is in one piece."""
    text = "about 1.267 ± 0.038 nats, 91 ± 2 % of |f|² where L = 0.5 & a < b: use --kl second-order or --resume"
    page = render_html("t", [Section("s", (Text(text),))], lead=text, card=Card((CardLine("l", text, text),), text))
    pieces = re.findall(r'<span class="whole">([^<]*)</span>', page)
    assert pieces[:6] == ["1.267 ± 0.038 nats", "91 ± 2 %", "|f|²", "L = 0.5", "--kl second-order", "--resume"]
    assert len(pieces) == 5 * 6
    assert ".whole { white-space: nowrap; }" in page
    shown = html.unescape(re.sub("</?span[^>]*>", "", page))
    assert shown.count(text) == 5


def test_an_efficiency_is_judged_by_two_standard_errors():
    """12 ± 18 % may well be a third."""
    known = {share: RunFigures(efficiency=Estimate(share, 0.1)) for share in (0.12, 0.15, 0.5, 0.55)}
    assert [found.efficient for found in known.values()] == [False, None, None, True]


def test_a_card_is_read_back_and_what_is_none_is_not(tmp_path):
    card = verdict_card(figures("folding"))
    (tmp_path / VERDICT_FILE).write_text(json.dumps(card.to_json()))
    assert read_card(tmp_path) == card
    assert read_card(tmp_path / "absent") is None
    line = {"label": "a", "value": "b", "note": "", "mark": ""}
    for broken in (
        None, 3, [], {}, {"lines": 3, "sentence": ""}, {"lines": [{}], "sentence": ""},
        {"lines": [line], "sentence": 3}, {"lines": [{**line, "mark": 'x" onload'}], "sentence": ""},
        {"lines": [{**line, "mark": []}], "sentence": ""}, {"lines": [line] * 99, "sentence": ""},
        {"lines": [line], "sentence": "a" * 10**5},
    ):  # fmt: skip
        assert card_from(broken) is None
    (tmp_path / VERDICT_FILE).write_text("{" * 10**5)
    assert read_card(tmp_path) is None


def test_a_card_of_somebody_else_is_escaped():
    nasty = "<script>alert(1)</script>\x1b[2J"
    card = Card((CardLine(nasty, nasty, nasty, "good"),), nasty)
    assert "<script>" not in render_html("t", [], card=card)
    assert "\x1b" not in printed(card)
    assert set(CARD_MARKS) == {"good", "bad", "open", ""}


def test_an_efficiency_that_few_prompts_of_tiny_nats_cannot_tell_has_no_digits():
    known = {"kl": Estimate(1e-9, 1e-11), "gain": Estimate(1e-5, 1.3e-4)}
    vague = str(verdict_card(RunFigures(**known, efficiency=Estimate(3414.3, 45663.8))))
    assert "efficiency not known to 100 %" in vague
    assert "3414" not in vague
    assert "90 ± 40 % of what these nats buy" in str(verdict_card(RunFigures(**known, efficiency=Estimate(0.9, 0.4))))


@pytest.mark.parametrize(("nats", "said"), [(0.9, "nats beyond the frontier"), (0.2, "efficiency not known")])
def test_a_card_says_why_an_efficiency_is_not_known(nats, said):
    """Beyond the curve more base outputs tell it; "not known" alone left a reader without a way on."""
    method = {"nats": nats, "nats_stderr": 0.1, "gain": 0.4, "stderr": 0.1, "efficiency": None}
    points = [{"nats": 0.1, "beta": 1.0}, {"nats": 0.5, "beta": 2.0}]
    assert said in str(verdict_card(with_frontier(RunFigures(), method, points)))
    assert "efficiency not known" in str(verdict_card(with_frontier(RunFigures(), method)))


@pytest.mark.parametrize(
    ("injective", "words"),
    [("violated", "no, it folds: orientation reversed at 4 of 79 samples"),
     ("unknown", "not certified; orientation reversed at 4 of 79 samples")],
)  # fmt: skip
def test_samples_that_turn_over_are_called_the_same_whatever_follows(injective, words):
    """A command that sees orientation change in one map, and one that sees too few of each map to say so."""
    found = replace(figures("cold"), injective=injective, folds=(4, 79))
    assert words in [line.value for line in verdict_card(found).lines]
