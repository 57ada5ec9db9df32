"""What methods and scores are called in tables and plots, and how their figures are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hnkit.internal.values import or_nan
from hnkit.output.page import format_estimate
from hnkit.output.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION

Document = Mapping[str, Any]
Row = Mapping[str, Any]
COLOURS = {
    "base": GREY,
    "hypernoise": BLUE,
    "direct": VERMILION,
    "best-of-2": SKY,
    "best-of-4": INK,
    "best-of-n": GREEN,
    "reno": ORANGE,
    "prompt-optimisation": PURPLE,
}
NAMES = {
    "base": "base",
    "hypernoise": "+ HyperNoise",
    "direct": "direct LoRA",
    "best-of-2": "+ best-of-2",
    "best-of-4": "+ best-of-4",
    "best-of-n": "+ best-of-N",
    "reno": "+ ReNO",
    "prompt-optimisation": "+ prompt optimisation",
}
LOSS_LABELS = {"l2": "L2 term", "second-order": "second order", "arnoldi": "Arnoldi", "exact": "exact"}


def main_score(document: Document) -> str:
    """The score a table is read by: the independent judge where there is one, else the trained reward."""
    return "judge" if "judge" in document["table_1"][0]["scores"] else "reward"


def label_of(score: str) -> str:
    """What a score is called."""
    return {"judge": "judge's mean", "reward": "trained reward"}.get(score, score)


def figure_text(figure: Mapping[str, float | None]) -> str:
    """A figure of the document with its error bar."""
    value, stderr = figure["value"], figure["stderr"]
    assert value is not None
    return format_estimate(value, or_nan(stderr))


def network_label(name: str) -> str:
    """What a method or a network is called."""
    if name.startswith("kl-"):
        return f"trained with {LOSS_LABELS[name.removeprefix('kl-')]}"
    return NAMES.get(name, name)
