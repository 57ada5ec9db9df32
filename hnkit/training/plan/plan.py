"""A plan of a training run: what it needs on a card, how long it takes there, and what makes it fit.

    P = weights + trained weights + gradients + optimiser state           what lives all the time
    peak = P + the largest, over the parts k of a step, of  sum of saved(j < k) + max(forward(k), backward(k))

Times are a share of the card's roofline: the sum over all operations of the longest of computing, moving and launching,
divided by `SHARE`. Nothing of it is measured.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hnkit.backend import backend_factory, completed
from hnkit.config import RunConfig
from hnkit.errors import InputError
from hnkit.internal.values import plain_record
from hnkit.training.plan.cards import RESERVED, SHARE, Card
from hnkit.training.plan.count import (
    DECODER,
    GENERATOR,
    PARTS,
    REWARDS,
    F,
    Optimizer,
    Part,
    count_generator,
    count_hypernetwork,
    count_optimizer,
    count_rewards,
)
from hnkit.training.plan.ledger import Work, stored
from hnkit.training.plan.rewards import heldout_skeletons, reward_skeletons
from hnkit.training.plan.skeleton import HasSkeleton, Skeleton

OPTIMIZER = "the optimiser's step"
Changes = tuple[str, ...]
"""Options that are switched on beside those of the configuration, by name."""


@dataclass(frozen=True)
class Need:
    """What one process needs for an optimiser step of some rows.

    Attributes:
        changes: options that are switched on for it.
        micro: rows of one micro-batch.
        weights: bytes that live all the time, by name.
        saved: bytes that each part has saved when the backward pass begins.
        peak: the most bytes that live at once.
        where: the part of the step in which they do.
        held: of the peak, bytes that the parts before that one have saved.
        gradients: of the peak, bytes of gradients that are certainly there: those of earlier micro-batches.
        flops: floating-point operations of the optimiser step.
        seconds: of the optimiser step, at `SHARE` of the card's roofline.
        encoding: bytes on the card while prompts are encoded, before the first step: what lives all the time by then,
            and the text encoders, which leave the card again.
    """

    changes: Changes
    micro: int
    weights: Mapping[str, int]
    saved: Mapping[str, int]
    peak: int
    where: str
    held: int
    gradients: int
    flops: int
    seconds: float
    encoding: int

    @property
    def most(self) -> int:
        """The most bytes that live at once, of a step and of the encoding before the first."""
        return max(self.peak, self.encoding)

    def fits(self, card: Card) -> bool:
        """Whether it fits the card, with `RESERVED` kept free."""
        return self.most + RESERVED <= card.memory

    def at_peak(self) -> dict[str, int]:
        """What lives at the peak, by name, in bytes; it adds up to `peak`."""
        part = self.where.partition(",")[0]
        found = {name: size for name, size in self.weights.items() if size and name != "gradients"}
        if self.gradients:
            found["gradients"] = self.gradients
        for name, size in self.saved.items():
            if name == part:
                break
            if self.held:
                found[f"saved by {name}"] = size
        rest = self.peak - sum(found.values())
        return found | {f"{self.where}: saved and working" if self.held or part in PARTS else "working": rest}


@dataclass(frozen=True)
class Plan:
    """What a configured run needs on a card.

    Attributes:
        config: the run.
        card: the card.
        processes: as many cards.
        need: what each needs as configured.
        cures: what else fits, the quickest first; empty where `need` fits.
        least: the least that any of the options tried needs, in bytes.
    """

    config: RunConfig
    card: Card
    processes: int
    need: Need
    cures: tuple[Need, ...]
    least: int

    @property
    def fits(self) -> bool:
        """Whether the run fits the card as configured."""
        return self.need.fits(self.card)


def plan_training(config: RunConfig, card: Card, *, processes: int = 1, counter: Counter | None = None) -> Plan:
    """Count a step of a configured run on tensors without values, and see whether it fits a card.

    Args:
        config: the run, as `hnkit train` takes it.
        card: the card of each process.
        processes: how many processes share a step's batch.
        counter: one that has counted this run's parts for another card; `None`: a new one.

    Raises:
        InputError: the batch does not divide, the model's sizes are not known, or the counter cannot follow.
    """
    settings = config.train
    if settings.kl != "l2" and settings.objective != "direct":
        raise InputError(
            f"no plan for train.kl = {settings.kl!r}: how often it differentiates depends on the values of f; plan "
            "with --kl l2, which is the least that any kl needs"
        )
    shards = processes * settings.accumulate
    if settings.batch % shards:
        raise InputError(
            f"train.batch = {settings.batch} over {processes} processes x train.accumulate = {settings.accumulate} "
            f"leaves a remainder: give a multiple of {shards}"
        )
    counter = counter or Counter(config, processes)
    need = counter.need((), settings.batch // shards, card)
    found = [] if need.fits(card) else _tried(counter, card)
    least = min(other.most for other in (need, *found))
    return Plan(config, card, processes, need, tuple(_quickest(found, card)), least)


class Counter:
    """Counts parts when they are asked for, each once for one row, and puts steps together."""

    def __init__(self, config: RunConfig, processes: int = 1, *, factory: Any = None) -> None:
        self.config, self.processes = config, processes
        self.factory: Any = backend_factory(config.backend) if factory is None else factory
        self.savers: dict[str, str] = dict(self.factory.savers) if isinstance(self.factory, HasSkeleton) else {}
        self._skeletons: dict[Changes, Skeleton] = {}
        self._parts: dict[tuple[str, Changes, int], Part] = {}
        base = self.skeleton(())
        self._rewards = reward_skeletons(config, base)
        self._heldout = heldout_skeletons(config, base)
        self._trained = [p for p in base.backend.hypernetwork.parameters() if p.requires_grad]
        self.optimizer: Optimizer = count_optimizer(self._trained, config.train)
        self._shape: tuple[int, ...] = ()

    def skeleton(self, changes: Changes) -> Skeleton:
        """The backend without weights, with these options switched on."""
        if changes not in self._skeletons:
            options = replace(self.config.options, **dict.fromkeys(changes, True)) if changes else self.config.options
            objective = self.config.train.objective
            if isinstance(self.factory, HasSkeleton):
                self._skeletons[changes] = self.factory.skeleton(options, objective)
            else:
                backend = completed(self.factory.load(options))
                if objective == "direct" and backend.direct is None:
                    raise InputError(f"backend {self.config.backend!r} has no direct fine-tuning: leave objective out")
                trained = backend.direct() if objective == "direct" and backend.direct is not None else backend
                self._skeletons[changes] = Skeleton(completed(trained))
        return self._skeletons[changes]

    def unused(self) -> list[str]:
        """The memory options that the configuration leaves off."""
        options = self.config.options
        return [name for name in self.savers if not getattr(options, name) and self.savers[name] in self.order()]

    def order(self) -> tuple[str, ...]:
        """The parts of a step in the order of the forward pass."""
        skeleton = self.skeleton(())
        absent = {F} if self.config.train.objective == "direct" else set()
        absent |= {DECODER} if skeleton.decode is None else set()
        return tuple(name for name in PARTS if name not in absent)

    def part(self, name: str, changes: Changes, rows: int = 1) -> Part:
        """One part for so many rows, with those of the changes that concern it."""
        mine = tuple(change for change in changes if self.savers[change] == name)
        if (name, mine, rows) not in self._parts:
            self._count(name, mine, rows)
        return self._parts[name, mine, rows]

    def _count(self, name: str, mine: Changes, rows: int) -> None:
        if name == REWARDS:
            if not self._shape:
                self.part(GENERATOR, ())
            part = count_rewards(self.skeleton(()), self._rewards, rows, self._shape)
            self._parts[name, mine, rows] = part
        elif name == F:
            with self._switched(mine) as skeleton:
                self._parts[name, mine, rows] = count_hypernetwork(skeleton, rows)
        else:
            # generator and decoder are counted in one pass, each by itself: with all that either can switch on, too
            both = [change for change in self.unused() if mine and self.savers[change] not in (F, REWARDS)]
            on = tuple(change for change in both if self.savers[change] != name or change in mine)
            with self._switched(on) as skeleton:
                parts, self._shape = count_generator(skeleton, rows, self.config.train.generator_steps)
            for found, part in parts.items():
                self._parts[found, tuple(change for change in on if self.savers[change] == found), rows] = part

    @contextlib.contextmanager
    def _switched(self, changes: Changes) -> Iterator[Skeleton]:
        """The skeleton with these options switched on, for as long as it is entered."""
        base = self.skeleton(())
        if changes and base.switched is not None:
            with base.switched(changes):
                yield base
        else:
            yield self.skeleton(changes)

    def _has_more_than_rows(self, name: str, changes: Changes) -> bool:
        """Whether a part holds more than so much for each row.

        Rows that are decoded one after the other do not add up; and what computes LoRA in the network's type keeps a
        copy of its weights in that type, once for all rows.
        """
        options = self.config.options
        if name == DECODER:
            return bool(getattr(options, "vae_slicing", False))
        return name == F and ("lora_autocast" in changes or bool(getattr(options, "lora_autocast", False)))

    @functools.cached_property
    def weights(self) -> Mapping[str, int]:
        """Bytes that live from step to step, by name, whichever options are switched on."""
        skeleton, settings = self.skeleton(()), self.config.train
        lora = stored(self._trained)
        trained = {id(parameter) for parameter in self._trained}
        seen: set[int] = set()
        found: dict[str, int] = {}
        modules = {**skeleton.frozen, "hypernetwork": skeleton.backend.hypernetwork}
        for name, rewards in {"rewards": self._rewards.rewards, "held-out rewards": self._heldout}.items():
            kept = (r for r in rewards if isinstance(r, nn.Module) and not getattr(r, "off_card", False))
            modules[name] = nn.ModuleList(kept)
        for name, module in modules.items():
            tensors = {id(t): t for t in (*module.parameters(), *module.buffers()) if id(t) not in trained | seen}
            seen |= set(tensors)
            found[name] = stored(tensors.values())
        found["network"] = found.get("network", 0) + found.pop("hypernetwork")
        if skeleton.whole and self.processes > 1:
            found["network"] = -(-found["network"] // self.processes)
            found["whole blocks"] = skeleton.whole
        ema = {"averaged weights": lora} if settings.ema else {}
        return found | {"LoRA": lora, "gradients": lora, "optimiser": self.optimizer.state} | ema

    def need(self, changes: Changes, micro: int, card: Card) -> Need:
        """What one process needs with these options at micro-batches of this size."""
        weights = self.weights
        gradients = weights["gradients"]
        order = self.order()
        trained = F if F in order else "generator"
        parts = {name: self.part(name, changes).scaled(micro, gradients if name == trained else 0) for name in order}
        if micro > 1:  # what does not grow with the rows is told apart by counting two of them
            for name in (name for name in parts if self._has_more_than_rows(name, changes)):
                parts[name] = self.part(name, changes).rows(self.part(name, changes, 2), micro)
        rounds = self.config.train.batch // self.processes // micro
        always = sum(weights.values()) - gradients
        # with several micro-batches the gradients are there from the first on
        standing = gradients if rounds > 1 else 0
        peaks: list[tuple[int, str, int]] = [(always + gradients + self.optimizer.working, OPTIMIZER, 0)]
        before = 0
        for name in order:
            part = parts[name]
            own = gradients if name == trained and not standing else 0
            peaks.append((always + standing + before + part.forward, f"{name}, forward", before))
            back = part.backward - (gradients - own if name == trained else 0)
            peaks.append((always + standing + before + back, f"{name}, backward", before))
            before += part.saved
        peak, where, held = max(peaks)
        work = sum((part.forward_work + part.backward_work for part in parts.values()), Work())
        seconds = rounds * work.seconds(card, micro) + self.optimizer.work.seconds(card)
        saved = {name: part.saved for name, part in parts.items()}
        flops = self.config.train.batch // self.processes * work.flops
        there = gradients if where == OPTIMIZER else standing
        # prompts are encoded when network, twin and rewards are loaded, and before there is an optimiser
        loaded = sum(weights.get(name, 0) for name in ("network", "decoder", "rewards", "held-out rewards", "LoRA"))
        encoding = loaded + self.skeleton(()).encoders
        return Need(changes, micro, weights, saved, peak, where, held, there, flops, seconds / SHARE, encoding)


def _tried(counter: Counter, card: Card) -> list[Need]:
    """Choices of the unused options, each at the largest micro-batch that fits, or at 1.

    Options cost recomputation and smaller micro-batches next to nothing: where those alone make it fit, no more is
    tried.
    """
    settings = counter.config.train
    here = settings.batch // counter.processes
    sizes = [size for size in range(1, here // settings.accumulate + 1) if here % size == 0]
    found: list[Need] = []
    unused = counter.unused()
    for changes in itertools.chain.from_iterable(itertools.combinations(unused, n) for n in range(len(unused) + 1)):
        needs = [counter.need(changes, size, card) for size in sizes]
        found.append(next((need for need in reversed(needs) if need.fits(card)), needs[0]))
        if not changes and found[0].fits(card):
            break
    return found


def _quickest(tried: Sequence[Need], card: Card, most: int = 3) -> list[Need]:
    """Those that fit, the quickest first, without those that only switch on more than a quicker one does."""
    chosen: list[Need] = []
    # micro-batches of another size do the same operations: a thousandth more is as quick, and then fewer options win
    for need in sorted(tried, key=lambda need: (round(1e3 * math.log(need.seconds)), len(need.changes))):
        if need.fits(card) and not any(set(other.changes) <= set(need.changes) for other in chosen):
            chosen.append(need)
    return chosen[:most]


def as_document(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON document."""
    return {
        "config": plan.config.to_dict(),
        "card": plain_record(plan.card),
        "processes": plan.processes,
        "share_of_roofline": SHARE,
        "reserved": RESERVED,
        "fits": plan.fits,
        "need": _need_document(plan.need),
        "least": plan.least,
        "cures": [_need_document(need) for need in plan.cures],
    }


def _need_document(need: Need) -> dict[str, Any]:
    return {
        "changes": list(need.changes),
        "micro_batch": need.micro,
        "weights": dict(need.weights),
        "saved": dict(need.saved),
        "peak": need.peak,
        "encoding": need.encoding,
        "where": need.where,
        "at_peak": need.at_peak(),
        "flops_per_step": need.flops,
        "seconds_per_step": need.seconds,
        "steps_per_hour": 3600 / need.seconds if need.seconds else None,
    }
