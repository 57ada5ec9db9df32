"""Which base model an adapter belongs to: by the files it was loaded from, else by a few of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PROBES = 32
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BaseFiles:
    """The files that a base model was loaded from.

    Attributes:
        sha256: of their content.
        precision: the type in which the weights of its network are stored, as safetensors calls it.
    """

    sha256: str
    precision: str | None


def base_record(base: nn.Module, files: BaseFiles | None) -> dict[str, Any]:
    """What an adapter records of its base model."""
    record: dict[str, Any] = {"base_class": base_class(base), "base_probe": probe(base)}
    return record if files is None else record | {"base_sha256": files.sha256, "base_precision": files.precision}


def other_base(record: Mapping[str, Any], base: nn.Module, files: BaseFiles | None) -> str | None:
    """In what a base model differs from the recorded one, in words; `None` where it is the same.

    Files decide where both are known. The same model stored in another precision has other files, and is known by the
    probe, as is a model that was made in memory.
    """
    recorded = record.get("base_sha256")
    if files is not None and isinstance(recorded, str):
        if recorded == files.sha256:
            return None
        if record.get("base_precision") == files.precision:
            return f"SHA-256 {recorded[:12]}..., here {files.sha256[:12]}..."
    if same_probe(record.get("base_probe"), probe(base)):
        return None
    return "some of its weights are others"


def remember(base: nn.Module) -> None:
    """Note by which class and weights to know a base again, before it is stored or shared out in another way.

    One without values has no weights to be known by.
    """
    base.original_class = type(base).__name__  # type: ignore[assignment]
    if not any(parameter.is_meta for parameter in base.parameters()):
        base.original_probe = probe(base)  # type: ignore[assignment]


def base_class(base: nn.Module) -> str:
    """The name of the class of a base, as it was loaded."""
    return str(getattr(base, "original_class", type(base).__name__))


def probe(base: nn.Module) -> list[float]:
    """A few weights of the base, spread over its parameters, by which to know it again; as it was loaded."""
    noted: Any = getattr(base, "original_probe", None)
    if noted is not None:
        return list(noted)
    parameters = [parameter for _, parameter in sorted(base.named_parameters())]
    chosen = [parameters[i * len(parameters) // _PROBES] for i in range(_PROBES)]
    return [float(parameter.detach().flatten()[parameter.numel() // 2]) for parameter in chosen]


def same_probe(saved: Any, here: Sequence[float]) -> bool:
    """Whether two probes are of the same weights, each in the type they were loaded in.

    They are equal, or they are once both are rounded to the half-precision type that one of them is in already; between
    the two half-precision types, up to one step of the coarser.
    """
    if not isinstance(saved, list) or len(saved) != len(here):
        return False
    try:
        one, other = (torch.tensor(values, dtype=torch.float32) for values in (saved, list(here)))
    except (TypeError, ValueError, RuntimeError):
        return False
    if torch.equal(one, other):
        return True
    halves = [[kind for kind in _HALF if torch.equal(values, _rounded(values, kind))] for values in (one, other)]
    if any(torch.equal(_rounded(one, kind), _rounded(other, kind)) for kind in (*halves[0], *halves[1])):
        return True
    step = torch.finfo(torch.bfloat16).eps
    return all(halves) and halves[0] != halves[1] and torch.allclose(one, other, rtol=step, atol=1e-7)


def _rounded(values: Tensor, kind: torch.dtype) -> Tensor:
    return values.to(kind).float()
