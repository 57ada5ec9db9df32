"""Pages and tables: one self-contained HTML page and one plain table, shared by every command that reports.

A page is a `Card` with the answer and a list of `Section`s, each a list of blocks: `Text`, `Table`, `Picture`, `Code`.
Everything that is not a picture is escaped, pictures are inlined, nothing is fetched: the file can be mailed.
"""

from __future__ import annotations

import base64
import html
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hnkit.internal.files import atomic_write
from hnkit.internal.stats import rounded_to_error, rounded_up, short_exponents

Cell = str | int | float | None
"""What a table holds; numbers are shown with `format_number`, `None` and NaN as a dash."""


@dataclass(frozen=True)
class Text:
    """One paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Code:
    """Preformatted text, folded away under `summary` if one is given."""

    text: str
    summary: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG image with its caption, which is also its alternative text; `samples` are shown in full height."""

    png: bytes
    caption: str
    samples: bool = False


@dataclass(frozen=True)
class Table:
    """A table: column headers and rows of cells; cells that are verdicts are coloured.

    `caption` stands under it; `notes` maps a row number to a line of small text under that row.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    notes: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.headers)} columns: {row}")


Mark = Literal["good", "bad", "open", ""]
"""How a line of a card is marked: in favour, against, undecided, or not at all."""

CARD_MARKS: dict[Mark, str] = {"good": "✓", "bad": "✗", "open": "?", "": " "}


@dataclass(frozen=True)
class CardLine:
    """A line of a card: what it is about, what is known, what that means in general, and how it is marked."""

    label: str
    value: str
    note: str = ""
    mark: Mark = ""


@dataclass(frozen=True)
class Card:
    """The answer of a run in a few lines and one sentence; `hnkit.output.verdict` makes it."""

    lines: tuple[CardLine, ...]
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """The card as plain values."""
        return asdict(self)

    @property
    def label_width(self) -> int:
        """Characters that a terminal gives to the labels: names of methods may be long, and longer ones are broken."""
        return max(13, *(min(len(line.label) + 2, 28) for line in self.lines)) if self.lines else 13

    def __str__(self) -> str:
        width = self.label_width
        lines = [f"{line.label:<{width}}{CARD_MARKS[line.mark]} {line.value}" for line in self.lines]
        return "\n".join([*lines, *textwrap.wrap(self.sentence, 80, break_on_hyphens=False)])


Block = Text | Code | Picture | Table


@dataclass(frozen=True)
class Section:
    """A titled part of a page."""

    title: str
    blocks: tuple[Block, ...]


VERDICT_MARKS = {"holds": "✓", "fails": "✗", "not applicable": "–", "not certified": "≈"}
"""How each verdict is marked, on the terminal and on the page: never by colour alone."""

_STYLE = """
:root { color-scheme: light dark; --bg: #fcfcfb; --fg: #1c1e21; --dim: #5f6670; --line: #d9dce1; --card: #ffffff;
  --head: #f1f3f5; --good: #0b6e4f; --good-bg: #e0f3ec; --bad: #a4262c; --bad-bg: #fbe3e4; --mid: #7a5b00;
  --mid-bg: #fbf1d3; }
@media (prefers-color-scheme: dark) { :root { --bg: #15171a; --fg: #e6e8eb; --dim: #9aa3ad; --line: #343940;
  --card: #1d2024; --head: #23272c; --good: #7fd8b4; --good-bg: #17372c; --bad: #ff9c9f; --bad-bg: #451d20;
  --mid: #ecc95c; --mid-bg: #3a3117; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2.5rem 1.5rem 4rem; background: var(--bg); color: var(--fg);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Noto Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; }
nav { margin: 1rem 0 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
a { color: inherit; text-decoration-color: var(--dim); text-underline-offset: .2em; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; background: var(--head); white-space: nowrap; }
th, td { padding: .42rem .55rem; vertical-align: baseline; }
tbody tr.row td { border-top: 1px solid var(--line); }
tr.row td:not([class]) { min-width: 14rem; }
table.dense { font-size: .82rem; } table.dense th, table.dense td { padding-inline: .35rem; }
td.whole, .whole { white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.note td { padding-top: 0; color: var(--dim); font-size: .8rem; max-width: 0; }
tr.note div { position: sticky; left: .7rem; max-width: min(62rem, calc(100vw - 5rem)); }
.verdict { display: inline-block; padding: .05rem .5rem; border-radius: 999px; white-space: nowrap;
  font-size: .8rem; font-weight: 600; }
.holds { color: var(--good); background: var(--good-bg); } .fails { color: var(--bad); background: var(--bad-bg); }
.not-applicable { color: var(--dim); background: var(--head); } .not-certified { color: var(--mid);
  background: var(--mid-bg); }
.card { margin: 1.4rem 0 0; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  overflow: hidden; }
.card dl { display: grid; grid-template-columns: max-content 1fr; margin: 0; padding: .7rem 0; }
.card dt { padding: .3rem 1rem; color: var(--dim); white-space: nowrap; }
.card dd { margin: 0; padding: .3rem 1rem .3rem 0; font-variant-numeric: tabular-nums; }
.card small { display: block; color: var(--dim); font-size: .8rem; line-height: 1.4; }
.card .mark { display: inline-block; width: 1.2em; font-weight: 700; }
.card .good { color: var(--good); background: none; } .card .bad { color: var(--bad); background: none; }
.card .open { color: var(--mid); background: none; }
.card .answer { max-width: none; margin: 0; padding: .8rem 1rem; background: var(--head); font-weight: 600; }
@media (max-width: 44rem) { .card dl { grid-template-columns: 1fr; } .card dd { padding: 0 1rem .4rem; }
  .card dt { padding-bottom: 0; font-size: .8rem; } }
figure { margin: 1.2rem 0; padding: .9rem; background: #ffffff; border: 1px solid var(--line); border-radius: 8px; }
figure img { display: block; max-width: 100%; max-height: 34rem; height: auto; margin: 0 auto; }
figure.samples img { max-height: none; }
figcaption, .caption { color: var(--dim); font-size: .875rem; margin: .7rem 0 0; max-width: 46rem; }
figcaption { color: #4d545c; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .9rem 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px;
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: var(--dim); }
@media (max-width: 44rem) { table.wide { min-width: 42rem; } body { padding: 1.5rem .8rem 3rem; }
  figure { overflow-x: auto; padding: .5rem; } figure img { max-width: none; width: 30rem; }
  figure.samples img { width: max(100%, 34rem); } figcaption { position: sticky; left: 0; } }
@media print { body { max-width: none; padding: 0; } .scroll, figure { break-inside: avoid; } }
"""


def format_number(value: float | None, digits: int = 4) -> str:
    """A number for people: `digits` significant digits, a minus sign that lines up, a dash for unknown."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if float(value).is_integer() and abs(value) < 10**6:
        return f"{int(value)}"
    return short_exponents(f"{value:.{digits}g}")


def format_estimate(value: float, stderr: float | None = None, bias_bound: float | None = None) -> str:
    """`value +- stderr (+ bias bound)`: rounded to the second digit of its standard error, as errors are quoted.

    A standard error that is not known (nan) is said to be unknown, never shown as zero.
    """
    if stderr is None or not math.isfinite(value):
        text = format_number(value)
    elif math.isnan(stderr):
        text = f"{format_number(value)} ± unknown"
    elif stderr <= 1e-12 * abs(value):  # rounding: every sample has the same value
        text = f"exactly {format_number(value, 6)}" if value else "0"
    else:
        text = rounded_to_error(value, stderr)
    if bias_bound:
        text += f" (+ {rounded_up(bias_bound, 2)} bias)"
    return text


_WHOLE = 26
"""Text of up to so many characters is not broken into lines: names of checks and toys, counts, estimates."""


FIGURE = re.compile(
    r"--\w[\w-]*(?: [\w-]+)?"  # a flag with its value
    r"|\bexp\([^()]{1,40}\)"
    r"|\|[^|\s]+\|[²\w]*"  # a norm
    r"|(?:\b\w+ = |at least |at most |exactly )?-?\d[\w.]*(?: ± [\w.]+)?(?: (?:%|nats)(?!\w))?"  # with its unit
)
"""What is never broken into lines, on the terminal and on a page: `1.23 ± 0.04 nats`, `a = 1`, `--kl exact`, `|f|²`."""


def _words(text: str) -> str:
    """The HTML of a text, its figures in one piece each."""
    return FIGURE.sub(_in_one_piece, html.escape(text, quote=False))


def _in_one_piece(found: re.Match[str]) -> str:
    breaks = any(mark in found[0] for mark in " |-")
    return f'<span class="whole">{found[0]}</span>' if breaks else found[0]


def _is_whole(text: str) -> bool:
    """Whether a cell is not broken into lines: names of checks and toys, counts, one estimate."""
    return len(text) <= _WHOLE or (text.count(" ± ") == 1 and len(text) <= 2 * _WHOLE)


def _cell(value: Cell) -> tuple[str, str]:
    """The class and the HTML of a cell."""
    if isinstance(value, str):
        if value in VERDICT_MARKS:
            name = value.replace(" ", "-")
            return "whole", f'<span class="verdict {name}">{VERDICT_MARKS[value]} {html.escape(value)}</span>'
        return ("whole", html.escape(value)) if _is_whole(value) else ("", _words(value))
    return "number", html.escape(format_number(value))


def _table(table: Table) -> str:
    numeric = [
        bool(column) and all(cell is None or isinstance(cell, int | float) for cell in column)
        for column in (list(zip(*table.rows, strict=True)) or [()] * len(table.headers))
    ]
    head = "".join(
        f"<th{' class=number' if right else ''}>{html.escape(header)}</th>"
        for header, right in zip(table.headers, numeric, strict=True)
    )
    body = []
    for index, row in enumerate(table.rows):
        cells = "".join(f"<td{f' class={kind}' if kind else ''}>{content}</td>" for kind, content in map(_cell, row))
        body.append(f'<tr class="row">{cells}</tr>')
        if table.notes.get(index):
            note = _words(table.notes[index])
            body.append(f'<tr class="note"><td colspan="{len(table.headers)}"><div>{note}</div></td></tr>')
    caption = f'<p class="caption">{_words(table.caption)}</p>' if table.caption else ""
    columns = len(table.headers)
    wide = "" if columns <= 3 else " class=wide" if columns <= 9 else ' class="wide dense"'
    return (
        f'<div class="scroll"><table{wide}><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        f"{caption}"
    )


def _card(card: Card) -> str:
    rows = []
    for line in card.lines:
        mark = f'<span class="mark {line.mark}">{CARD_MARKS[line.mark]}</span>' if line.mark else ""
        note = f"<small>{_words(line.note)}</small>" if line.note else ""
        rows.append(f"<dt>{html.escape(line.label)}</dt><dd>{mark}{_words(line.value)}{note}</dd>")
    listed = f"<dl>{''.join(rows)}</dl>" if rows else ""
    return f'<div class="card">{listed}<p class="answer">{_words(card.sentence)}</p></div>'


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{_words(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Picture):
        caption = html.escape(block.caption, quote=True)
        data = base64.b64encode(block.png).decode()
        kind = " class=samples" if block.samples else ""
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure{kind}>{image}<figcaption>{_words(block.caption)}</figcaption></figure>"
    pre = f"<pre>{html.escape(block.text)}</pre>"
    return f"<details><summary>{html.escape(block.summary)}</summary>{pre}</details>" if block.summary else pre


def render_html(title: str, sections: Sequence[Section], *, lead: str = "", card: Card | None = None) -> str:
    """The page as one string: light and dark, no script, nothing fetched."""
    links = "".join(f'<a href="#s{number}">{html.escape(section.title)}</a>' for number, section in enumerate(sections))
    parts = "".join(
        f'<section id="s{number}"><h2>{html.escape(section.title)}</h2>{"".join(map(_block, section.blocks))}</section>'
        for number, section in enumerate(sections)
    )
    intro = f"<p>{_words(lead)}</p>" if lead else ""
    answer = "" if card is None else _card(card)
    nav = f"<nav>{links}</nav>" if len(sections) > 1 else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><header><h1>{html.escape(title)}</h1>{answer}{intro}{nav}</header>{parts}</body></html>\n"
    )


def write_html(
    path: Path, title: str, sections: Sequence[Section], *, lead: str = "", card: Card | None = None
) -> None:
    """Write a self-contained page atomically.

    Args:
        path: the file; its folder must exist.
        title: heading of the page and title of the document.
        sections: the parts, in order; a list of links to them stands at the top.
        lead: one paragraph under the heading.
        card: the answer of the run, above all else.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    atomic_write(path, render_html(title, sections, lead=lead, card=card))
