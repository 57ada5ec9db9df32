"""What `encode_prompt` returns, as tensors whose first dimension is the row, and back.

Pipelines return tuples of tensors, lists of one tensor a prompt, masks, `None`, positions without rows. Which is which,
where the rows are and what is as long as the prompt is found by encoding a short and a long prompt, alone and together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hnkit.errors import InputError

SHORT, LONG = "a", "a red fox that runs over the hill"
Encode = Callable[[Sequence[str]], Sequence[Any]]
"""Prompts to what `encode_prompt` returned, call by call."""


@dataclass(frozen=True)
class Leaf:
    """One value in what `encode_prompt` returned.

    Attributes:
        name: its key among the tensors of a condition.
        kind: `rows`: a tensor with a dimension of rows; `list`: one tensor a row; `shared`: a tensor without rows that
            is as long as the longest prompt; `mask`: zeros and ones that follow from the lengths; `fixed`: always the
            same.
        row: the dimension of the rows.
        length: the dimension that is as long as the prompt; `None`: its length never changes.
        value: of a fixed one.
        optional: a mask that is `None` where it would hold ones alone.
    """

    name: str
    kind: Literal["rows", "list", "shared", "mask", "fixed"]
    row: int = 0
    length: int | None = None
    value: Any = None
    optional: bool = False


@dataclass(frozen=True)
class TextLayout:
    """How a pipeline's encoded texts are taken apart into rows, and put together again.

    Attributes:
        template: what was returned, call by call, with a `Leaf` for every value.
        ragged: some value is as long as its prompt: prompts are encoded one by one, as in a call of their own.
        padded: rows of different lengths can share a batch, since a mask tells them apart.
    """

    template: Sequence[Any]
    ragged: bool
    padded: bool

    def rows(self, texts: Sequence[Any], count: int) -> dict[str, Tensor]:
        """The tensors of `count` prompts, rows first and, where they have a length, the length second."""
        found: dict[str, Tensor] = {}
        for leaf, value in _pairs(self.template, texts):
            if leaf.kind == "rows":
                found[leaf.name] = value.movedim(leaf.row, 0)
                if leaf.length is not None:
                    found[leaf.name] = _length_second(leaf, value)
            elif leaf.kind == "shared":
                found[leaf.name] = value.movedim(leaf.length, 0).unsqueeze(0).expand(count, *value.shape)
            elif leaf.kind == "list":
                found[leaf.name] = torch.nn.utils.rnn.pad_sequence(list(value), batch_first=True)
                lengths = [len(row) for row in value]
                found[_lengths(leaf)] = torch.tensor(lengths)
            if leaf.kind in ("rows", "shared") and leaf.length is not None:
                found[_lengths(leaf)] = torch.full((count,), found[leaf.name].shape[1])
        return found

    def texts(self, tensors: Mapping[str, Tensor], device: torch.device) -> list[Any]:
        """What `encode_prompt` returned for the rows of a condition: the inverse of `rows`."""

        def value_of(leaf: Leaf) -> Any:
            if leaf.kind == "fixed":
                return leaf.value.to(device) if isinstance(leaf.value, Tensor) else leaf.value
            if leaf.kind == "mask":
                call = leaf.name.partition(".")[0]
                lengths = next(value for key, value in tensors.items() if _is_length(key) and key.startswith(call))
                size = int(lengths.max())
                mask = torch.arange(size, device=device)[None] < lengths.to(device)[:, None]
                return None if leaf.optional and bool(mask.all()) else mask.to(leaf.value)
            value, mine = tensors[leaf.name], tensors.get(_lengths(leaf))
            if leaf.kind == "list":
                return [row[: int(size)] for row, size in zip(value, mine, strict=True)]  # type: ignore[arg-type]
            if mine is not None:
                value = value[:, : int(mine.max())]
            if leaf.kind == "shared":
                return value[0 if mine is None else int(mine.argmax())].movedim(0, leaf.length or 0)
            if leaf.length is not None:
                return _length_back(leaf, value)
            return value.movedim(0, leaf.row)

        return [_mapped(entry, value_of) for entry in self.template]

    def groups(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Indices of rows that can share a batch: all of them, or where nothing tells lengths apart those of each."""
        count = len(next(iter(tensors.values())))
        if self.padded or not self.ragged:
            return [torch.arange(count)]
        lengths = torch.stack([value.cpu() for key, value in sorted(tensors.items()) if _is_length(key)], 1)
        _, group = torch.unique(lengths, dim=0, return_inverse=True)
        return [torch.nonzero(group == number).flatten() for number in range(int(group.max()) + 1)]


_LENGTH = ".length"


def find_text_layout(encode: Encode, names: Sequence[str] = ()) -> TextLayout:
    """Find how a pipeline's encoded texts are laid out, from four calls of it.

    Args:
        encode: prompts to what `encode_prompt` returned, call by call.
        names: names for the values of the first call, in order.

    Raises:
        InputError: something that depends on the prompts is neither a tensor with rows nor a list of tensors.
    """
    seen = [encode(prompts) for prompts in ([SHORT, LONG], [SHORT, LONG, SHORT], [SHORT], [LONG])]
    template = []
    for number, values in enumerate(zip(*seen, strict=True)):
        named = dict(enumerate(names)) if number == 0 else {}
        template.append(_leaves(values, f"{number}", named))
    leaves = list(_flat(template))
    ragged = any(leaf.length is not None or leaf.kind == "mask" for leaf in leaves)
    unmasked = any(leaf.kind in ("rows", "shared") and leaf.length is not None for leaf in leaves)
    return TextLayout(template, ragged, not unmasked or any(leaf.kind == "mask" for leaf in leaves))


def _leaves(values: Sequence[Any], name: str, named: Mapping[int, str]) -> Any:
    pair, triple, short, long = values
    if isinstance(pair, list) and len(pair) == 2 and isinstance(triple, list) and len(triple) == 3:
        return Leaf(name, "list")
    if isinstance(pair, tuple | list):
        parts = [_leaves(part, named.get(i, f"{name}.{i}"), {}) for i, part in enumerate(zip(*values, strict=True))]
        return type(pair)(parts)
    if isinstance(pair, dict):
        return {key: _leaves([value[key] for value in values], f"{name}.{key}", {}) for key in pair}
    if not isinstance(pair, Tensor):
        if not isinstance(pair, bool | int | float | str | None) or short != long:
            raise InputError(
                f"self-check 'texts': encode_prompt returns a {type(pair).__name__}: of tensors, lists of tensors and "
                "constants a condition can be made"
            )
        return Leaf(name, "fixed", value=pair)
    rows = [i for i, side in enumerate(pair.shape) if side == 2 and triple.shape[i] == 3]
    alone = short is not None and long is not None
    changing = [i for i in range(pair.ndim) if alone and short.shape[i] != long.shape[i]]
    length = next((i for i in changing if i not in rows[:1]), None)
    if not rows:
        if length is None:
            if alone and not torch.equal(short, long):
                raise InputError(
                    f"self-check 'texts': encode_prompt returns a tensor {tuple(pair.shape)} for 2 prompts that "
                    "depends on them and has no dimension of rows: no condition can be made of it"
                )
            return Leaf(name, "fixed", value=pair)
        return Leaf(name, "shared", length=length)
    if pair.ndim == 2 and (not alone or length is not None) and _is_prefix(pair.movedim(rows[0], 0)):
        return Leaf(name, "mask", rows[0], 1 - rows[0], value=pair[:0].cpu(), optional=not alone)
    return Leaf(name, "rows", rows[0], length)


def _length_second(leaf: Leaf, value: Tensor) -> Tensor:
    assert leaf.length is not None
    return value.movedim((leaf.row, leaf.length), (0, 1))


def _length_back(leaf: Leaf, value: Tensor) -> Tensor:
    assert leaf.length is not None
    return value.movedim((0, 1), (leaf.row, leaf.length))


def _lengths(leaf: Leaf) -> str:
    return f"{leaf.name}{_LENGTH}"


def _is_length(key: str) -> bool:
    return key.endswith(_LENGTH)


def _is_prefix(mask: Tensor) -> bool:
    """Ones, then zeros, in every row: what a mask of texts that are padded at their end holds."""
    binary = not mask.is_floating_point() and bool(((mask == 0) | (mask == 1)).all())
    return binary and bool((mask.long().diff(dim=1) <= 0).all())


def _flat(template: Any) -> Iterator[Leaf]:
    if isinstance(template, Leaf):
        yield template
    elif isinstance(template, tuple | list | dict):
        for part in template.values() if isinstance(template, dict) else template:
            yield from _flat(part)


def _pairs(template: Any, values: Any) -> Iterator[tuple[Leaf, Any]]:
    if isinstance(template, Leaf):
        yield template, values
    elif isinstance(template, dict):
        for key, part in template.items():
            yield from _pairs(part, values[key])
    else:
        for part, value in zip(template, values, strict=True):
            yield from _pairs(part, value)


def _mapped(template: Any, value_of: Callable[[Leaf], Any]) -> Any:
    if isinstance(template, Leaf):
        return value_of(template)
    if isinstance(template, dict):
        return {key: _mapped(part, value_of) for key, part in template.items()}
    return type(template)(_mapped(part, value_of) for part in template)
