"""A table of rewards: what is read, what is refused, and what comes out."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from hnkit.errors import InputError
from hnkit.frontier import Frontier, frontier_document, gap_lower_bound, methods_on_frontier, page, read_rewards
from hnkit.internal.stats import rounded_down
from hnkit.output.plots import frontier, style


def write(path, rows, header="prompt,method,reward", encoding="utf-8"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding=encoding)
    return path


def table_rows(samples=60):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt in ('a "red" dog', "two, cats", "ü"):
        quoted = '"' + prompt.replace('"', '""') + '"'
        draws = torch.randn(samples, generator=generator).tolist()
        rows += [f"{quoted},base,{r}," for r in draws]
        rows += [f"{quoted},ours,{r + 0.4},0.2" for r in draws[:10]]
        rows += [f"{quoted},best-of-2,{max(a, b)}," for a, b in zip(draws[::2], draws[1::2], strict=True)]
    return rows


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_read_and_measured(tmp_path, encoding):
    file = write(tmp_path / "rewards.csv", table_rows(), "prompt,method,reward,nats", encoding)
    table = read_rewards(str(file))
    assert list(table["base"].rewards) == ['a "red" dog', "two, cats", "ü"]
    frontier, methods = methods_on_frontier(table)
    ours = methods["ours"]
    assert ours.nats == pytest.approx(0.2)
    assert ours.efficiency == pytest.approx(ours.gain / frontier.point(0.2).gain)
    best = methods["best-of-2"]
    assert best.nats == pytest.approx(math.log(2) - 0.5)
    assert best.gain == pytest.approx(frontier.best_of(2).gain, abs=0.15)
    document = json.loads(json.dumps(frontier_document(frontier, methods), allow_nan=False))
    assert {"nats", "gain", "stderr"} <= set(document["frontier"][0])
    assert document["frontier"][0]["nats"] == 0.01
    assert {"n", "nats", "gain", "stderr"} <= set(document["best_of"][0])
    assert {"gain", "stderr", "nats_lower_bound", "efficiency"} <= set(document["methods"]["ours"])


def test_without_nats_there_is_no_efficiency(tmp_path):
    rows = [
        f"p{k},{m},{(k * 7 + j * 3) % 11 + shift}"
        for k in range(3)
        for m, shift in (("base", 0), ("x", 1))
        for j in range(9)
    ]
    _, methods = methods_on_frontier(read_rewards(write(tmp_path / "r.csv", rows)))
    assert methods["x"].efficiency is None
    assert methods["x"].nats is None
    assert methods["x"].gain == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a,base,1"], "prompt,method", "no column reward"),
        (["a,base,1", "a,base,many"], "prompt,method,reward", "line 3: reward 'many' is no finite number"),
        (["a,base,nan"], "prompt,method,reward", "no finite number"),
        (["a,base,\u0661\u0662"], "prompt,method,reward", "no finite number"),
        (["a,base,1_0"], "prompt,method,reward", "no finite number"),
        (["a,base,0x10"], "prompt,method,reward", "no finite number"),
        (["a,base," + "1" * 5000], "prompt,method,reward", r"^.{1,280}$"),
        (["a,base,1,", "a,m,2,-3"], "prompt,method,reward,nats", "has -3 nats on average; a KL is not negative"),
        (["a,base"], "prompt,method,reward", "reward None is no finite number"),
        (["a,,1"], "prompt,method,reward", "no method"),
        (["a,base,1,inf"], "prompt,method,reward,nats", "nats 'inf'"),
        (
            ["a,best-of-" + "9" * 5000 + ",1"],
            "prompt,method,reward",
            "line 2: a method of 5008 characters",
        ),
        (
            ["0.5,base,a dog, running"],
            "reward,method,prompt",
            "line 2: more fields than the header has; quote",
        ),
    ],
)
def test_bad_tables(tmp_path, rows, header, message):
    with pytest.raises(InputError, match=message):
        read_rewards(write(tmp_path / "r.csv", rows, header))


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_rewards(tmp_path / "absent.csv")
    (tmp_path / "latin.csv").write_bytes("prompt,method,reward\nä,base,1\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read_rewards(tmp_path / "latin.csv")


def test_methods_and_prompts_have_to_match(tmp_path):
    rows = [f"p{k},{m},{j}" for k in range(2) for m in ("plain", "x") for j in range(9)]
    table = read_rewards(write(tmp_path / "r.csv", rows))
    with pytest.raises(InputError, match="'base', which is to be the base: there are plain, x"):
        methods_on_frontier(table)
    assert isinstance(methods_on_frontier(table, base="plain")[0], Frontier)
    table = read_rewards(write(tmp_path / "r.csv", [*rows, "p9,x,1"]))
    with pytest.raises(InputError, match="differ in prompts, 'p9'"):
        methods_on_frontier(table, base="plain")


def rows_of(scale=1.0, prompts=4, samples=40, method="base"):
    generator = torch.Generator().manual_seed(3)
    draws = scale * torch.randn(prompts, samples, generator=generator, dtype=torch.float64)
    return [f"p{k},{method},{value!r}" for k in range(prompts) for value in draws[k].tolist()]


@pytest.mark.parametrize("scale", [1e200, 1e-300])
def test_rewards_of_any_size_have_their_frontier(tmp_path, scale):
    """Their squares overflow or vanish; the curve is the plain one in their units, and it ends."""
    frontier, _ = methods_on_frontier(read_rewards(write(tmp_path / "r.csv", rows_of(scale))))
    plain, _ = methods_on_frontier(read_rewards(write(tmp_path / "p.csv", rows_of())))
    assert len(frontier.curve()) == len(plain.curve())
    for figure in ("gain", "stderr", "alpha", "alpha_stderr"):
        assert getattr(frontier.point(0.2), figure) / scale == pytest.approx(getattr(plain.point(0.2), figure))
    assert frontier.best_of(4).stderr / scale == pytest.approx(plain.best_of(4).stderr)
    json.dumps(frontier_document(frontier, {}), allow_nan=False)


def test_rewards_whose_differences_overflow_are_refused():
    with pytest.raises(InputError, match="divide them by something"):
        Frontier([1.7e308 * (-1.0) ** torch.arange(20, dtype=torch.float64)])


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="'reward' is the name of more than one column"):
        read_rewards(write(tmp_path / "r.csv", ["a,base,1,5"], "prompt,method,reward,reward"))


def test_nats_on_some_prompts_only_are_refused(tmp_path):
    rows = [*(f"{row}," for row in rows_of()), *(f"p{k},x,1,{'0.2' if k else ''}" for k in range(4))]
    with pytest.raises(InputError, match="'x' has nats on some prompts only, none on 'p0'"):
        read_rewards(write(tmp_path / "r.csv", rows, "prompt,method,reward,nats"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([f"a,base,{k}" for k in range(7)], "prompt 'a': 7 rewards of the base; give 8 or more a prompt"),
        ([f"{p},base,3" for p in "ab" for _ in range(20)], "constant: no law gains anything"),
        ([f"a,base,{1e15 + k % 3}" for k in range(20)], "differ by 0.8. beside 1e.15, which is their rounding"),
        ([*rows_of(), "p0,base,inf"], "reward 'inf' is no finite number"),
        ([*rows_of(), "p0,base,"], "reward '' is no finite number"),
        ([*rows_of(), "p0,base,1_000"], "reward '1_000' is no finite number"),
        (rows_of(1e-320), "has no inverse: multiply them by something"),
        (rows_of(method="plain"), "no method is called 'base', which is to be the base: there are plain"),
        ([*rows_of(), "p0,x,1", "p1,x,2"], "method 'x' and the base differ in prompts"),
    ],
)
def test_tables_without_a_frontier_are_one_line(tmp_path, rows, message):
    with pytest.raises(InputError, match=message) as stop:
        methods_on_frontier(read_rewards(write(tmp_path / "r.csv", rows)))
    assert "\n" not in str(stop.value)


def test_one_prompt_is_said_and_has_no_certificate(tmp_path):
    table = read_rewards(write(tmp_path / "r.csv", [*rows_of(prompts=1), "p0,x,1"]))
    document = frontier_document(*methods_on_frontier(table))
    assert page.sentences(document)[-1].startswith("One prompt only: gains have no error bar over prompts")
    assert document["methods"]["x"]["stderr"] is None
    _, rows = page.table(document)
    assert [row[2].endswith("± unknown") for row in rows] == [not row[0].startswith("frontier") for row in rows]


def test_at_a_hopeless_temperature_only_the_bound_is_said(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = list(torch.randn(30, 40, generator=generator, dtype=torch.float64))
    steered = [r[:4] for r in base]
    zeros = [torch.zeros(4, dtype=torch.float64)] * 30
    for alpha, told in ((1.5, True), (0.05, False)):
        gap = gap_lower_bound(zeros, steered, base, alpha)
        words = page.gap_sentence("ours", asdict(gap))
        assert (gap.estimate is not None) == told
        assert ("is the estimate" in words) == told
        shown = gap.lower > 0
        assert (f"at least {rounded_down(gap.lower, 3)} nats (95 %)" in words) == shown
        assert words.startswith("These images do not show (95 %) that ours is away from the law") != shown
        own = page.gap_sentence("hypernetwork", asdict(gap))
        assert own.startswith(
            "The hypernetwork is at least" if shown else "These images do not show (95 %) that the hyper"
        )
    assert gap.lower > 10
    assert "how far exactly cannot be told" in words


def test_digits_that_say_nothing_are_not_shown(tmp_path):
    """An efficiency of 7 +- 121 % is one that is not known."""
    table = read_rewards(write(tmp_path / "r.csv", [*rows_of(prompts=3), *(f"p{k},x,1" for k in range(3))]))
    document = frontier_document(*methods_on_frontier(table))
    method = document["methods"]["x"]
    for stderr, told in ((0.5, True), (1.21, False)):
        found = {**method, "nats": 0.2, "efficiency": 0.07, "efficiency_stderr": stderr}
        known = {**document, "methods": {"x": found}}
        words = [page.table(known)[1][0][-1], page.card(known).lines[0].value, page.sentences(known)[0]]
        assert [("7 ± 50 %" in text) for text in words] == [told] * 3
        assert [("not known to 100 %" in text) for text in words] == [not told] * 3


@pytest.mark.parametrize("offset", [1e6, 1e12])
def test_a_constant_beside_the_rewards_changes_nothing(tmp_path, offset):
    """Figures are of differences; of float64 at 1e12 these keep four digits."""
    far = [f"p{k},base,{offset + j * j}" for k in range(4) for j in range(9)]
    near = [f"p{k},base,{j * j}" for k in range(4) for j in range(9)]
    found = methods_on_frontier(read_rewards(write(tmp_path / "far.csv", far)))[0]
    plain = methods_on_frontier(read_rewards(write(tmp_path / "near.csv", near)))[0]
    assert found.point(0.1).gain == pytest.approx(plain.point(0.1).gain, rel=1e-4)
    assert found.point(0.1).stderr == pytest.approx(plain.point(0.1).stderr, rel=1e-2, abs=1e-4)


def test_nats_that_differ_within_a_prompt_have_an_error(tmp_path):
    """The oracle is the error of a mean over two prompts of means of 4 and 2 rows, by hand."""
    integrands = {"p0": [0.1, 0.3, 0.2, 0.6], "p1": [0.5, 0.1], "p2": [0.2], "p3": [0.4, 0.4]}
    rows = [f"{row}," for row in rows_of()]
    rows += [f"{prompt},x,1,{value}" for prompt, values in integrands.items() for value in values]
    found = read_rewards(write(tmp_path / "r.csv", rows, "prompt,method,reward,nats"))["x"]
    assert found.nats == pytest.approx((0.3 + 0.3 + 0.2 + 0.4) / 4)
    variance = (0.04 + 0 + 0.01 + 0.09) / 3 / 4 + 2 * 0.04 / 2
    assert found.nats_stderr == pytest.approx(math.sqrt(variance) / 4)
    frontier, methods = methods_on_frontier(read_rewards(write(tmp_path / "r.csv", rows, "prompt,method,reward,nats")))
    exact = frontier.efficiency_estimate(torch.ones(4) - torch.stack([r.mean() for r in frontier.base]), found.nats)
    assert methods["x"].efficiency_stderr > exact.stderr


@pytest.mark.parametrize(("name", "nats"), [
    ("best-of-1", 0.0), ("best-of-4", math.log(4) - 0.75), ("best-of-0", None), ("best-of-4th", None),
    ("best-of-\u0663", None), ("best-of-" + "9" * 40, 40 * math.log(10) - 1),
])  # fmt: skip
def test_nats_of_a_name(tmp_path, name, nats):
    found = read_rewards(write(tmp_path / "r.csv", [f"p,{name},1"]))[name]
    assert found.nats == (None if nats is None else pytest.approx(nats, abs=1e-12))
    assert found.nats_at_most == (nats is not None)


def test_the_efficiency_of_best_of_n_is_from_below(tmp_path):
    """With ties its KL is below the bound: of coins that show 1 with chance p, best of 2 is the coin of p(2 - p)."""
    rows = [f"p{k},base,{int(j < 6)}" for k in range(6) for j in range(20)]
    rows += [f"p{k},best-of-2,{int(j < 51)}" for k in range(6) for j in range(100)]
    document = frontier_document(*methods_on_frontier(read_rewards(write(tmp_path / "r.csv", rows))))
    method = document["methods"]["best-of-2"]
    p, q = 0.3, 0.51
    kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert kl < method["nats"]  # at its own KL a coin of a larger share is on the frontier: its efficiency is 1
    assert method["efficiency"] < 1
    assert "at most 0.194 nats, at least " in page.sentences(document)[0]


@pytest.mark.parametrize(
    ("nats", "words"), [(0.05, "alone show at least 0.2"), (0.3, "No law of the nats of ours"), (0.6, "")]
)
def test_nats_that_cannot_be_right_are_said(tmp_path, nats, words):
    """A shift of one standard deviation costs half a nat: less is refuted, by rewards alone or by the frontier."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in range(30):
        base, ours = torch.randn(2, 60, generator=generator, dtype=torch.float64)
        rows += [f"p{k},base,{r}," for r in base.tolist()] + [f"p{k},ours,{r + 1},{nats}" for r in ours.tolist()]
    table = read_rewards(write(tmp_path / "r.csv", rows, "prompt,method,reward,nats"))
    document = frontier_document(*methods_on_frontier(table))
    said = page.contradiction("ours", document["methods"]["ours"])
    assert words in said
    assert (said in page.sentences(document)) == bool(words)
    assert page.card(document).sentence.startswith("The nats of ours cannot be right") == bool(words)


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_stand(tmp_path):
    """What another program reads as a formula, an instruction or a label to leave out is a name here."""
    names = ["$x^$", r"$\\frac{$", "_hidden", "100%", "a\x1b[31m", "\u65e5\u672c", "<b>&"]
    rows = [*rows_of(), *(f"p{k},{name},{k}" for k in range(4) for name in names)]
    document = frontier_document(*methods_on_frontier(read_rewards(write(tmp_path / "r.csv", rows))))
    assert set(document["methods"]) == set(names)
    assert page.plot(document).startswith(b"\x89PNG")
    with style():
        figure = frontier(document, {name: name for name in names}, "title")
    drawn = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert r"\$x^\$ (nats: at least)" in drawn
    assert " _hidden (nats: at least)" in drawn
    assert "a\\x1b[31m (nats: at least)" in drawn
    assert len(drawn) == len(names) + 2
