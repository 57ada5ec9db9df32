"""Reading published reward weights: safetensors as they are, `.pt` once with `weights_only=True`."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hnkit.errors import InputError


def _cache_folder() -> Path:
    root = os.environ.get("HNKIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "hnkit" / "rewards"


def read_state_dict(path: Path, *, what: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pt` file read without running any code.

    A `.pt` file is converted once to safetensors in the user's cache (`$HNKIT_CACHE`, else `$XDG_CACHE_HOME`, else
    `~/.cache`), keyed by its size, time and path, and read from there afterwards. A nested `state_dict` is unwrapped.

    Raises:
        InputError: the file is damaged, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stat = path.resolve().stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        cached = _cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        if cached.is_file():
            return load_file(cached)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(f"{what}: {path} cannot be read as plain tensors ({reason}): fetch it again") from error
    tensors = _tensors_of(content, path, what)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, temporary)
        temporary.replace(cached)
    except OSError:
        return tensors  # a cache that cannot be written costs time, never correctness
    return tensors


def _tensors_of(content: object, path: Path, what: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{what}: {path} does not hold a state dict of tensors: give the published weights file")
    # clone: published files may hold several names for one storage, which safetensors refuses
    return {str(key): value.detach().clone().contiguous() for key, value in content.items()}


def load_strict(model: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Load `state` into `model`; any missing, foreign or misshapen key is an error that names it."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    foreign = sorted(state.keys() - own.keys())
    misshapen = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    for label, keys in (("missing", missing), ("unknown", foreign), ("of another shape", sorted(misshapen))):
        if keys:
            raise InputError(
                f"{what}: {len(keys)} weights are {label}, first {keys[0]!r}: these are not the weights of this model"
            )
    model.load_state_dict(dict(state), strict=True)
