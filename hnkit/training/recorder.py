"""What the main process does along a run: the log, measurements, trackers, checkpoints, the best adapter.

Where the network is shared out over the processes, the others take part in what it measures, and write nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnkit.errors import InputError
from hnkit.internal.folders import FolderIdentity, open_to_append
from hnkit.internal.provenance import record_provenance
from hnkit.internal.seeds import seed_global
from hnkit.internal.versions import versions
from hnkit.training.checkpoint import Checkpoint, JsonLog, close_quietly, replace_folder, save_checkpoint
from hnkit.training.nats import reward_per_nat
from hnkit.training.report import BEST, Ending, write_adapter
from hnkit.training.session import Session, step_within
from hnkit.training.validate import Evaluator, Validation
from hnkit.training.view import Trackers
from hnkit.training.watch import Watch

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"
_BEST_KEYS = ("step", "loss")  # in this order in every report, whatever a file sorts


@contextlib.contextmanager
def written_here(folder: Path) -> Iterator[None]:
    """A whole checkpoint that lacks what this version writes is refused in one line."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"--resume {folder}: its checkpoint is not one that this version writes ({error!r}): start a new run"
        ) from error


class Recorder:
    """The files of a run while it is trained.

    After the record of a step comes its checkpoint, and only then what is measured at that step: a run that ends in
    between makes the measurement when it is resumed, and nothing is lost to a measurement that takes long or fails.

    Attributes:
        session: the session of the run.
        looked: the last step at which everything was measured that is due there.
        best: step and loss of the validation with the lowest loss so far, or `None`.
        evaluator: what measures.
    """

    def __init__(self, session: Session, folder: Path, start: Checkpoint | None, stack: contextlib.ExitStack) -> None:
        self.session, self.folder = session, folder
        self._identity = FolderIdentity.of(folder)
        self.looked = 0
        self.best: dict[str, Any] | None = None
        self._saved = (0, 0)
        if start is None:  # what a run that was killed before its first checkpoint left is dropped
            (folder / METRICS).unlink(missing_ok=True)
            self.log = JsonLog(folder / METRICS)
        else:
            with written_here(folder):
                self.looked, best = step_within(start.state["looked"], start.step), start.state["best"]
                if best is not None:
                    found = step_within(best["step"], start.step), float(best["loss"])
                    self.best = dict(zip(_BEST_KEYS, found, strict=True))
                self.log = JsonLog.resume(folder / METRICS, start.state["metrics"], session.view.warn)
                self._saved = (start.step, self.looked)
        stack.callback(self.log.close)
        record_provenance(folder, {"versions": versions(), **session.provenance})
        self.timings = open_to_append(folder / TIMINGS)
        stack.callback(close_quietly, self.timings)
        self.trackers = Trackers(session.config.train.trackers, folder, session.config.to_dict())
        stack.callback(self.trackers.finish)
        self.evaluator = _evaluator(session)

    def record(self, record: dict[str, Any], begun: float) -> None:
        """Write what a step did."""
        self.log.write(record)
        self.trackers.log(record)
        self.session.view.progress(record)
        line = f'{{"step": {self.session.step}, "seconds": {time.perf_counter() - begun:.6f}}}\n'
        self.timings.write(line.encode())

    def look(self, watch: Watch) -> None:
        """Measure and validate, where that is due at the present step and has not been done; all of it or nothing."""
        if (looking := _looking(self.session, self.looked)) is None:
            return
        step = self.session.step

        def opened() -> Path:
            self._identity.check()
            return self.folder

        entries = _found(self.session, self.evaluator, looking, watch, opened, self._keep_best)
        with watch.stop.masked():
            self.log.write(*entries)
            self.looked = step
            for entry in entries:
                self.trackers.log(entry)
                self.session.view.measured(entry)
            if looking.last:  # what may have taken an hour is not made again
                self.checkpoint()

    def _keep_best(self, validation: Validation) -> None:
        """Keep the adapter of the lowest validation loss, where there is more than one validation to choose from."""
        loss = validation.record["loss"]
        if not self.session.config.train.validate_every or not math.isfinite(loss):
            return
        if self.best is None or loss < self.best["loss"]:
            best = dict(zip(_BEST_KEYS, (self.session.step, loss), strict=True))
            session = self.session
            replace_folder(
                self.folder / BEST,
                lambda target: write_adapter(
                    target,
                    session.config,
                    session.backend,
                    step=session.step,
                    skipped=session.skipped,
                    rewards={reward.name: reward.weight for reward in session.rewards.rewards},
                ),
            )
            self.best = best

    def behind(self) -> bool:
        """Whether the run is further than its newest checkpoint, and in a state that can be saved."""
        session = self.session
        return session.whole and session.step > 0 and (session.step, self.looked) != self._saved

    def checkpoint(self) -> None:
        """Write a checkpoint, the logs flushed to the disk before it.

        Raises:
            InputError: the run folder is no longer the one that was opened.
            OSError: it cannot be written.
        """
        self._identity.check()
        self.timings.flush()
        tensors, state = self.session.checkpoint()
        state |= {"metrics": self.log.position(), "looked": self.looked, "best": self.best}
        save_checkpoint(self.folder, self.session.step, tensors, state, self.session.config.train.keep)
        self._saved = (self.session.step, self.looked)

    def ending(self) -> Ending:
        """What the report says of the run as a whole."""
        self._identity.check()
        session = self.session
        return Ending(session.step, session.skipped, self.best, session.provenance)


class Follower:
    """Another process than the main one, in a run whose network all of them share: it runs what is measured, too."""

    def __init__(self, session: Session, start: Checkpoint | None) -> None:
        self.session = session
        self.evaluator = _evaluator(session)
        self.looked = 0 if start is None else step_within(start.state["looked"], start.step)

    def look(self, watch: Watch) -> None:
        """Run what the main process runs at the present step."""
        if (looking := _looking(self.session, self.looked)) is not None:
            _found(self.session, self.evaluator, looking, watch, lambda: None, lambda _: None)
            self.looked = self.session.step


@dataclass(frozen=True)
class _Looking:
    """What is due at a step."""

    measure: bool
    validate: bool
    last: bool


def _looking(session: Session, looked: int) -> _Looking | None:
    """What is due at the present step and has not been done; `None`: nothing."""
    settings, step = session.config.train, session.step
    last = step == settings.steps
    measure, validate = (last or _due(step, n) for n in (settings.measure_every, settings.validate_every))
    if step == 0 or looked == step or not (measure or validate):
        return None
    return _Looking(measure, validate, last)


def _found(
    session: Session,
    evaluator: Evaluator,
    looking: _Looking,
    watch: Watch,
    opened: Callable[[], Path | None],
    validated: Callable[[Validation], None],
) -> list[dict[str, Any]]:
    """The records of what is due at the present step.

    Args:
        session: the session of the run.
        evaluator: what measures.
        looking: what is due.
        watch: it is told what begins.
        opened: gives the folder for the grid of images, just before it is written; `None`: it is not.
        validated: is given every validation, while the network is still what was validated.
    """
    step, entries, measurement = session.step, [], None
    with session.averaged():
        if looking.measure:
            watch.doing(f"the measurement at step {step}")
            try:
                measurement = evaluator.measure()
            except InputError as error:  # a network that cannot be measured now is no reason to lose the run
                session.view.say(f"step {step}: not measured: {error}")
                entries.append({"step": step, "not_measured": str(error)})
            else:
                entries += [{"step": step, "measurement": measurement.to_json()}] if measurement else []
        if looking.validate:
            watch.doing(f"the validation at step {step}")
            validation = evaluator.validate(opened(), step)
            entries.append({"step": step, "validation": validation.record})
            validated(validation)
            if looking.last:
                watch.doing(f"the frontier of reward per nat at step {step}")
                seed_global(session.config.train.seed, "frontier")
                entries.append({"step": step, "frontier": reward_per_nat(evaluator, validation, measurement)})
    return entries


def _evaluator(session: Session) -> Evaluator:
    return Evaluator(
        session.config.train,
        session.base,
        session.backend,
        session.rewards,
        session.heldout,
        session.validation_prompts,
        set(session.training_prompts).isdisjoint(session.validation_prompts),
        session.device,
        session.processes if session.together else None,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
