"""The one trainer: every backend, every loss, one process or many, resumable to the bit on the CPU.

A step is a pure function of the parameters, the optimiser's state, the seed and the step number, so a checkpoint of
the first two and a counter is all there is to resume from. Losses differentiate twice, so there is no DDP wrapper:
gradients are summed over processes with one flattened all-reduce per optimiser step.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import operator
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from hnkit.backend import Backend, Reward, backend_factory
from hnkit.config import CONFIG_FILE, RunConfig, differing_keys
from hnkit.errors import ExpansiveMapError, InputError, NonFiniteError
from hnkit.internal.files import atomic_write, new_run_folder
from hnkit.internal.seeds import seed_global
from hnkit.loss import NoiseLoss
from hnkit.maps import ConditionedMap
from hnkit.prompts import read_prompts, require_disjoint, split_prompts
from hnkit.rewards import load_rewards
from hnkit.training.checkpoint import Checkpoint, JsonLog, newest_checkpoint, run_lock, save_checkpoint, sweep
from hnkit.training.data import SampleStream
from hnkit.training.optimize import (
    WeightAverage,
    build_optimizer,
    learning_rate,
    load_optimizer,
    load_parameters,
    optimizer_tensors,
)
from hnkit.training.processes import Processes
from hnkit.training.report import finish_run, finished_report
from hnkit.training.validate import Evaluator
from hnkit.training.view import StopSignals, Trackers, TrainView, require_trackers

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
    view = TrainView(console or Console(stderr=True, highlight=False), quiet=False)
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
            session = _Session(config, processes, view)
        else:
            if out is not None and out.exists():
                raise InputError(f"--out {out} exists already and is never overwritten: name a new folder")
            session = _Session(config, processes, view)
            folder = processes.on_main(lambda: _create(stack, config, out))
            start = None
        try:
            return _run(session, folder, start, stop, stack)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            raise InputError(
                f"{error.filename or folder}: {error.strerror}; older checkpoints are intact: mend that and go on with "
                f"--resume {folder}"
            ) from error
        except torch.OutOfMemoryError as error:
            raise InputError(f"out of memory: {session.memory_advice()}; go on with --resume {folder}") from error


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


class _Session:
    """A loaded run: backend, rewards, data, parameters, optimiser. It knows how to take one step, and no files."""

    def __init__(self, config: RunConfig, processes: Processes, view: TrainView) -> None:
        self.config, self.processes, self.view = config, processes, view
        settings = config.train
        shards = processes.count * settings.accumulate
        if settings.batch % shards:
            raise InputError(
                f"train.batch = {settings.batch} over {processes.count} processes x train.accumulate = "
                f"{settings.accumulate} leaves a remainder: give a multiple of {shards}"
            )
        factory = backend_factory(config.backend)
        backend = factory.load(config.options)
        self.base: Backend = backend
        if settings.objective == "direct":
            direct = getattr(backend, "direct", None)
            if direct is None:
                raise InputError(f"train.objective = 'direct': backend {config.backend!r} has no direct fine-tuning")
            backend = direct()
        self.backend: Backend = backend
        most: int | None = getattr(backend, "max_steps", None)
        if most is not None and settings.generator_steps > most:
            raise InputError(
                f"train.generator_steps = {settings.generator_steps}: backend {config.backend!r} takes 1 to {most}"
            )
        require_trackers(settings.trackers)
        self.network: nn.Module = backend.hypernetwork
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError(f"backend {config.backend!r} has no trainable parameters: check its adapter options")
        self.device = next(iter(self.parameters.values())).device
        default: Reward | None = getattr(backend, "default_reward", None)
        self.rewards = load_rewards(config.rewards, default, self.device)
        if not self.rewards.rewards:
            raise InputError(f"no reward given and backend {config.backend!r} has no default: use --reward NAME=WEIGHT")
        self.heldout = load_rewards(config.heldout, None, self.device)
        self.training_prompts, self.validation_prompts = _prompts(config, backend)
        prepare = getattr(backend, "prepare", None)
        if prepare is not None:
            prepare([*self.training_prompts, *self.validation_prompts])
        self.stream = SampleStream(
            settings.seed,
            settings.batch,
            tuple(backend.noise_shape),
            getattr(backend, "noise_dtype", torch.float32),
            self.training_prompts,
            fixed=settings.noise == "fixed",
        )
        self.loss = NoiseLoss(kl=settings.kl, alpha=settings.alpha, reduction=settings.reduction)
        self.optimizer = build_optimizer(settings, list(self.parameters.values()))
        self.average = WeightAverage(self.parameters, settings.ema) if settings.ema else None
        self.step = self.skipped = self.skipped_in_row = 0
        self.last_problem = ""
        for group in _by_dtype(list(self.parameters.values())):
            processes.broadcast([parameter.data for parameter in group])

    @property
    def dim(self) -> int:
        """Noise dimension d."""
        return math.prod(self.backend.noise_shape)

    def take_step(self) -> dict[str, Any]:
        """One optimiser step on the next batch; returns what happened as a record of metrics.jsonl."""
        settings = self.config.train
        step = self.step
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._accumulate(step)
        rate = learning_rate(settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        bound = settings.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), bound))
        whole = math.isfinite(norm) and bool(torch.isfinite(sums).all())
        if whole:
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        self.skipped += not whole
        self.skipped_in_row = 0 if whole else self.skipped_in_row + 1
        self.step += 1
        means = (sums / settings.batch).tolist()
        record: dict[str, Any] = {"step": self.step, "epoch": self.stream.epoch(self.step)}
        record |= dict(zip(("loss", "kl", "reward"), means[:3], strict=True))
        if len(self.rewards.names) > 1:
            record["rewards"] = dict(zip(self.rewards.names, means[3:], strict=True))
        return record | {"grad_norm": norm, "lr": rate, "skipped": not whole}

    def _accumulate(self, step: int) -> Tensor:
        """Gradients of the mean loss over the whole batch, and the sums of its terms, both over all processes.

        A non-finite value anywhere makes both non-finite everywhere, so all processes skip the batch together.
        """
        settings = self.config.train
        here = settings.batch // self.processes.count
        micro = here // settings.accumulate
        first = self.processes.index * here
        sums = torch.zeros(3 + len(self.rewards.names), dtype=torch.float64)
        for start in range(first, first + here, micro):
            try:
                sums += self._micro_batch(step, start, start + micro)
            except (NonFiniteError, ExpansiveMapError) as error:  # no gradient here: the batch is skipped
                self.last_problem = str(error)
                sums += math.nan
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for group in _by_dtype(gradients):
            self.processes.sum(group)
        total = sums.to(self.device)
        self.processes.sum([total])
        return total.cpu()

    def _micro_batch(self, step: int, start: int, stop: int) -> Tensor:
        settings = self.config.train
        batch = self.stream.rows(step, start, stop)
        seed_global(settings.seed, "micro-batch", step, start)
        noise = batch.noise.to(self.device)
        condition = self.backend.encode(batch.prompts)

        def generate(x: Tensor) -> Tensor:
            return self.backend.generate(x, condition, settings.generator_steps)

        def reward(outputs: Tensor) -> Tensor:
            return self.rewards(outputs, batch.prompts)

        with self._precision():
            if settings.objective == "direct":
                scores = reward(generate(noise))
                total, kl = -scores / settings.alpha, torch.zeros_like(scores)
            else:
                f = ConditionedMap(self.network, condition)
                probes = self.stream.probe_generator(step, start)
                terms = self.loss(f, noise, generate, reward, generator=probes)
                total, kl, scores = terms.total, terms.kl, terms.reward
        torch.autograd.backward(total.sum() / settings.batch)
        rows = [total, kl, scores, *self.rewards.parts.values()]
        return torch.stack([row.detach().double().sum().cpu() for row in rows])

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.train.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network is what is measured and saved: the averaged weights, where there are any."""
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            yield

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on."""
        tensors: dict[str, Tensor] = {f"network/{name}": parameter for name, parameter in self.parameters.items()}
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in self.average.average.items()}
        moments, numbers = optimizer_tensors(self.optimizer)
        tensors |= {f"optimizer/{name}": value for name, value in moments.items()}
        state: dict[str, Any] = {"step": self.step, "skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        state |= {"optimizer": numbers, "config": self.config.to_dict(), "prompts": self._prompts_digest()}
        return tensors, state

    def _prompts_digest(self) -> str:
        lists = json.dumps([self.training_prompts, self.validation_prompts])
        return hashlib.sha256(lists.encode()).hexdigest()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint was written.

        Raises:
            InputError: the prompts are others than they were.
        """
        if checkpoint.state["prompts"] != self._prompts_digest():
            raise InputError("the prompts have changed since the checkpoint was written: restore them, or start anew")
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimizer": {}}
        for key, tensor in checkpoint.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        load_parameters(self.parameters, parts["network"])
        if self.average is not None:
            self.average.average = {name: value.to(self.device) for name, value in parts["average"].items()}
        load_optimizer(self.optimizer, parts["optimizer"], checkpoint.state["optimizer"])
        counts = ("step", "skipped", "skipped_in_row")
        self.step, self.skipped, self.skipped_in_row = (operator.index(checkpoint.state[name]) for name in counts)

    def memory_advice(self) -> str:
        """What reduces memory, of the options that this run has."""
        advice = getattr(self.backend, "memory_advice", None)
        more = f" ({advice()})" if advice is not None else ""
        return f"raise train.accumulate for smaller micro-batches, or lower train.batch{more}"


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors grouped by type, so that each group can be flattened; almost always one group."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _prompts(config: RunConfig, backend: Backend) -> tuple[list[str], list[str]]:
    """Training and held-out prompts: from the configuration's sources, else the backend's own, else none needed."""
    settings = config.train
    offered = getattr(backend, "prompts", None)
    training, heldout = offered() if offered is not None else ([""], [""])
    if settings.prompts:
        training, heldout = read_prompts(settings.prompts), []
    if settings.validation_prompts:
        heldout = read_prompts(settings.validation_prompts)
        require_disjoint(training, heldout)
    if not training:
        raise InputError(f"no prompts given and backend {config.backend!r} has none of its own: use --prompts FILE")
    if not heldout and len(training) > 1:
        count = min(max(1, round(settings.validation_share * len(training))), len(training) - 1)
        training, heldout = split_prompts(training, count)
    return list(training), list(heldout or training)


def _run(
    session: _Session, folder: Path, start: Checkpoint | None, stop: StopSignals, stack: contextlib.ExitStack
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
            view.say(f"stopped at step {session.step} after a checkpoint; go on with --resume {folder}")
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

    def __init__(self, session: _Session, folder: Path, start: Checkpoint | None, stack: contextlib.ExitStack) -> None:
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
