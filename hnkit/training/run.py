"""The one trainer: every backend, every loss, one process or many, resumable to the bit on the CPU.

This module owns the loop and every way out of it: whatever ends a run, an exception of a reward or a signal of a
scheduler, leaves a checkpoint of the last whole step. What a step is stands in `hnkit.training.session`, what is
written about it in `hnkit.training.recorder`.
"""

from __future__ import annotations

import contextlib
import errno
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hnkit.config import CONFIG_FILE, PLACES, RunConfig, differing_keys, resume_command
from hnkit.errors import InputError
from hnkit.internal.files import atomic_write, new_run_folder, require_run_folder
from hnkit.internal.folders import FolderIdentity, require_plain, run_lock
from hnkit.internal.provenance import PROVENANCE
from hnkit.internal.seeds import kept_generators
from hnkit.internal.stops import Stopped
from hnkit.internal.values import number_of, shown
from hnkit.output import terminal
from hnkit.training.checkpoint import CHECKPOINTS, REPLACED, Checkpoint, newest_checkpoint, sweep
from hnkit.training.processes import Heartbeat, Processes, connection_lost
from hnkit.training.recorder import METRICS, TIMINGS, Follower, Recorder, written_here
from hnkit.training.report import OUTPUTS, finish_run, finished_report
from hnkit.training.session import Session
from hnkit.training.signals import StopSignals
from hnkit.training.validate import SAMPLES
from hnkit.training.view import TrainView
from hnkit.training.watch import Watch

__all__ = ["METRICS", "TIMINGS", "TrainResult", "train"]

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
_WRITTEN = (
    *(CONFIG_FILE, PROVENANCE, METRICS, TIMINGS, CHECKPOINTS, SAMPLES, *OUTPUTS),
    *(f".{name}.{half}" for name in REPLACED for half in ("tmp", "old")),
)


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
    config: RunConfig,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    console: Console | None = None,
    again: str | None = None,
) -> TrainResult:
    """Train a hypernetwork (or the direct fine-tuning baseline) and write a run folder.

    The global random generators of Python, numpy and torch are as they were when it returns.

    Args:
        config: the resolved configuration.
        out: a new folder; `None`: under `runs/`.
        resume: the folder of a run to go on with; its configuration must be `config`, but for a
            larger `train.steps` and for where its model, prompts and starting adapter now lie.
        console: where progress goes; `None`: stderr.
        again: the command that goes on with what this training is a part of, which is said where it ends early;
            `None`: `hnkit train --resume`.

    Returns:
        How it ended. An interrupted run has written a checkpoint and can be resumed.

    Raises:
        InputError: bad input, a folder in use or not hnkit's, damaged checkpoints, a full disk, a reward that raised,
            too many non-finite batches, out of memory: one line. Once a step is done there is a checkpoint of it.
        SystemExit: a signal other than SIGINT before the first step; the code is 128 + signal.
        KeyboardInterrupt: SIGINT before the first step.
    """
    out, resume = (None if folder is None else Path(folder) for folder in (out, resume))
    view = TrainView(console or terminal.console(stderr=True), quiet=False)
    with contextlib.ExitStack() as stack:
        stack.callback(view.close)
        stop = stack.enter_context(StopSignals())
        watch = stack.enter_context(Watch(view, stop))
        stack.enter_context(kept_generators())
        try:
            return _opened(stack, config, out, resume, again, view, stop, watch)
        except Stopped as stopped:  # nothing has been done yet, so there is nothing to lose
            view.say("stopped before the first step: nothing was lost")
            if stopped.signum == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(stopped.exit_code) from None


def _opened(
    stack: contextlib.ExitStack,
    config: RunConfig,
    out: Path | None,
    resume: Path | None,
    again: str | None,
    view: TrainView,
    stop: StopSignals,
    watch: Watch,
) -> TrainResult:
    """Everything from the processes to the end of the run, with what goes wrong put into one line."""
    # a backend without the option `device` computes on the CPU
    device = str(vars(config.options).get("device", "cpu"))
    processes = Processes(device)
    view.quiet = not processes.main
    processes.require_same(_flat(config.to_dict()))
    folder, identity = resume, None
    session: Session | None = None
    try:
        start = None
        if resume is not None:
            found = processes.on_main(lambda: _reopen(stack, config, resume, view))
            if isinstance(found, TrainResult):
                return found
            start = found
        elif out is not None and out.exists():
            raise InputError(f"--out {out} exists already and is never overwritten: name a new folder")
        session = Session(config, processes, view)
        processes.require_same({"the prompts": session.prompts_digest(), "the model": str(session.provenance["model"])})
        session.rehearse()
        with stop.masked():
            folder = resume or processes.on_main(lambda: _create(stack, config, out))
            identity = FolderIdentity.of(folder)
        if start is not None:
            with written_here(folder):
                session.restore(start)
        if resume is not None:
            processes.on_main(lambda: atomic_write(folder / CONFIG_FILE, config.to_toml()))
        go_on = _go_on(config, folder, again)
        stack.enter_context(Heartbeat(processes, lambda reason: watch.end_process(2, f"{reason}{go_on}")))
        return _run(session, folder, start, again or resume_command(config, folder), stop, watch, stack)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        if identity is not None:  # in another folder of that name there is nothing to go on with
            identity.check()
        raise InputError(
            f"{error.filename or folder}: {error.strerror}; older checkpoints are intact: mend that"
            f"{_go_on(config, folder, again)}"
        ) from error
    except torch.OutOfMemoryError as error:
        advice = session.memory_advice() if session is not None else "a smaller model or batch helps"
        raise InputError(f"out of memory: {advice}{_go_on(config, folder, again)}") from error


def _go_on(config: RunConfig, folder: Path | None, again: str | None) -> str:
    return f"; go on with {again or resume_command(config, folder)}" if folder is not None else ""


def _flat(tables: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {f"{table}.{key}": repr(value) for table, entries in tables.items() for key, value in entries.items()}


def _create(stack: contextlib.ExitStack, config: RunConfig, out: Path | None) -> Path:
    folder = new_run_folder(out, "train")
    stack.enter_context(run_lock(folder))
    atomic_write(folder / CONFIG_FILE, config.to_toml())
    return folder


def _reopen(
    stack: contextlib.ExitStack, config: RunConfig, folder: Path, view: TrainView
) -> Checkpoint | TrainResult | None:
    """Lock a run folder, check that it is this configuration's, and find where it stands."""
    require_run_folder(folder, "train")
    require_plain(folder, _WRITTEN)
    stack.enter_context(run_lock(folder))
    checkpoint = newest_checkpoint(folder, view.warn)
    if checkpoint is not None:
        with written_here(folder):
            _require_same(checkpoint.state["config"], config, folder)
        if checkpoint.step > config.train.steps:
            raise InputError(
                f"--resume {folder}: its checkpoint says step {shown(checkpoint.step)} of {config.train.steps}, which "
                "no training writes: take another copy of the run, or start a new one"
            )
    report = finished_report(folder)
    if report is not None and report["step"] == config.train.steps:
        view.say(f"{folder} is finished: {number_of(config.train.steps, 'step')}, nothing to do")
        return TrainResult(folder, report["step"], True, 0, report["skipped"], report)
    sweep(folder)
    return checkpoint


def _require_same(saved: dict[str, Any], config: RunConfig, folder: Path) -> None:
    given = config.to_dict()
    steps = saved["train"]["steps"]
    for dotted in differing_keys(saved, given):
        table, _, key = dotted.partition(".")
        if dotted in PLACES:  # what is there is compared once it is loaded
            continue
        if dotted == "train.steps" and config.train.steps > steps and config.train.schedule == "constant":
            continue
        advice = "a resumed run keeps its configuration"
        if dotted == "train.steps":
            advice = "steps may grow, and only where train.schedule is 'constant'"
        if dotted == "train.draws" and config.train.reward_gradient == "pathwise":
            advice = (
                "the pathwise gradient takes one now, so make an adapter of the run with `hnkit export --checkpoint` "
                "and train on with --from-adapter"
            )
        asked, has = given[table].get(key), saved[table].get(key)
        raise InputError(f"--resume {folder}: {dotted} = {asked!r} but the run has {has!r}: {advice}")


def _run(
    session: Session,
    folder: Path,
    start: Checkpoint | None,
    again: str,
    stop: StopSignals,
    watch: Watch,
    stack: contextlib.ExitStack,
) -> TrainResult:
    """The loop, and a checkpoint on whatever way out."""
    processes, view, settings = session.processes, session.view, session.config.train
    recorder = None
    follower = Follower(session, start) if session.together and not processes.main else None
    if processes.main:
        with stop.masked():
            recorder = Recorder(session, folder, start, stack)
    count = sum(parameter.numel() for parameter in session.parameters.values())
    view.start(settings, session.config.backend, session.dim, count, session.step, folder)
    try:
        with _saved_on_the_way_out(recorder, stop, watch):
            _loop(session, recorder, recorder or follower, stop, watch)
            report: dict[str, Any] = {}
            if recorder is not None:
                watch.doing("the report")
                with session.averaged():
                    report = finish_run(session.config, recorder.evaluator, folder, recorder.ending())
            processes.on_main(lambda: None)  # the others wait for the report
        stop.over()
    except Stopped as stopped:
        return _stopped(session, folder, again, stopped.exit_code)
    except BaseException as error:
        if isinstance(error, RuntimeError) and processes.count > 1:
            if stop.received:  # the others have stopped too, some before they could say so
                return _stopped(session, folder, again, 128 + stop.received)
            if connection_lost(error):
                raise InputError(f"another process has gone; go on with {again}") from error
        if session.step == 0:
            raise
        further = f"stopped after step {session.step}; go on with {again}"
        if isinstance(error, InputError):
            raise InputError(f"{error}; {further}") from error
        if isinstance(error, KeyboardInterrupt):  # raised by a user's function: a Ctrl-C is a signal here
            raise KeyboardInterrupt(further) from error
        view.say(further, whole=True)
        raise
    view.say(f"finished: adapter {folder / 'adapter'}, report {folder / 'report.html'}", whole=True)
    if len(session.backend.noise_shape) > 1 and session.config.train.objective == "hypernoise":
        view.say(
            f"use it: hnkit generate --backend {session.config.backend} --adapter {shlex.quote(str(folder))}",
            whole=True,
        )
    return TrainResult(folder, session.step, True, 0, session.skipped, report)


def _stopped(session: Session, folder: Path, again: str, code: int) -> TrainResult:
    done = f"at step {session.step} after a checkpoint" if session.step else "before the first step"
    session.view.say(f"stopped {done}; go on with {again}", whole=True)
    return TrainResult(folder, session.step, False, code, session.skipped, {})


def _loop(
    session: Session,
    recorder: Recorder | None,
    looks: Recorder | Follower | None,
    stop: StopSignals,
    watch: Watch,
) -> None:
    """Step, record, checkpoint, measure, until the last step; `Stopped` where a signal asks for it.

    The main process records. It looks at the network as it goes, and so does a process that it needs for that.
    """
    processes, settings = session.processes, session.config.train
    _require_finite(session)
    if looks is not None:
        looks.look(watch)  # a run that ended between a step and its measurement makes it now
    while session.step < settings.steps:
        begun = time.perf_counter()
        watch.doing(f"step {session.step + 1}")
        with stop.deferred():
            sums = session.gradients()
            with stop.masked():
                record = session.update(sums)
                if recorder is not None:
                    recorder.record(record, begun)
            signum = stop.agreed(processes, session.device)
            exhausted = session.skipped_in_row >= settings.max_skipped
            if recorder is not None and (
                signum or exhausted or session.step % settings.checkpoint_every == 0 or session.step == settings.steps
            ):
                with stop.masked():
                    recorder.checkpoint()
        if exhausted:
            raise InputError(
                f"{session.skipped_in_row} batches in a row had no finite loss and gradient{session.problem}: lower "
                "train.lr or check the reward"
            )
        if signum:
            raise Stopped(signum)
        _require_finite(session)
        if looks is not None:
            looks.look(watch)
    if session.moved == 0:
        what = "was skipped" if session.skipped else "had a reward whose gradient is zero"
        raise InputError(
            f"every one of the {session.step} batches {what}{session.problem}, so nothing was trained and the run is "
            "not finished: check the reward"
        )


def _require_finite(session: Session) -> None:
    """Refuse to measure, and to save as an adapter, what the last step has left, where that is not finite."""
    settings = session.config.train
    if session.step == settings.steps and (name := session.diverged()):
        raise InputError(
            f"after the last step {name} is not finite: the training diverged and the run is not finished: lower "
            f"train.lr = {settings.lr:g}"
        )


@contextlib.contextmanager
def _saved_on_the_way_out(recorder: Recorder | None, stop: StopSignals, watch: Watch) -> Iterator[None]:
    """Whatever leaves this block leaves a checkpoint of the last whole step; what cannot be written is said.

    A signal that arrives from then on, as torchrun sends one where another process has died, has nothing left to end.
    """

    def save() -> None:
        if recorder is None or not recorder.behind():
            return
        try:
            recorder.checkpoint()
        except (OSError, InputError) as error:
            recorder.session.view.warn(f"no checkpoint of step {recorder.session.step} could be written: {error}")

    watch.save = save
    try:
        yield
    except BaseException:
        stop.over()
        with stop.steady:
            save()
        raise
    finally:
        watch.save = lambda: None
