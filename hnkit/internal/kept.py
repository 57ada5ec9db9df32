"""Values that are computed once and kept, by a record while it lives or in a file for the run that goes on with it.

What keeps a value is a function `keep(name, make)`, which returns what was kept under the name, or else what `make`
makes now. Records of figures are kept in JSON with every number to the bit.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from hnkit.internal.values import field_types, is_union

T = TypeVar("T")


class Keep(Protocol):
    """Returns what was kept under a name, or else makes it now."""

    def __call__(self, name: str, make: Callable[[], T], /) -> T:
        """The value of that name."""
        ...


def not_kept(_: str, make: Callable[[], T], /) -> T:
    """Make it now."""
    return make()


if TYPE_CHECKING:
    kept_property = cached_property
else:

    class kept_property(cached_property):  # noqa: N801 - as the class it extends
        """A `cached_property` of an object whose `keep` may know the value from before, under the property's name."""

        def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
            """The value; afterwards it is the instance's own."""
            if instance is None:
                return self
            assert self.attrname is not None
            instance.__dict__[self.attrname] = instance.keep(self.attrname, lambda: self.func(instance))
            return instance.__dict__[self.attrname]


def to_document(value: Any) -> Any:
    """Figures as JSON, of which `from_document` makes the same again to the bit.

    Args:
        value: numbers, text, `None`, tensors, and records, lists, tuples and mappings of these.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"": "float", "value": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        flat = [to_document(number) for number in value.detach().flatten().tolist()]
        kind = str(value.dtype).removeprefix("torch.")
        return {"": "tensor", "type": kind, "shape": list(value.shape), "device": str(value.device), "value": flat}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"": type(value).__name__, **{name: to_document(entry) for name, entry in vars(value).items()}}
    if isinstance(value, tuple | list):
        return {"": type(value).__name__, "value": [to_document(entry) for entry in value]}
    if isinstance(value, Mapping):
        return {"": "dict", "value": [[key, to_document(entry)] for key, entry in value.items()]}
    raise TypeError(f"{type(value).__name__} is kept in no file")


def from_document(document: Any, records: Mapping[str, type[Any]]) -> Any:
    """What `to_document` was given.

    Args:
        document: what it made.
        records: the records that may stand in it, by name.

    Raises:
        ValueError: the document is none of its making.
    """
    if document is None or isinstance(document, bool | int | float | str):
        return document
    try:
        fields = dict(document)
        kind = fields.pop("")
        if kind in records:
            values = {name: from_document(entry, records) for name, entry in fields.items()}
            wanted = field_types(records[kind])
            if not all(_fits(value, wanted[name]) for name, value in values.items()):
                raise ValueError(f"a field of {kind} holds what does not belong there")
            return records[kind](**values)
        value = fields.pop("value")
        if kind == "float":
            return float(value)
        if kind == "dict":
            return {key: from_document(entry, records) for key, entry in value}
        entries = [from_document(entry, records) for entry in value]
        if kind == "tensor":
            dtype = getattr(torch, fields["type"])
            return torch.tensor(entries, dtype=dtype, device=fields["device"]).reshape(fields["shape"])
        return {"tuple": tuple, "list": list}[kind](entries)
    except (
        *(KeyError, TypeError, AttributeError, RuntimeError, RecursionError, OverflowError),
        AssertionError,  # of a device that this build of torch does not know
    ) as error:
        raise ValueError("it does not hold what was kept") from error


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the type that a record declares; an integer may stand for a float."""
    members, origin = typing.get_args(annotation), typing.get_origin(annotation) or annotation
    if annotation is Any:
        return True
    if is_union(annotation):
        return any(_fits(value, member) for member in members)
    if origin is typing.Literal:
        return value in members
    accepted: tuple[Any, ...] = (int, float) if origin is float else (origin,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and origin is not bool):
        return False
    if isinstance(value, Mapping) and members:
        return all(_fits(key, members[0]) and _fits(entry, members[1]) for key, entry in value.items())
    if not isinstance(value, tuple | list) or not members:
        return True
    if members[-1] is Ellipsis or origin is not tuple:
        return all(_fits(entry, members[0]) for entry in value)
    return len(value) == len(members) and all(map(_fits, value, members))
