"""The look of every plot, and the plots of `verify-bound`: one style, colour-blind-safe, drawn without a display.

Colours are Okabe and Ito's (doi:10.1038/nmeth.1618); a series is also told apart by its line or marker.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hnkit.internal.values import printable, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
INK, GREY = "#1c1e21", "#8a9099"

_DPI = 160  # of the files

_STYLE = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": "#5f6670",
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "xtick.color": "#5f6670",
    "ytick.color": "#5f6670",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


@dataclass(frozen=True)
class Plot:
    """A plot that is drawn when it is written: file name (without `.png`), caption, and how to draw it."""

    name: str
    caption: str
    draw: Callable[[], Figure]

    def png(self) -> bytes:
        """Draw it in hnkit's style and return the PNG file's content."""
        with style():
            return to_png(self.draw())


@contextmanager
def style() -> Iterator[None]:
    """Hnkit's look for everything drawn inside, without touching the caller's settings or needing a display."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        yield


def new_figure(width: float = 7.6, height: float = 4.4, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of its own (no global state, no display) with a grid of axes, row by row; sizes in inches."""
    figure = new_canvas(width, height)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flatten())


def new_canvas(width: float, height: float) -> Figure:
    """An empty figure of its own, for axes at places of the caller's; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def step_axis(axes: Axes) -> None:
    """Name the axis of training steps, whose ticks are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file without alpha or time stamp, so that equal figures are equal files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    # as savefig, which draws twice: once for the layout, once for the file
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    figure.set_dpi(_DPI)
    with warnings.catch_warnings():  # prompts are written in every script, the font of plots knows a few
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, format="png")
    return buffer.getvalue()


Array = NDArray[np.float64]


def error_against_lipschitz(
    lipschitz: Array, curves: Mapping[str, Array], bounds: Mapping[str, Array], title: str, own: float | None = None
) -> Figure:
    """`|E(J)|` of families of maps (solid) under the bounds on it (dashed), against the Lipschitz constant L.

    Args:
        lipschitz: `(k,)` values of L in (0, 1).
        curves: name -> `(k,)` values of `|E(J)|`, nats.
        bounds: name -> `(k,)` values of the bound, nats.
        title: the finding, in a few words.
        own: the L of the map itself, which is marked; beyond the axis an arrow says so.
    """
    figure, (axes,) = new_figure()
    colours = (INK, BLUE, GREEN, PURPLE)
    lines: Sequence[Any] = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
    for (name, values), colour, line in zip(bounds.items(), colours, lines, strict=False):
        axes.plot(lipschitz, values, linestyle=line, color=colour, label=name)
    for (name, values), colour, marker in zip(curves.items(), (VERMILION, ORANGE, SKY), ("o", "s", "^"), strict=False):
        axes.plot(
            lipschitz, values, color=colour, marker=marker, markersize=4.5, markevery=max(1, len(lipschitz) // 10),
            label=name,
        )  # fmt: skip
    axes.set(xlabel="Lipschitz constant  L", ylabel="|E(J)|,  nats", yscale="log", title=title)
    axes.set_xlim(float(lipschitz[0]), float(lipschitz[-1]))
    if own is not None:
        _mark_own(axes, own, float(lipschitz[-1]))
    axes.legend(loc="lower right")
    return figure


def _mark_own(axes: Axes, own: float, end: float) -> None:
    """A line at the map's own L, or an arrow to where it is beyond the axis."""
    text = f"this map: L = {own:.3g}"
    place: dict[str, Any] = {"textcoords": "offset points", "color": INK, "fontsize": 9.5}
    top = axes.transAxes
    if own < end:
        axes.axvline(own, color=INK, linewidth=1.1, linestyle=(0, (1, 1)))
        left = own < end / 2
        axes.annotate(
            text, (own, 0.98), xycoords=axes.get_xaxis_transform(), xytext=(5 if left else -5, 0),
            ha="left" if left else "right", va="top", **place,
        )  # fmt: skip
        return
    axes.annotate(
        "", (1.0, 0.97), (0.94, 0.97), xycoords=top, textcoords=top, arrowprops={"arrowstyle": "->", "color": INK}
    )
    axes.annotate(text, (0.94, 0.97), xycoords=top, xytext=(-5, 0), ha="right", va="center", **place)


def exact_against_l2(exact: Array, l2: Array, title: str, second_order: Array | None = None) -> Figure:
    """Per-sample exact integrand of the KL against its L2 term: on the diagonal, the L2 term is the KL.

    Args:
        exact: `(n,)` values of `|f|^2/2 + E(J)`, nats.
        l2: `(n,)` values of `|f|^2/2`, nats.
        title: the finding, in a few words.
        second_order: `(n,)` values of `|f|^2/2 + tr(J^2)/2`, nats, drawn lighter.
    """
    figure, (axes,) = new_figure(6.2, 5.0)
    shown = np.linspace(0, len(exact) - 1, min(len(exact), 800)).astype(int)
    exact, l2 = exact[shown], l2[shown]
    second_order = None if second_order is None else second_order[shown]
    both = np.concatenate([exact, l2] if second_order is None else [exact, l2, second_order])
    low, high = float(both.min()), float(both.max())
    pad = 0.04 * max(high - low, 1e-12)
    ends = np.array([low - pad, high + pad])
    axes.fill_between(ends, ends, ends[1], color="#f4f5f7", linewidth=0, zorder=0)
    axes.plot(ends, ends, color=GREY, linewidth=1.2, zorder=1)
    if second_order is not None:
        axes.scatter(second_order, exact, s=16, color=ORANGE, alpha=0.5, linewidth=0, label="second order", zorder=2)
    axes.scatter(l2, exact, s=16, color=BLUE, alpha=0.6, linewidth=0, label="L2 term", zorder=3)
    axes.set(
        xlabel="approximation of the integrand,  nats", ylabel="exact:  |f|²/2 + E(J),  nats", title=title,
        xlim=ends, ylim=ends,
    )  # fmt: skip
    axes.set_aspect("equal")
    axes.annotate(
        "the approximation\nmisses KL", (0.05, 0.93), xycoords="axes fraction", color=GREY, fontsize=9, va="top"
    )
    axes.annotate("overcounts", (0.95, 0.06), xycoords="axes fraction", color=GREY, fontsize=9, ha="right")
    if second_order is not None:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.1), markerscale=1.6)
    return figure


def densities(grid: Array, curves: Mapping[str, Array], title: str, xlabel: str = "noise  x") -> Figure:
    """Densities on one axis: the first is filled as the start, the second drawn heavy as the target.

    Args:
        grid: `(k,)` points.
        curves: name -> `(k,)` density values; order: base, tilted target, then what was learned.
        title: the finding, in a few words.
        xlabel: what the points are.
    """
    figure, (axes,) = new_figure()
    looks: Sequence[dict[str, Any]] = (
        {"color": GREY, "linewidth": 1.3},
        {"color": INK, "linewidth": 4.5, "alpha": 0.28, "solid_capstyle": "round"},
        {"color": VERMILION, "linestyle": "--"},
        {"color": BLUE, "linestyle": "-", "linewidth": 1.6},
        {"color": ORANGE, "linestyle": "-."},
    )
    for index, ((name, values), look) in enumerate(zip(curves.items(), looks, strict=False)):
        axes.plot(grid, values, label=name, **look)
        if index == 0:
            axes.fill_between(grid, values, color="#eceef1", linewidth=0)
    axes.set(xlabel=xlabel, ylabel="density", title=title)
    axes.set_xlim(float(grid[0]), float(grid[-1]))
    # A law that is nearly singular would flatten the others: its peaks leave the frame.
    ordinary = max(float(values.max()) for values in list(curves.values())[:2])
    highest = max(float(values.max()) for values in curves.values())
    axes.set_ylim(0, min(1.08 * highest, 2.2 * ordinary))
    axes.legend(loc="best")
    return figure


def kl_split(names: Sequence[str], parts: Mapping[str, Sequence[float]], totals: Sequence[float], title: str) -> Figure:
    """The KL of several maps as stacked bars of its parts, which may be negative, with the total marked.

    Args:
        names: one label per bar.
        parts: part name -> one value per bar, nats.
        totals: the KL of each bar, nats.
        title: the finding, in a few words.
    """
    figure, (axes,) = new_figure(height=1.7 + max(0.42 * min(len(names), 3), 0.26 * len(names)))
    places = np.arange(len(names))[::-1]
    positive, negative = np.zeros(len(names)), np.zeros(len(names))
    looks = ((SKY, ""), (BLUE, ""), (ORANGE, "///"), (VERMILION, "..."))
    for (name, values), (colour, hatch) in zip(parts.items(), looks, strict=False):
        array = np.asarray(values, dtype=float)
        start = np.where(array >= 0, positive, negative)
        axes.barh(
            places, array, left=start, height=0.6, color=colour, hatch=hatch, edgecolor="white", linewidth=0.8,
            label=name,
        )  # fmt: skip
        positive += np.maximum(array, 0)
        negative += np.minimum(array, 0)
    axes.plot(totals, places, linestyle="none", marker="D", markersize=6, color=INK, label="exact KL")
    axes.axvline(0, color="#5f6670", linewidth=0.9)
    axes.set_yticks(places, names)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="nats", title=title)
    figure.legend(loc="outside lower center", ncols=5, columnspacing=1.4, handlelength=1.6)
    return figure


def frontier(
    document: Mapping[str, Any], labels: Mapping[str, str], title: str, colours: Mapping[str, str] | None = None
) -> Figure:
    """Gain over nats: the frontier with its error band, best-of-N, and methods, whose nats are known or bounded.

    Args:
        document: what `hnkit.frontier.frontier_document` gives.
        labels: the methods that are drawn, and what they are called.
        title: the finding, in a few words.
        colours: the colours that methods have in other plots; the others get one in their order.
    """
    points = document["frontier"]
    nats, gain, error = (np.array([point[key] for point in points], dtype=float) for key in ("nats", "gain", "stderr"))
    within = [entry for entry in document["best_of"] if entry["nats"] <= document["most_nats"]]
    figure, (axes,) = new_figure()
    curve = BLUE if colours is None else INK  # which no method drawn here has
    axes.fill_between(nats, gain - 2 * error, gain + 2 * error, color=curve, alpha=0.15, linewidth=0)
    axes.plot(nats, gain, color=curve, label="the most that any law can gain (± 2 standard errors)")
    best_nats, best_gain = [entry["nats"] for entry in within], [entry["gain"] for entry in within]
    axes.plot(best_nats, best_gain, "o", color=GREY, markersize=4.5, label="best-of-N (nats: an upper bound)")
    for entry in within:
        axes.annotate(
            str(entry["n"]),
            (entry["nats"], entry["gain"]),
            textcoords="offset points",
            xytext=(5, -11),
            color=GREY,
            fontsize=8,
        )
    markers, others = ("D", "s", "^", "v", "P", "X"), (VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
    for index, (key, name) in enumerate(labels.items()):
        method = document["methods"][key]
        bounded, y, spread = method["nats"] is None, method["gain"], method["stderr"]
        x = method["nats_lower_bound"] if bounded else method["nats"]
        colour = (colours or {}).get(key, others[index % len(others)])
        label = f"{_plain(name)} (nats: at least)" if bounded else _plain(name)
        axes.errorbar(
            x, y, yerr=None if spread is None else 2 * spread, xerr=None, fmt=markers[index % len(markers)],
            color=colour, label=label, capsize=3,
        )  # fmt: skip
        if bounded:
            axes.annotate(
                "", (x, y), textcoords="offset points", xytext=(16, 0), arrowprops={"arrowstyle": "<-", "color": colour}
            )
    axes.set(xlabel="KL from the base,  nats a prompt", ylabel="gain in reward", title=title)
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])  # a marker at 0 nats is whole
    axes.legend(loc="best", fontsize=8)
    return figure


def image_grid(
    rows: Mapping[str, Sequence[Array]], titles: Sequence[str], marks: Mapping[str, Sequence[bool]] | None = None
) -> Figure:
    """Images row by row, each column under its title; small images are enlarged with their pixels as they are.

    Args:
        rows: label -> images `(H, W, 3)` in [0, 1], one a column.
        titles: what each column was asked for.
        marks: label -> whether the judge found each image right, drawn as a rule under it, with a legend.
    """
    from matplotlib.lines import Line2D

    marks = marks or {}
    figure = new_canvas(1.15 * len(titles) + 1.4, 1.15 * len(rows) + 0.6 + 0.35 * bool(marks))
    figure.set_layout_engine("compressed")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for i, (label, images) in enumerate(rows.items()):
        for j, image in enumerate(images):
            axis = axes[i][j]
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for side in axis.spines.values():
                side.set_visible(False)
            if i == 0:
                axis.set_title(_wrapped(titles[j]), fontsize=8, fontweight="normal", loc="center", pad=6)
            if j == 0:
                axis.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
            if label in marks:
                axis.axhline(image.shape[0] - 0.7, color=BLUE if marks[label][j] else VERMILION, linewidth=3)
    if marks:
        words = (("the judge finds it right", BLUE), ("or wrong", VERMILION))
        lines = [Line2D([], [], color=colour, linewidth=3, label=text) for text, colour in words]
        figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _escaped(text: str) -> str:
    """Text that somebody else wrote, as it stands: a dollar begins no formula, and nothing obeys control characters."""
    return printable(text).replace("$", r"\$")


def _plain(name: str) -> str:
    """A name as it stands in a legend, which leaves out what begins with an underscore."""
    label = shortened(_escaped(" ".join(name.split())), 60)
    return f" {label}" if label.startswith("_") else label


def _wrapped(text: str, width: int = 15) -> str:
    lines = [""]
    for word in _escaped(text).split():
        if lines[-1] and len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:4]) + ("…" if len(lines) > 4 else "")
