"""Reading published reward weights: plain tensors from safetensors and `.pt` files, loaded whole or not at all."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from hnkit.errors import InputError
from hnkit.internal.files import read_plain
from hnkit.internal.values import reason_of

Config = TypeVar("Config", bound=PretrainedConfig)


def read_state_dict(path: str | Path, *, what: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pt` file read without running any code.

    Tensors of a `.pt` file that torch wrote since 1.6 are mapped, not copied. A nested `state_dict` is unwrapped.

    Raises:
        InputError: the file is damaged, or holds anything but tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (
        OSError,
        SafetensorError,
        UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        reason = reason_of(error)
        raise InputError(f"{what}: {path} cannot be read as plain tensors ({reason}): fetch it again") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{what}: {path} does not hold a state dict of tensors: give the published weights file")
    return {str(key): value.detach() for key, value in content.items()}


def architecture(weights: str | Path, published: Config, *, what: str) -> Config:
    """The configuration of the model in a weights file: that of a `config.json` beside it, else the published one.

    Args:
        weights: the file; weights of another size than the published ones bring their `config.json` along.
        published: the configuration of the published weights; a `config.json` of another `model_type` is none of ours.
        what: named in errors.

    Raises:
        InputError: the `config.json` is damaged.
    """
    file = Path(weights).with_name("config.json")
    try:
        document = json.loads(read_plain(file)) if file.is_file() else {}
        if not isinstance(document, dict) or document.get("model_type") != published.model_type:
            return published
        described: Config = type(published).from_dict(document)
        return described
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, StrictDataclassError) as error:
        raise InputError(f"{what}: {file} cannot be read ({reason_of(error)}): mend it, or leave it out") from error


def without_wrapper(state: Mapping[str, Tensor], *, what: str) -> dict[str, Tensor]:
    """A state dict without the prefix `module.` of a wrapped model.

    Raises:
        InputError: a name is there with the prefix and without it.
    """
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    if len(plain) < len(state):
        twice = next(key for key in plain if {key, f"module.{key}"} <= state.keys())
        raise InputError(f"{what}: {twice!r} is there twice, as {f'module.{twice}'!r} too: fetch the file again")
    return plain


def load_strict(model: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Load `state` into `model`; any missing, foreign or misshapen key is an error that names it."""
    own = model.state_dict()
    broken = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not value.is_meta and not value.isfinite().all()
    ]
    if broken:
        raise InputError(f"{what}: {broken[0]!r} has values that are not finite: fetch the file again")
    missing = sorted(own.keys() - state.keys())
    foreign = sorted(state.keys() - own.keys())
    misshapen = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    for label, keys in (("missing", missing), ("unknown", foreign), ("of another shape", sorted(misshapen))):
        if keys:
            raise InputError(
                f"{what}: {len(keys)} weights are {label}, first {keys[0]!r}: these are not the weights of this model"
            )
    model.load_state_dict(dict(state), strict=True)
