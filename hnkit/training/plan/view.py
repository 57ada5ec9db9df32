"""A plan in words: what lives on the card, how long a step takes, and what makes it fit."""

from __future__ import annotations

from hnkit.internal.values import number_of
from hnkit.output.page import Cell, Table
from hnkit.training.plan.cards import GIB, RESERVED, SHARE
from hnkit.training.plan.plan import Need, Plan

_NAMES = {"network": "frozen network", "decoder": "autoencoder", "rewards": "reward models"}


def gib(size: float) -> str:
    """Bytes in GiB, two significant digits at least."""
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2g}"


def _unit(largest: int) -> tuple[str, int]:
    """The unit in which the largest of some sizes is a number of one digit or more before its point."""
    return next((pair for pair in (("GiB", GIB), ("MiB", 2**20)) if largest >= pair[1]), ("KiB", 2**10))


def memory_table(plan: Plan) -> Table:
    """What lives on one card when most does, part by part; the rows add up to the peak."""
    need, settings = plan.need, plan.config.train
    unit, scale = _unit(need.most)

    def shown(size: int) -> str:
        return gib(size * GIB / scale)

    rows: list[tuple[Cell, ...]] = [(_NAMES.get(name, name), shown(size)) for name, size in need.at_peak().items()]
    rows.append((f"peak, in {need.where}", shown(need.peak)))
    held = ", ".join(f"{name} {shown(size)}" for name, size in need.saved.items())
    pieces = settings.batch // plan.processes // need.micro
    whole = f"{number_of(need.micro, 'sample')} at a time"
    if pieces > 1:
        whole += f", {pieces} times for a step (train.accumulate)"
    caption = (
        f"The rows add up to the peak of a step, with {whole}. When the backward pass begins, the parts have saved: "
        f"{held}. While prompts are encoded, before the first step, {shown(need.encoding)} {unit} are taken; text "
        "encoders leave the card after that."
    )
    return Table(("on each card", unit), tuple(rows), caption)


def rate(need: Need) -> float:
    """Optimiser steps per hour."""
    return 3600 / need.seconds


def verdict(plan: Plan) -> str:
    """One sentence: whether the run fits its card."""
    need, card = plan.need, plan.card
    room = f"{gib(card.memory)} GiB of one {card.title}, of which {gib(RESERVED)} are kept free"
    unit, scale = _unit(need.most)
    size = f"{gib(need.most * GIB / scale)} {unit}"
    when = "" if need.peak >= need.encoding else " while prompts are encoded"
    if plan.fits:
        return f"It fits: {size}{when}, of the {room}."
    return f"It does not fit: {size} are needed{when}, of the {room}."


def pace(plan: Plan) -> str:
    """One sentence: operations and hours, and what they rest on."""
    need, steps = plan.need, plan.config.train.steps
    seconds, work = steps * need.seconds, need.flops / 1e12
    size = f"{work:,.0f}" if work >= 100 else f"{work:.3g}"
    cards = "the card" if plan.processes == 1 else f"each of {plan.processes} cards"
    units = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
    unit, word = next((pair for pair in units if seconds >= pair[0]), units[-1])
    return (
        f"A step is {size} TFLOP on {cards}: {rate(need):,.0f} steps per hour, {steps:,} steps in "
        f"{seconds / unit:,.1f} {word}, if {100 * SHARE:.0f} % of the most that the card can do is reached (an "
        "assumption, not a measurement; small batches reach less)."
    )


def cures(plan: Plan) -> list[str]:
    """What makes it fit, the quickest first; empty where it fits as it is."""
    if plan.fits:
        return []
    if not plan.cures and plan.least <= plan.need.encoding:
        return [
            f"Encoding the prompts takes {gib(plan.need.encoding)} GiB, text encoders beside the network, and no "
            "memory option lowers that: take a larger card."
        ]
    if not plan.cures:
        return [
            f"No memory option makes it fit (the least is {gib(plan.least)} GiB): lower backend.size or backend.rank, "
            "leave out a reward, or take a larger card."
        ]
    return [f"{_switched(plan, need)}: {gib(need.peak)} GiB, {rate(need):,.0f} steps per hour" for need in plan.cures]


def _switched(plan: Plan, need: Need) -> str:
    settings = plan.config.train
    words = [f"--set backend.{name}=true" for name in need.changes]
    accumulate = settings.batch // plan.processes // need.micro
    if accumulate != settings.accumulate:
        words.append(f"--set train.accumulate={accumulate}")
    return " ".join(words)


def as_text(plan: Plan) -> str:
    """The plan as plain lines."""
    table = memory_table(plan)
    width = max(len(str(row[0])) for row in table.rows)
    lines = [f"{row[0]!s:<{width}}  {row[1]!s:>8}" for row in table.rows]
    head = f"{plan.config.backend} on {plan.card.title}: counted, not measured"
    found = [head, "", f"{table.headers[0]:<{width}}  {table.headers[1]:>8}", *lines, "", table.caption, "", pace(plan)]
    found += [verdict(plan)]
    lines = cures(plan)
    if lines and plan.cures:
        found += ["What makes it fit, the quickest first:", *(f"  {line}" for line in lines)]
    else:
        found += lines
    return "\n".join(found)
