"""What the commands print: tables that fit 80 columns, progress on stderr, one JSON document on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hnkit.internal.values import CONTROL, printable
from hnkit.output.page import CARD_MARKS, FIGURE, Card, Mark, format_number
from hnkit.output.page import Table as Cells
from hnkit.output.verdict import card_from


class PlainConsole(Console):
    """A console on which data cannot move the cursor, change colours or the title: control characters are spelt out."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is printed, piece by piece; rich's own control codes are pieces of their own and pass."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def console(*, stderr: bool = False) -> Console:
    """A console that never wraps wider than the terminal and shows no markup or control characters found in data."""
    return PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of `--json`, on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")
    sys.stdout.flush()


class Steps:
    """Progress over named steps: a bar on a terminal, a plain line per step elsewhere, always on stderr."""

    def __init__(self, total: int, progress: Progress | None, *, lines: bool = True) -> None:
        self._progress, self._lines = progress, lines
        self._done = 0
        self._total = total
        self._task = progress.add_task("", total=total) if progress else None

    def start(self, name: str) -> None:
        """Say that the step `name` begins; the one before it is done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=name, completed=self._done)
        elif self._lines:
            print(f"[{self._done + 1}/{self._total}] {printable(name)}", file=sys.stderr, flush=True)
        self._done += 1


@contextmanager
def steps(total: int, *, lines: bool = True) -> Iterator[Steps]:
    """Show progress over `total` steps while inside; of thousands, give `lines=False`: a bar, or nothing at all."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield Steps(total, None, lines=lines)
        return
    columns = (TextColumn("{task.description:<24}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        yield Steps(total, progress)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal that `what` goes on while inside; nothing elsewhere, nor beside another live display."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield
        return
    status = screen.status(Text(f"{what} ..."))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(LiveError):
            stack.enter_context(status)
        yield


@dataclass(frozen=True)
class Words:
    """Text that is broken into lines between its words and never inside a figure, `1.23 ± 0.04 nats` or `a = 1`."""

    text: str
    style: str = ""

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Text]:
        held = FIGURE.sub(lambda found: found[0].replace(" ", _HELD), self.text)
        lines = textwrap.wrap(held, options.max_width, break_on_hyphens=False)
        yield Text("\n".join(lines).replace(_HELD, " "), style=self.style)


_HELD = "\N{NO-BREAK SPACE}"
_MARK_STYLES: dict[Mark, str] = {"good": "green", "bad": "bold red", "open": "yellow", "": ""}


def print_table(table: Cells) -> None:
    """A page's table on stdout, its caption below."""
    rows = [[cell if isinstance(cell, str) else format_number(cell) for cell in row] for row in table.rows]
    screen = console()
    screen.print(simple_table(table.headers, rows))
    if table.caption:
        screen.print(Words(table.caption, "dim"))


def print_card_of(document: Mapping[str, Any]) -> None:
    """The card of a report, where the version that wrote it had one."""
    card = card_from(document.get("verdict"))
    if card is not None:
        print_card(card)


def print_card(card: Card) -> None:
    """The card on stdout, after an empty line."""
    console().print("", card_view(card), sep="\n")


def card_view(card: Card) -> RenderableType:
    """The card of a run, which a command prints last of all: a line each, and the sentence."""
    table = Table.grid()
    for width in (card.label_width, 2):
        table.add_column(width=width, overflow="fold")
    table.add_column()
    for line in card.lines:
        mark = Text(CARD_MARKS[line.mark], style=_MARK_STYLES[line.mark])
        table.add_row(Text(line.label, style="dim"), mark, Words(line.value))
    return Group(table, Words(card.sentence, "bold"))


def simple_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> RenderableType:
    """A light table: the first `left` columns left-aligned, the others right-aligned."""
    return _Rows(headers, rows, left)


_NARROWEST = 8
"""Characters of a column of names, which are broken; figures are not."""


@dataclass(frozen=True)
class _Rows:
    """A table, or a list where the screen is too narrow for its figures, of which none is cut."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        longest = [max(map(len, column)) for column in zip(self.headers, *self.rows, strict=True)]
        least = [min(width, _NARROWEST) if index < self.left else width for index, width in enumerate(longest)]
        if sum(least) + 2 * len(least) <= options.max_width:  # a column is two characters apart from the next
            yield self._table()
            return
        for row in self.rows:
            yield Words(" ".join(cell for cell in row[: self.left] if cell), "bold")
            for header, cell in list(zip(self.headers, row, strict=True))[self.left :]:
                if cell:
                    yield Words(f"  {header}  {cell}")

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for index, header in enumerate(self.headers):
            figures = index >= self.left
            table.add_column(header, justify="right" if figures else "left", no_wrap=figures, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table
