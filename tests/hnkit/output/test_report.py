"""Pages that are self-contained and escape everything; numbers as people read them; the run folder; the plots."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
import torch

from hnkit import InputError
from hnkit.checks.check import Check
from hnkit.checks.quantities import Quantity
from hnkit.checks.report import Report
from hnkit.checks.view import report_view
from hnkit.generate import GenerateSettings, contact_sheet, generate_pairs, image_png, require_images
from hnkit.internal import files as _files
from hnkit.maps import Condition
from hnkit.output import plots
from hnkit.output.images import grid_png
from hnkit.output.layouts import check_layout
from hnkit.output.page import (
    Code,
    Picture,
    Section,
    Table,
    Text,
    format_estimate,
    format_number,
    render_html,
    write_html,
)
from hnkit.output.terminal import console
from hnkit.verify import verify_bound

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
NASTY = "<script>alert('1')</script> & \"quoted\" ' </td></style>"


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self.open, self.images = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name in ("src", "href"):
                assert value.startswith(("data:image/png;base64,", "#")), value

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def nasty_page():
    table = Table((NASTY, "n"), ((NASTY, 1.5), ("holds", None)), NASTY, {0: NASTY})
    blocks = (Text(NASTY), table, Picture(PNG, NASTY), Code(NASTY, NASTY), Code(NASTY))
    return render_html(NASTY, [Section(NASTY, blocks), Section("other", ())], lead=NASTY)


def test_page_escapes_everything_and_fetches_nothing():
    page = nasty_page()
    reader = Reader(page)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert "<script" not in page
    assert reader.images[0]["alt"] == NASTY
    assert "".join(reader.words).count(NASTY) >= 9
    assert not re.search(r"https?://", page)
    assert "prefers-color-scheme: dark" in page


def test_picture_is_inlined_whole():
    source = Reader(render_html("t", [Section("s", (Picture(PNG, "c"),))])).images[0]["src"]
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PNG


def test_write_html_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_html(path, "one", [])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_html(path, "two", [])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="3 columns"):
        Table(("a", "b", "c"), (("1", "2"),))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (-0.0, "0"), (3.0, "3"), (math.nan, "–"), (None, "–"), (math.inf, "∞"), (-math.inf, "-∞"),
        (0.123456, "0.1235"), (-12345.678, "-1.235e4"), (1e-9, "1e-9"), (123456.0, "123456"), (1e20, "1e20"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1.23456, 0.0123), "1.235 ± 0.012"),
        ((1.23456, 0.99), "1.23 ± 0.99"),
        ((0.1146, 0.000123), "0.11460 ± 0.00012"),
        ((1234.5, 203.2), "1234 ± 203"),
        ((1.5e-7, 2e-9), "1.5e-7 ± 2e-9"),
        ((2.0, math.nan), "2 ± unknown"),
        ((2.0, None), "2"),
        ((1.29306, 4e-18), "exactly 1.29306"),
        ((0.0, 0.0), "0"),
        ((0.5, 0.01, 0.003), "0.500 ± 0.010 (+ 0.003 bias)"),
        ((math.nan, math.nan), "–"),
        ((math.nan, 0.1), "–"),
        ((math.inf, None), "∞"),
    ],
)
def test_estimates(arguments, text):
    assert format_estimate(*arguments) == text


def a_check(**changes):
    values = {
        "name": "n", "statement": NASTY, "proof": "theorem_7_bound", "group": NASTY, "measured": 1.0,
        "expected": math.nan, "tolerance": math.inf, "kind": "exact", "slack": 1.0, "verdict": "holds",
    }  # fmt: skip
    return Check(**{**values, **changes})


def test_report_json_has_no_nan():
    figure = Quantity("q", math.nan, "g", math.nan)
    report = Report("t", {"path": _files.Path("x"), "n": (1, 2)}, (a_check(),), (figure,))
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["checks"][0]["expected"] is None
    assert document["checks"][0]["tolerance"] == "inf"
    assert document["figures"][0]["value"] is None
    assert document["config"] == {"path": "x", "n": [1, 2]}
    assert document["counts"] == {"holds": 1, "fails": 0, "not applicable": 0, "not certified": 0}


def test_prompts_stand_in_one_table():
    """Page and terminal give a prompt a row, not a section of its own, and only the figures that are compared."""
    prompts = ("a red three", "two")
    figures = [Quantity("KL (Stein form)", 0.5, "net", 0.1)]
    for number, prompt in enumerate(prompts):
        figures += [
            Quantity("KL (Stein form)", 0.25 + number, f"net: {prompt}", 0.125),
            Quantity("mean shift's share", 0.5, f"net: {prompt}"),
        ]
    report = Report("t", {}, (a_check(group="net"),), tuple(figures))
    assert report.by_prompt == (
        ("prompt (nats)", "KL"), (("a red three", "0.25 ± 0.12"), ("two", "1.25 ± 0.12"))
    )  # fmt: skip
    assert [section.title for section in report.sections({})] == ["net", "Prompt by prompt", "How to read this"]
    out = io.StringIO()
    screen = console()
    screen.file, screen.width = out, 80
    screen.print(report_view(report, verbose=False))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert ["a", "red", "three", "0.25", "±", "0.12"] in rows
    assert out.getvalue().count("KL (Stein form)") == 1
    assert Report("t", {}, (a_check(group="net"),), tuple(figures[:1])).by_prompt is None


def test_only_fails_is_not_ok():
    others = [a_check(verdict=verdict) for verdict in ("holds", "not applicable", "not certified")]
    assert Report("t", {}, tuple(others)).ok
    assert not Report("t", {}, (*others, a_check(verdict="fails"))).ok


def test_run_folder(tmp_path):
    report = verify_bound(lambda x: 0.3 * torch.sin(x) + 0.1 * x.roll(1, -1), (3,), samples=32, name=NASTY)
    report.write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "report.json", "report.html", *(f"{plot.name}.png" for plot in report.plots)}
    page = (tmp_path / "report.html").read_text()
    reader = Reader(page)
    assert "script" not in reader.tags
    assert len(reader.images) == len(report.plots) == 3
    text = "".join(reader.words)
    for check in report.checks:
        assert check.statement in text
    for plot in report.plots:
        assert (tmp_path / f"{plot.name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "config.json").read_text())["shape"] == [3]


def drawn(draw):
    return plots.Plot("p", "c", draw).png()


def test_plots_draw_and_leave_no_trace():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    grid = np.linspace(0.1, 0.9, 9)
    pictures = [
        drawn(lambda: plots.error_against_lipschitz(grid, {"E": grid**2}, {"b": grid, "c": 2 * grid}, "t")),
        drawn(lambda: plots.exact_against_l2(grid, grid**2, "t", grid**3)),
        drawn(lambda: plots.exact_against_l2(np.ones(1), np.ones(1), "t")),
        drawn(lambda: plots.densities(grid, {"a": grid, "b": grid**2, "c": 100 * grid}, "t")),
        drawn(lambda: plots.kl_split(["a", "b"], {"x": [1, -1], "y": [2, 3]}, [3, 2], "t")),
    ]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert dict(mpl.rcParams) == before


def test_equal_plots_are_equal_files():
    grid = np.linspace(0.1, 0.9, 9)
    one, two = (drawn(lambda: plots.exact_against_l2(grid, grid**2, "t")) for _ in range(2))
    assert one == two


def test_steps_are_whole_numbers():
    """The first two measurements of a short run, at steps 20 and 40, once had ticks at 22.5."""
    figure, (axes,) = plots.new_figure()
    axes.plot([20, 40], [0.0, 1.0])
    plots.step_axis(axes)
    assert axes.get_xlabel() == "step"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    figure.canvas.draw()
    assert all("." not in label.get_text() for label in axes.get_xticklabels())


def test_split_bars_end_at_the_total():
    figure = plots.kl_split(["a"], {"x": [1.0], "y": [-0.4], "z": [0.7]}, [1.3], "t")
    bars = [patch for container in figure.axes[0].containers for patch in container]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(1.3)
    right = max(bar.get_x() + max(bar.get_width(), 0) for bar in bars)
    assert right == pytest.approx(1.7)  # positive parts are stacked to the right, negative ones to the left


def test_image_png_rounds_to_8_bits():
    import io

    from matplotlib.image import imread

    image = torch.rand(3, 5, 4)
    back = imread(io.BytesIO(image_png(image)))[..., :3]
    assert np.abs(back - image.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_contact_sheet_takes_any_prompt():
    pair = {"base": [torch.rand(3, 4, 4)] * 2, "steered": [torch.rand(3, 4, 4)]}
    assert contact_sheet({"cost $5 and $6_{x": pair, "b" * 300: pair}).startswith(b"\x89PNG")


def test_generate_settings():
    with pytest.raises(ValueError, match="--count 0"):
        GenerateSettings(count=0)


class Painter:
    """A backend whose images are its noise, and whose delta is 0.1."""

    name = "painter"
    noise_shape = (3, 4, 4)

    def __init__(self):
        self.hypernetwork = torch.nn.Identity()
        self.hypernetwork.forward = lambda noise, condition: torch.full_like(noise, 0.1)

    def encode(self, prompts):
        return Condition(tuple(prompts))

    def generate(self, noise, condition, steps=1):
        return noise.sigmoid()


def test_generated_folders(tmp_path):
    """Names and pairing; what scorers read of the layouts is in `tests/interop`."""
    prompts = ["a red bench", "two cups"]
    records = {prompt: {"item_id": str(number)} for number, prompt in enumerate(prompts)}
    settings = GenerateSettings(count=4, batch=3, layout="dpg-bench")
    generate_pairs(Painter(), prompts, settings, tmp_path, records=records)
    one, two = ((tmp_path / f"prompt-00{k}" / "base-01.png").read_bytes() for k in (0, 1))
    assert one == two  # image k of every prompt starts from the same noise
    assert (tmp_path / "prompt-000" / "steered-01.png").read_bytes() != one
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 16
    for kind in ("base", "steered"):
        assert sorted(path.name for path in (tmp_path / f"dpg-bench-{kind}").iterdir()) == ["0.png", "1.png"]


def test_layouts_refuse_what_they_cannot_hold(tmp_path):
    for name, prompts, count in (
        ("nonesuch", [], 4), ("dpg-bench", ["a"], 3), ("t2i-compbench", ["a"], 4), ("t2i-compbench", ["a/b"], 10),
        ("t2i-compbench", ["a_b"], 10), ("t2i-compbench", ["é" * 101], 10), ("geneval", ["a"], 4),
    ):  # fmt: skip
        with pytest.raises(InputError, match="--layout"):
            check_layout(name, prompts, count)
    with pytest.raises(InputError, match="--layout geneval"):
        generate_pairs(Painter(), ["a"], GenerateSettings(layout="geneval"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_png_has_three_channels(tmp_path):
    import io

    from PIL import Image

    generate_pairs(Painter(), ["a"], GenerateSettings(count=2), tmp_path)
    written = [path.read_bytes() for path in tmp_path.rglob("*.png")]
    pair = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert len(written) == 5
    for content in (*written, grid_png(*pair), plots.kl_split(["a"], {"x": [1.0]}, [1.3], "t")):
        with Image.open(io.BytesIO(content if isinstance(content, bytes) else plots.to_png(content))) as picture:
            assert (picture.mode, picture.format) == ("RGB", "PNG")


def test_grids_round_and_keep_their_order():
    import io

    from PIL import Image

    base, steered = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5, 4)
    grid = np.asarray(Image.open(io.BytesIO(grid_png(base, steered)))) / 255
    assert grid.shape == (2 * 7, 2 * 6, 3)
    for row, images in enumerate((base, steered)):
        for column, image in enumerate(images):
            cell = grid[row * 7 + 1 : row * 7 + 6, column * 6 + 1 : column * 6 + 5]
            assert np.abs(cell - image.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_outputs_that_are_no_images_are_refused():
    painter = Painter()
    painter.generate = lambda noise, condition, steps=1: noise[:, 0, 0]
    with pytest.raises(InputError, match="not images"):
        require_images(painter, ["a"], GenerateSettings())
