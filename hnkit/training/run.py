"""The one trainer: every backend, every loss, one process or many, resumable to the bit on the CPU.

This module owns the run folder and the loop: it locks and opens the folder, lets a `Session` take its steps, records
and measures what they did, and ends the run. What a step is stands in `hnkit.training.session`.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hnkit.config import CONFIG_FILE, RunConfig, differing_keys, resume_command
from hnkit.errors import InputError
from hnkit.internal.files import atomic_write, new_run_folder
from hnkit.output import terminal
from hnkit.training.checkpoint import Checkpoint, JsonLog, newest_checkpoint, run_lock, save_checkpoint, sweep
from hnkit.training.processes import Processes
from hnkit.training.report import finish_run, finished_report
from hnkit.training.session import Session
from hnkit.training.validate import Evaluator
from hnkit.training.view import StopSignals, Trackers, TrainView

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: the run folder.
        step: optimiser steps done.
        finished: whether all of them are, and the adapter and the report are written.
        exit_code: 0, or 128 + signal (130 for Ctrl-C, 143 for SIGTERM) after a checkpoint.
        skipped: batches skipped because the loss or its gradient was not finite.
        report: what report.json holds; empty unless finished.
    """

    folder: Path
    step: int
    finished: bool
    exit_code: int
    skipped: int
    report: dict[str, Any]


def train(
    config: RunConfig, *, out: Path | None = None, resume: Path | None = None, console: Console | None = None
) -> TrainResult:
    """Train a hypernetwork (or the direct fine-tuning baseline) and write a run folder.

    Args:
        config: the resolved configuration.
        out: a new folder; `None`: under `runs/`.
        resume: the folder of a run to go on with; its configuration must be `config`, but for a larger `train.steps`.
        console: where progress goes; `None`: stderr.

    Returns:
        How it ended. An interrupted run has written a checkpoint and can be resumed.

    Raises:
        InputError: bad input, a folder in use, damaged checkpoints, a full disk, too many non-finite batches, out of
            memory: one line, older checkpoints intact.
    """
    view = TrainView(console or terminal.console(stderr=True), quiet=False)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        # a backend without the option `device` computes on the CPU
        processes = Processes(cpu=getattr(config.options, "device", "cpu") == "cpu")
        view.quiet = not processes.main
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if resume is not None:
            folder = resume
            start = processes.on_main(lambda: _reopen(stack, config, folder, view))
            if isinstance(start, TrainResult):
                return start
            session = Session(config, processes, view)
        else:
            if out is not None and out.exists():
                raise InputError(f"--out {out} exists already and is never overwritten: name a new folder")
            session = Session(config, processes, view)
            folder = processes.on_main(lambda: _create(stack, config, out))
            start = None
        try:
            return _run(session, folder, start, stop, stack)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise InputError(
                f"{error.filename or folder}: {error.strerror}; older checkpoints are intact: mend that and go on with "
                f"{resume_command(config, folder)}"
            ) from error
        except torch.OutOfMemoryError as error:
            advice = session.memory_advice()
            raise InputError(f"out of memory: {advice}; go on with {resume_command(config, folder)}") from error


def _create(stack: contextlib.ExitStack, config: RunConfig, out: Path | None) -> Path:
    folder = new_run_folder(out, "train")
    stack.enter_context(run_lock(folder))
    atomic_write(folder / CONFIG_FILE, config.to_toml())
    return folder


def _reopen(
    stack: contextlib.ExitStack, config: RunConfig, folder: Path, view: TrainView
) -> Checkpoint | TrainResult | None:
    """Lock a run folder, check that it is this configuration's, and find where it stands."""
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"--resume {folder}: no run is there ({CONFIG_FILE} is missing): name a run folder")
    try:
        stack.enter_context(run_lock(folder))
    except OSError as error:
        raise InputError(f"--resume {folder}: {error.strerror}: make the folder writable") from error
    checkpoint = newest_checkpoint(folder, view.warn)
    if checkpoint is not None:
        with _written_here(folder):
            _require_same(checkpoint.state["config"], config, folder)
    report = finished_report(folder)
    if report is not None and report["step"] == config.train.steps:
        view.say(f"{folder} is finished: {config.train.steps} steps, nothing to do")
        return TrainResult(folder, report["step"], True, 0, report["skipped"], report)
    sweep(folder)
    atomic_write(folder / CONFIG_FILE, config.to_toml())
    return checkpoint


@contextlib.contextmanager
def _written_here(folder: Path) -> Iterator[None]:
    """A whole checkpoint that lacks what this version writes is refused in one line."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"--resume {folder}: its checkpoint is not one that this version writes ({error!r}): start a new run"
        ) from error


def _require_same(saved: dict[str, Any], config: RunConfig, folder: Path) -> None:
    given = config.to_dict()
    steps = saved["train"]["steps"]
    for dotted in differing_keys(saved, given):
        table, _, key = dotted.partition(".")
        if dotted == "train.steps" and config.train.steps > steps and config.train.schedule == "constant":
            continue
        advice = "a resumed run keeps its configuration"
        if dotted == "train.steps":
            advice = "steps may grow, and only where train.schedule is 'constant'"
        asked, has = given[table].get(key), saved[table].get(key)
        raise InputError(f"--resume {folder}: {dotted} = {asked!r} but the run has {has!r}: {advice}")


def _run(
    session: Session, folder: Path, start: Checkpoint | None, stop: StopSignals, stack: contextlib.ExitStack
) -> TrainResult:
    """The loop: step, measure, validate, checkpoint, until the last step or a signal."""
    processes, view, settings = session.processes, session.view, session.config.train
    if start is not None:
        with _written_here(folder):
            session.restore(start)
    recorder = _Recorder(session, folder, start, stack) if processes.main else None
    count = sum(parameter.numel() for parameter in session.parameters.values())
    view.start(settings, session.config.backend, session.dim, count, session.step, folder)
    stack.callback(view.close)
    while session.step < settings.steps:
        begun = time.perf_counter()
        record = session.take_step()
        last = session.step == settings.steps
        exhausted = session.skipped_in_row >= settings.max_skipped
        signum = stop.agreed(processes, session.device)
        if recorder is not None:
            recorder.record(record, last, begun)
            if last or signum or exhausted or session.step % settings.checkpoint_every == 0:
                recorder.checkpoint()
        if exhausted:
            reason = f" ({session.last_problem})" if session.last_problem else ""
            raise InputError(
                f"{session.skipped_in_row} batches in a row had no finite loss and gradient{reason}, at step "
                f"{session.step}: lower train.lr or check the reward; the checkpoint of that step is in {folder}"
            )
        if signum and not last:
            how = resume_command(session.config, folder)
            view.say(f"stopped at step {session.step} after a checkpoint; go on with {how}")
            return TrainResult(folder, session.step, False, 128 + signum, session.skipped, {})
    report: dict[str, Any] = {}
    if recorder is not None:
        with session.averaged():
            report = finish_run(session.config, recorder.evaluator, folder, session.step, session.skipped)
    processes.on_main(lambda: None)  # the others wait for the report
    view.say(f"finished: adapter {folder / 'adapter'}, report {folder / 'report.html'}")
    return TrainResult(folder, session.step, True, 0, session.skipped, report)


class _Recorder:
    """What the main process alone does: metrics, measurements, trackers, checkpoints."""

    def __init__(self, session: Session, folder: Path, start: Checkpoint | None, stack: contextlib.ExitStack) -> None:
        self.session, self.folder = session, folder
        if start is None:  # what a run that was killed before its first checkpoint left is dropped
            (folder / METRICS).unlink(missing_ok=True)
            self.log = JsonLog(folder / METRICS)
        else:
            with _written_here(folder):
                self.log = JsonLog.resume(folder / METRICS, start.state["metrics"], session.view.warn)
        stack.callback(self.log.close)
        self.timings = stack.enter_context((folder / TIMINGS).open("a", encoding="utf-8"))
        self.trackers = Trackers(session.config.train.trackers, folder, session.config.to_dict())
        stack.callback(self.trackers.finish)
        self.evaluator = Evaluator(
            session.config.train,
            session.base,
            session.backend,
            session.rewards,
            session.heldout,
            session.validation_prompts,
            set(session.training_prompts).isdisjoint(session.validation_prompts),
            session.device,
        )

    def record(self, record: dict[str, Any], last: bool, begun: float) -> None:
        """Write what a step did, with what is measured after it."""
        settings, step = self.session.config.train, self.session.step
        entries = [record]
        self.session.view.progress(record)
        with self.session.averaged():
            if last or _due(step, settings.measure_every):
                try:
                    measurement = self.evaluator.measure()
                except InputError as error:  # a network that cannot be measured now is no reason to lose the run
                    self.session.view.say(f"step {step}: not measured: {error}")
                    measurement = None
                if measurement is not None:
                    entries.append({"step": step, "measurement": measurement.to_json()})
            if last or _due(step, settings.validate_every):
                entries.append({"step": step, "validation": self.evaluator.validate(self.folder, step)})
        for entry in entries:
            self.log.write(entry)
            self.trackers.log(entry)
            self.session.view.measured(entry)
        self.timings.write(f'{{"step": {step}, "seconds": {time.perf_counter() - begun:.6f}}}\n')

    def checkpoint(self) -> None:
        """Write a checkpoint, the logs flushed to the disk before it."""
        self.timings.flush()
        tensors, state = self.session.checkpoint()
        state |= {"metrics": self.log.position()}
        save_checkpoint(self.folder, self.session.step, tensors, state, self.session.config.train.keep)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
