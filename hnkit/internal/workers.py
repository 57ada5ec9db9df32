"""Work that is shared out over the processes of one command: one of them, or as many as torchrun started.

Work is shared out by number: part i is the part of process i modulo their number, whatever has been done already, so
that all agree without a word. What a part is must not depend on how many processes there are.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from hnkit.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one; before they have met."""
    return os.environ.get("RANK", "0") == "0"


_LONGEST_WAIT = 10.0
"""Seconds that a process waits for the first one's line before it says its own: they load for as long, more or less."""


def tell_the_others(line: str) -> None:
    """Let the other processes of torchrun know with which line the first one ends; see `said_by_first`."""
    if (store := _store()) is not None:
        with contextlib.suppress(RuntimeError):
            store.set(_key(), line)


def said_by_first(line: str) -> bool:
    """Whether the first of torchrun's processes ends with this very line, so that one of them is to say it.

    They may not have met when bad input ends them, and what one of them is given, or finds, the others may not. They
    tell each other by the store that torchrun keeps for them; where there is none, each says its own.
    """
    if (store := _store()) is None:
        return False
    try:
        until = time.monotonic() + _LONGEST_WAIT
        while not (known := store.check([_key()])) and time.monotonic() < until:
            time.sleep(0.05)
        return bool(known and store.get(_key()) == line.encode())
    except RuntimeError:
        return False


def _store() -> Any:
    """The store that torchrun keeps for its processes; `None` where there is none, or it does not answer."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(*where, timeout=timedelta(seconds=_LONGEST_WAIT))
    except (RuntimeError, ImportError, LookupError, ValueError):
        return None


def _key() -> str:
    return f"hnkit: last line of attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


class Workers(Protocol):
    """The processes of a command.

    Attributes:
        count: how many there are.
        index: the number of this one, from 0; 0 is the main process, which writes what is of all of them.
    """

    count: int
    index: int

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the main process, once all have come here, and give its result to all."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, on all of them."""
        ...


class _Alone:
    """One process."""

    count, index = 1, 0

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What `work` returns."""
        return work()

    def gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]


ALONE: Workers = _Alone()


def all_made(items: Sequence[Item], workers: Workers, work: Callable[[Item], Result]) -> list[Result]:
    """What `work` makes of every item, in their order and on all processes, each of which makes its share.

    Raises:
        InputError: that of the first item that has one, on all processes.
    """
    mine: dict[int, Any] = {}
    for number, item in shared_out(items, workers):
        try:
            mine[number] = work(item)
        except InputError as error:
            if workers.count == 1:
                raise
            mine[number] = error
            break
    found = {number: made for parts in workers.gather(mine) for number, made in parts.items()}
    for number in sorted(found):
        if isinstance(found[number], InputError):
            found[number].everywhere = True
            raise found[number]
    return [found[number] for number in range(len(items))]


def shared_out(items: Sequence[Item], workers: Workers) -> list[tuple[int, Item]]:
    """The items of this process, each with its number among all."""
    return [(number, item) for number, item in enumerate(items) if number % workers.count == workers.index]
