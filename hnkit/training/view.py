"""What a training run shows and tells: progress and trackers. Output that cannot be written is dropped."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hnkit.config import TrainConfig
from hnkit.errors import InputError
from hnkit.frontier.page import sentences
from hnkit.injection import InjectedBound
from hnkit.internal.stats import Estimate
from hnkit.internal.streams import Droppable
from hnkit.internal.values import or_nan
from hnkit.loss import NoiseLoss
from hnkit.output.page import format_estimate, format_number
from hnkit.output.terminal import Words
from hnkit.output.verdict import l2_words
from hnkit.training.validate import prompts_of

_SECONDS_BETWEEN_LINES = 20.0


class TrainView:
    """Progress on a console: a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._plain = console.file
        console.file = cast(IO[str], Droppable(console.file))
        self.console, self.quiet = console, quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._steps = 0
        self._term: tuple[str, str] | None = None
        self._kl: str | None = None
        self._last_line = 0.0

    def say(self, text: str, *, whole: bool = False) -> None:
        """A message: on a terminal broken between its words and in no figure, elsewhere, and if `whole`, one line."""
        if self.quiet:
            return
        if self.console.is_terminal and not whole:
            self.console.print(Words(text))
        else:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line on stderr, whatever else is shown."""
        print(f"hnkit: {text}", file=cast(IO[str], Droppable(sys.stderr)), flush=True)

    def start(self, settings: TrainConfig, backend: str, dim: int, parameters: int, step: int, folder: Path) -> None:
        """Say what is about to run, and what temperature it aims at."""
        self._steps = settings.steps
        self._term, self._kl = loss_term(settings), settings.kl
        self.say(f"training {backend} (d = {dim}, {parameters:,} trained parameters), run folder {folder}")
        if settings.objective == "hypernoise":
            self.say(alpha_sentence(settings, dim))
        if settings.ema:
            self.say(
                f"weights are averaged (decay {settings.ema:g}): a step's figures are of the last weights, KL, scores "
                "and adapter of their average, which lags behind at first"
            )
        if step:
            self.say(f"going on after step {step}")
        if self.console.is_terminal and not self.quiet:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, TextColumn("{task.description}"), console=self.console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("", total=settings.steps, completed=step)

    def progress(self, record: Mapping[str, Any]) -> None:
        """One step has been taken."""
        step = record["step"]
        term = "" if self._term is None else f"  {self._term[1]} {format_number(record[self._term[0]])}"
        text = f"loss {format_number(record['loss'])}{term}  reward {format_number(record['reward'])}"
        if record["skipped"]:
            self.say(f"step {step}: loss or gradient is not finite, batch skipped")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if step % max(1, self._steps // 10) == 0 or now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"step {step}/{self._steps}  {text}")

    def measured(self, entry: Mapping[str, Any]) -> None:
        """A measurement or a validation has been made."""
        if "measurement" in entry:
            figures = entry["measurement"]
            known = {key: or_nan(value) for key, value in figures.items()}
            text = f"KL {format_estimate(known['kl'], known['kl_stderr'], figures['bias_bound'])} nats"
            text += f", L2 term {format_estimate(known['l2'], known['l2_stderr'])}"
            if figures.get("injected"):
                text = f"{injected_sentence(figures['injected'])} (of x + f(x) alone, not deployed: {text})"
            if figures.get("gap") is not None:
                text += f", {format_estimate(known['gap'], known['gap_stderr'])} nats from the optimum"
            self.say(f"step {entry['step']}: {text}")
            if figures.get("l2_verdict"):
                self.say(f"step {entry['step']}: {l2_words(figures['l2_verdict'], self._kl)}")
        if "validation" in entry:
            gains = ", ".join(
                f"{name} {shown_mean(score, 'base')} -> {shown_mean(score, 'steered')} ({shown_gain(score)})"
                for name, score in entry["validation"]["scores"].items()
            )
            self.say(f"step {entry['step']}: {prompts_of(entry['validation'])}, base -> steered (gain): {gains}")

        if "frontier" in entry:
            for sentence in sentences(entry["frontier"]):
                self.say(f"step {entry['step']}: {sentence}")

    def close(self) -> None:
        """Take the bar away, and give the console its own stream back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self.console.file = self._plain


def shown_mean(score: Mapping[str, Any], kind: str) -> str:
    """The mean of the `kind` ("base" or "steered") scores, or that, and how often, they were not finite."""
    count = score["non_finite"][kind]
    return f"not finite ({count} of {score['samples']})" if count else format_number(score[kind])


def shown_gain(score: Mapping[str, Any]) -> str:
    """The paired gain in a score with its standard error."""
    return "not finite" if score["gain"] is None else format_estimate(score["gain"], or_nan(score["gain_stderr"]))


def loss_term(settings: TrainConfig) -> tuple[str, str] | None:
    """What stands beside the reward in the loss: its key in metrics.jsonl, and its name; `None` for direct fine-tuning.

    The L2 term is no KL and is never called one; with injected noise a multiple of it bounds the KL; the others
    estimate the KL.
    """
    if settings.objective == "direct":
        return None
    if settings.injection:
        return "kl_bound", "KL bound"
    return ("l2", "L2 term") if settings.kl == "l2" else ("kl", f"KL ({settings.kl})")


def injected_sentence(bound: Mapping[str, Any]) -> str:
    """What is known of the KL of what is deployed with injected noise, from its record in the measurement."""
    stderr = or_nan(bound["nats_stderr"])
    record = {key: value for key, value in bound.items() if key not in ("nats", "nats_stderr")}
    return InjectedBound(nats=Estimate(bound["nats"], stderr), **record).sentence()


def effective_alpha(settings: TrainConfig, dim: int) -> float:
    """The temperature of the law that a run aims at, in units of the reward, in so many dimensions."""
    return NoiseLoss(kl=settings.kl, alpha=settings.alpha, reduction=settings.reduction).effective_alpha(dim)


def alpha_sentence(settings: TrainConfig, dim: int) -> str:
    """The effective temperature of a run and what it means, in one line."""
    effective = effective_alpha(settings, dim)
    if settings.reduction == "sum":
        return f"effective alpha = {effective:g}: the target is the base law tilted by exp(r / {effective:g})"
    return (
        f"effective alpha = {effective:g} = {settings.alpha:g} / {dim}: reduction 'mean' divides the KL by d, so the "
        f"target is the base law tilted by exp({1 / effective:g} r), not by exp(r / {settings.alpha:g})"
    )


class Trackers:
    """TensorBoard and Weights & Biases through accelerate, with the same records as metrics.jsonl."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._trackers = [_tracker(name, folder) for name in names]
        for tracker in self._trackers:
            tracker.store_init_configuration(_flat(config))

    def log(self, record: Mapping[str, Any]) -> None:
        """One record, its numbers under their dotted names."""
        numbers = {key: value for key, value in _flat(record).items() if type(value) in (int, float, bool)}
        for tracker in self._trackers:
            tracker.log(numbers, step=record["step"])

    def finish(self) -> None:
        """Flush and close."""
        for tracker in self._trackers:
            tracker.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed; `InputError` names the first."""
    from accelerate import tracking

    available = {"tensorboard": tracking.is_tensorboard_available, "wandb": tracking.is_wandb_available}
    for name in names:
        if not available[name]():
            raise InputError(f"train.trackers names {name!r}, whose package is not installed: pip install {name}")


def _tracker(name: str, folder: Path) -> Any:
    from accelerate import tracking

    tracker = (
        tracking.TensorBoardTracker(folder.name, logging_dir=folder)
        if name == "tensorboard"
        else tracking.WandBTracker("hnkit", name=folder.name, dir=str(folder))
    )
    tracker.start()
    return tracker


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) or value is None else str(value)
    return flat
