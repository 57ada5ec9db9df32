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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hnkit.adapters import load_backend
from hnkit.backend import BackendBase, backend_factory, completed
from hnkit.config import RunConfig
from hnkit.errors import ExpansiveMapError, InputError, NonFiniteError
from hnkit.injection import Generators
from hnkit.internal.files import file_digest
from hnkit.internal.folders import adapter_files, adapter_folder
from hnkit.internal.seeds import seed_global
from hnkit.internal.values import shown
from hnkit.internal.versions import code_digest
from hnkit.loss import NoiseLoss
from hnkit.maps import ConditionedMap
from hnkit.prompts import read_prompts, require_disjoint, split_prompts
from hnkit.rewards import load_rewards, score
from hnkit.training.checkpoint import Checkpoint
from hnkit.training.data import SampleStream
from hnkit.training.optimize import (
    WeightAverage,
    bounded_rows,
    build_optimizer,
    learning_rate,
    load_optimizer,
    load_parameters,
    optimizer_tensors,
)
from hnkit.training.processes import Processes
from hnkit.training.view import TrainView, loss_term, require_trackers

_COUNTS = ("step", "skipped", "skipped_in_row", "moved")
_REHEARSED = 2
"""Base outputs that every reward is tried on."""


class Session:
    """A loaded run: backend, rewards, data, parameters, optimiser. It knows how to take one step, and no files.

    Attributes:
        step: optimiser steps done.
        skipped: batches skipped because the loss or its gradient was not finite.
        skipped_in_row: how many of these were the last ones, in a row.
        moved: steps whose gradient was finite and not zero, and that of the reward too.
        whole: false while an optimiser step is under way, and after one that raised.
        provenance: digests of the code, the model, the prompts and the adapter that it started from.
        together: whether the network is shared out over the processes, all of which then have to run it as often.
    """

    def __init__(self, config: RunConfig, processes: Processes, view: TrainView) -> None:
        self.config, self.processes, self.view = config, processes, view
        settings = config.train
        shards = processes.count * settings.accumulate
        if settings.batch % shards:
            raise InputError(
                f"train.batch = {settings.batch} over {processes.count} processes x train.accumulate = "
                f"{settings.accumulate} leaves a remainder: give a multiple of {shards}"
            )
        backend = load_backend(backend_factory(config.backend), config.options)
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
        self._started_from: dict[str, str] | None = None
        if settings.from_adapter:
            start = adapter_folder(settings.from_adapter)
            if not start.is_dir():
                raise InputError(
                    f"train.from_adapter {settings.from_adapter}: the adapter that the run started from is not there: "
                    "restore it, or say with --from-adapter where it is"
                )
            self._started_from = {path.name: file_digest(path) for path in adapter_files(start)}
            backend.load_adapter(start)
        self._require_one_derivative()
        self.together = self._shared_out()
        require_trackers(settings.trackers)
        self.network: nn.Module = backend.hypernetwork
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError(f"backend {config.backend!r} has no trainable parameters: check its adapter options")
        self.device = next(iter(self.parameters.values())).device
        local: bool = getattr(config.options, "local_files_only", True)
        self.rewards = load_rewards(config.rewards, backend.default_reward, self.device, local_files_only=local)
        if not self.rewards.rewards:
            raise InputError(
                f"no reward given and backend {config.backend!r} has no default: use --reward NAME=WEIGHT "
                "(hnkit backends lists names), or my_module:function=WEIGHT for one of yours"
            )
        self.heldout = load_rewards(config.heldout, None, self.device, local_files_only=local)
        self.training_prompts, self.validation_prompts = _chosen_prompts(config, backend)
        backend.prepare([*self.training_prompts, *self.validation_prompts])
        self.stream = SampleStream(
            settings.seed,
            settings.batch,
            tuple(backend.noise_shape),
            backend.noise_dtype,
            self.training_prompts,
            settings.noise,
        )
        if settings.injection and not backend.records_injection:
            raise InputError(
                f"train.injection = {settings.injection:g}: adapters of backend {config.backend!r} do not record "
                "injected noise, and would be used without it: leave it out"
            )
        backend.injection = settings.deployment
        self.loss = NoiseLoss(
            kl=settings.kl,
            alpha=settings.alpha,
            reduction=settings.reduction,
            injection=settings.deployment,
            draws=settings.draws,
            reward_gradient=settings.reward_gradient,
        )
        self.optimizer = build_optimizer(settings, list(self.parameters.values()))
        self.average = WeightAverage(self.parameters, settings.ema) if settings.ema else None
        self.step = self.skipped = self.skipped_in_row = self.moved = 0
        self.whole = True
        self._last_problem, self._norm = "", math.nan
        self.provenance = self._provenance()
        for group in _by_dtype(list(self.parameters.values())):
            processes.broadcast([parameter.data for parameter in group])

    def _require_one_derivative(self) -> None:
        compiled, kl = getattr(self.config.options, "compile", "no"), self.config.train.kl
        if compiled != "no" and kl != "l2" and self.config.train.objective == "hypernoise":
            raise InputError(
                f"train.kl = {kl!r} with backend.compile = {compiled!r}: compiled code is differentiated only once: "
                "use l2, or backend.compile = no"
            )

    def _shared_out(self) -> bool:
        if self.processes.count == 1:
            if getattr(self.config.options, "shard", False):
                self.view.say("backend.shard: there is one process, which holds the whole network")
            return False
        if not self.backend.share_out():
            return False
        if (kl := self.config.train.kl) != "l2":
            raise InputError(
                f"train.kl = {kl!r} with backend.shard: it may need more passes of f in one process than in another, "
                "which would wait for ever: use l2, or backend.shard = false"
            )
        return True

    @property
    def dim(self) -> int:
        """Noise dimension d."""
        return math.prod(self.backend.noise_shape)

    def rehearse(self) -> None:
        """Try every reward once on a few base outputs, held-out ones too, before anything is trained.

        Raises:
            InputError: a reward raises, returns something else than `(n,)`, or is trained on and passes no gradient to
                the images, so that it would train nothing, alone or hidden in a sum.
        """
        settings = self.config.train
        rows = self.stream.rows(0, 0, min(_REHEARSED, settings.batch))
        seed_global(settings.seed, "rehearsal")
        with torch.no_grad():
            condition = self.base.encode(rows.prompts).of_images(settings.seed, rows.images)
            images = self.base.generate(rows.noise.to(self.device), condition, settings.generator_steps)
        for reward in self.rewards.rewards:
            if reward.weight == 0:
                continue
            if settings.reward_gradient == "score-function":
                score(reward, images, rows.prompts)
                continue
            leaf = images.detach().clone().requires_grad_()
            with torch.enable_grad(), self._precision():
                total = score(reward, leaf, rows.prompts).sum()
            gradient = None
            if total.requires_grad:
                (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
            if gradient is None:
                raise InputError(
                    f"reward {reward.name!r} passes no gradient to the images (it is constant, or computed under "
                    "no_grad, with integers or outside torch): it would train nothing; train it from its values alone "
                    "with --set train.reward_gradient=score-function --set train.injection=0.5 --set train.draws=4, or "
                    "report it with --heldout"
                )
            if not bool(gradient.any()):
                self.view.say(
                    f"reward {reward.name!r} has the gradient zero at all of {len(images)} base outputs: if it is flat "
                    "everywhere, it trains nothing"
                )
        with torch.no_grad():
            for reward in self.heldout.rewards:
                score(reward, images, rows.prompts)
            if self.base.judge is not None:
                self.base.judge(images.clone(), rows.prompts)

    def gradients(self) -> Tensor:
        """Leave the gradient of the next step's loss in the parameters, clipped; returns the sums of its terms.

        It changes nothing that a checkpoint holds, and may be given up at any moment.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._accumulate(self.step)
        bound = self.config.train.clip or math.inf
        self._norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), bound))
        return sums

    def update(self, sums: Tensor) -> dict[str, Any]:
        """Take the step whose gradient `gradients` has left; returns what happened as a record of metrics.jsonl."""
        settings, norm = self.config.train, self._norm
        rate = learning_rate(settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        finite = math.isfinite(norm) and bool(torch.isfinite(sums).all())
        self.whole = False
        if finite:
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        self.moved += finite and norm > 0 and float(sums[-1]) > 0
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        self.step += 1
        self.whole = True
        means = (sums / settings.batch).tolist()
        record: dict[str, Any] = {"step": self.step, "epoch": self.stream.epoch(self.step)}
        term = loss_term(settings)
        record |= {"loss": means[0], **({term[0]: means[1]} if term else {}), "reward": means[2]}
        if len(self.rewards.names) > 1:
            record["rewards"] = dict(zip(self.rewards.names, means[3:-1], strict=True))
        return record | {"grad_norm": norm, "lr": rate, "skipped": not finite}

    def _accumulate(self, step: int) -> Tensor:
        """Gradients of the mean loss over the whole batch, and the sums of its terms, both over all processes.

        The last of the sums counts micro-batches in which the reward has a gradient that is not zero.

        A non-finite value anywhere makes both non-finite everywhere, so all processes skip the batch together.
        """
        settings = self.config.train
        here = settings.batch // self.processes.count
        micro = here // settings.accumulate
        first = self.processes.index * here
        sums = torch.zeros(4 + len(self.rewards.names), dtype=torch.float64)
        for start in range(first, first + here, micro):
            try:
                sums += self._micro_batch(step, start, start + micro)
            except (NonFiniteError, ExpansiveMapError) as error:  # no gradient here: the batch is skipped
                self._last_problem = str(error)
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
        condition = self.backend.encode(batch.prompts).of_images(settings.seed, batch.images)

        parts: dict[str, Tensor] = {}

        def generate(x: Tensor) -> Tensor:
            if settings.reward_clip:  # what arrives is the gradient of -r / (alpha batch)
                x = bounded_rows(x, settings.reward_clip / (settings.alpha * settings.batch))
            return self.backend.generate(x, condition, settings.generator_steps)

        reached: list[Tensor] = [] if settings.reward_gradient == "pathwise" else [torch.ones(())]

        def reward(outputs: Tensor) -> Tensor:
            scores = self.rewards.scores(outputs, batch.prompts)
            if outputs.requires_grad:
                note = lambda gradient: reached.append(gradient.detach().ne(0).any())  # noqa: E731
                outputs.register_hook(note)  # type: ignore[no-untyped-call]
            for name, part in scores.parts.items():  # one call for each draw of injected noise
                parts[name] = parts.get(name, 0) + part / settings.draws
            if outputs.requires_grad and not scores.total.requires_grad:
                # constant on this batch alone, as of a detector that finds nothing: the rehearsal has seen a gradient
                return scores.total + 0 * outputs.flatten(1).sum(1).to(scores.total.dtype)
            return scores.total

        with self._precision():
            if settings.objective == "direct":
                scores = reward(generate(noise))
                total, kl = -scores / settings.alpha, torch.zeros_like(scores)
            else:
                f = ConditionedMap(self.network, condition)
                draws: Generators = (
                    self.stream.injection_generators(step, start, stop)
                    if settings.injection
                    else self.stream.probe_generator(step, start)
                )
                terms = self.loss(f, noise, generate, reward, generator=draws)
                total, kl, scores = terms.total, terms.kl, terms.reward
        if not scores.requires_grad:
            raise InputError(
                f"no gradient of the reward reaches the network: the outputs of backend {self.config.backend!r} do not "
                "depend on their noise in a differentiable way"
            )
        torch.autograd.backward(total.sum() / settings.batch)
        rows = [total, kl, scores, *parts.values(), torch.stack(reached).any() if reached else torch.zeros(())]
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
        state: dict[str, Any] = {name: vars(self)[name] for name in _COUNTS}
        state |= {"optimizer": numbers, "config": self.config.to_dict(), "prompts": self.prompts_digest()}
        return tensors, state | {"provenance": self.provenance}

    def prompts_digest(self) -> str:
        """SHA-256 of the training and held-out prompts, in their order."""
        lists = json.dumps([self.training_prompts, self.validation_prompts])
        return hashlib.sha256(lists.encode()).hexdigest()

    def _provenance(self) -> dict[str, Any]:
        made_from = {"code": code_digest(), "model": self.base.model_digest(), "prompts": self.prompts_digest()}
        return made_from | ({"from_adapter": self._started_from} if self._started_from else {})

    @property
    def problem(self) -> str:
        """Why the last batch was skipped, in parentheses, where that is known."""
        return f" ({self._last_problem})" if self._last_problem else ""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint was written.

        Raises:
            InputError: the prompts, the base model or the adapter that it started from are others than they were.
        """
        if checkpoint.state["prompts"] != self.prompts_digest():
            raise InputError("the prompts have changed since the checkpoint was written: restore them, or start anew")
        before, now = checkpoint.state["provenance"], self.provenance
        require_same_model(checkpoint.state, self.config, now["model"])
        if before.get("from_adapter") != now.get("from_adapter"):
            raise InputError(
                f"train.from_adapter {self.config.train.from_adapter} is not the adapter that the run started from: "
                "restore it, or start anew"
            )
        if before["code"] != now["code"]:
            self.view.say("the code of hnkit has changed since the checkpoint was written")
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimizer": {}}
        for key, tensor in checkpoint.tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        load_parameters(self.parameters, parts["network"])
        if self.average is not None:
            self.average.average = {name: value.to(self.device) for name, value in parts["average"].items()}
        load_optimizer(self.optimizer, parts["optimizer"], checkpoint.state["optimizer"])
        for name in _COUNTS:
            setattr(self, name, step_within(checkpoint.state[name], checkpoint.step))

    def diverged(self) -> str:
        """The first parameter that is not finite, in itself or its average; empty: all are."""
        average = {} if self.average is None else self.average.average
        values = [*self.parameters.items(), *((f"the average of {name}", value) for name, value in average.items())]
        return next((name for name, value in values if not bool(torch.isfinite(value).all())), "")

    def memory_advice(self) -> str:
        """What reduces memory, of the options that this run has."""
        advice = self.backend.memory_advice()
        more = f" ({advice})" if advice else ""
        return f"raise train.accumulate for smaller micro-batches, or lower train.batch{more}"


def step_within(value: Any, most: int) -> int:
    """A number of steps that a checkpoint tells, of so many that were done.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 0, or more.
    """
    steps = operator.index(value)
    if not 0 <= steps <= most:
        raise ValueError(f"it tells of {shown(steps)} steps, of {shown(most)}")
    return steps


def require_same_model(state: Mapping[str, Any], config: RunConfig, digest: str | None) -> None:
    """Refuse another base model than that of a checkpoint: by its weights where they are known, else by its name.

    A model folder may have been moved: the last part of its path is its name, and that of a model on the hub.

    Args:
        state: the state of the checkpoint.
        config: the configuration it is gone on with.
        digest: SHA-256 of the weights that it has loaded, if that is known.

    Raises:
        InputError: it is another model.
    """
    before = state["provenance"]["model"]
    was, asked = (str(tables["backend"].get("model_id", "")) for tables in (state["config"], config.to_dict()))
    if before is not None and digest is not None:
        if before != digest:
            raise InputError(
                f"the base model is not the one of the checkpoint: {asked or 'the backend'!r} has SHA-256 "
                f"{digest[:12]}..., and {was or 'the backend'!r} had {before[:12]}... then: restore it, or start anew"
            )
    elif Path(was).name != Path(asked).name:
        raise InputError(
            f"the base model is {asked!r}, and that of the checkpoint {was!r}: a model that has been moved keeps its "
            "name; restore it, or start anew"
        )


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
    local: bool = getattr(config.options, "local_files_only", True)
    training, heldout = backend.prompts() if backend.prompts is not None else ([""], [""])
    if settings.prompts:
        training, heldout = read_prompts(settings.prompts, local_files_only=local), []
    if settings.validation_prompts:
        heldout = read_prompts(settings.validation_prompts, local_files_only=local)
        require_disjoint(training, heldout)
    if not training:
        raise InputError(f"no prompts given and backend {config.backend!r} has none of its own: use --prompts FILE")
    if not heldout and len(training) > 1 and settings.validation_share > 0:
        count = min(max(1, round(settings.validation_share * len(training))), len(training) - 1)
        training, heldout = split_prompts(training, count)
    return list(training), list(heldout or training)
