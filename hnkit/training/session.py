"""A loaded run that takes one step at a time, and knows no files.

A step is a pure function of the parameters, the optimiser's state, the seed and the step number, so a checkpoint of
the first two and a counter is all there is to resume from. Losses differentiate twice, so there is no DDP wrapper:
gradients are summed over processes with one flattened all-reduce per optimiser step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hnkit.backend import BackendBase, backend_factory, completed
from hnkit.config import RunConfig
from hnkit.errors import ExpansiveMapError, InputError, NonFiniteError
from hnkit.internal.seeds import seed_global
from hnkit.loss import NoiseLoss
from hnkit.maps import ConditionedMap
from hnkit.prompts import read_prompts, require_disjoint, split_prompts
from hnkit.rewards import load_rewards
from hnkit.training.checkpoint import Checkpoint
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
from hnkit.training.view import TrainView, loss_term, require_trackers


class Session:
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
        backend = completed(backend_factory(config.backend).load(config.options))
        self.base = backend
        if settings.objective == "direct":
            if backend.direct is None:
                raise InputError(f"train.objective = 'direct': backend {config.backend!r} has no direct fine-tuning")
            backend = completed(backend.direct())
        self.backend = backend
        if backend.max_steps is not None and settings.generator_steps > backend.max_steps:
            raise InputError(
                f"train.generator_steps = {settings.generator_steps}: backend {config.backend!r} takes 1 to "
                f"{backend.max_steps}"
            )
        require_trackers(settings.trackers)
        self.network: nn.Module = backend.hypernetwork
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError(f"backend {config.backend!r} has no trainable parameters: check its adapter options")
        self.device = next(iter(self.parameters.values())).device
        self.rewards = load_rewards(config.rewards, backend.default_reward, self.device)
        if not self.rewards.rewards:
            raise InputError(f"no reward given and backend {config.backend!r} has no default: use --reward NAME=WEIGHT")
        self.heldout = load_rewards(config.heldout, None, self.device)
        self.training_prompts, self.validation_prompts = _chosen_prompts(config, backend)
        backend.prepare([*self.training_prompts, *self.validation_prompts])
        self.stream = SampleStream(
            settings.seed,
            settings.batch,
            tuple(backend.noise_shape),
            backend.noise_dtype,
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
        term = loss_term(settings)
        record |= {"loss": means[0], **({term[0]: means[1]} if term else {}), "reward": means[2]}
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

        parts: dict[str, Tensor] = {}

        def generate(x: Tensor) -> Tensor:
            return self.backend.generate(x, condition, settings.generator_steps)

        def reward(outputs: Tensor) -> Tensor:
            scores = self.rewards.scores(outputs, batch.prompts)
            parts.update(scores.parts)
            return scores.total

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
        rows = [total, kl, scores, *parts.values()]
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
        advice = self.backend.memory_advice()
        more = f" ({advice})" if advice else ""
        return f"raise train.accumulate for smaller micro-batches, or lower train.batch{more}"


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors grouped by type, so that each group can be flattened; almost always one group."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _chosen_prompts(config: RunConfig, backend: BackendBase) -> tuple[list[str], list[str]]:
    """Training and validation prompts: from the configuration's sources, else the backend's own, else none needed.

    Where nothing can or shall be held out (one prompt, or a share of 0) the training prompts are validated on.
    """
    settings = config.train
    training, heldout = backend.prompts() if backend.prompts is not None else ([""], [""])
    if settings.prompts:
        training, heldout = read_prompts(settings.prompts), []
    if settings.validation_prompts:
        heldout = read_prompts(settings.validation_prompts)
        require_disjoint(training, heldout)
    if not training:
        raise InputError(f"no prompts given and backend {config.backend!r} has none of its own: use --prompts FILE")
    if not heldout and len(training) > 1 and settings.validation_share > 0:
        count = min(max(1, round(settings.validation_share * len(training))), len(training) - 1)
        training, heldout = split_prompts(training, count)
    return list(training), list(heldout or training)
