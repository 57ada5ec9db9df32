"""Which model a pipeline was loaded from, by the content of its files: wherever the folder lies, whatever its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hnkit.internal.cache import cached_digest
from hnkit.internal.files import read_plain

_SIDE_FILES = {".json", ".txt", ".model", ".jinja"}
"""Configurations and the files of tokenizers."""
_SAID_BY_WRITERS = ("_diffusers_version", "_name_or_path", "transformers_version")
"""Keys of a configuration that say who wrote it and where, and nothing about the model."""


def weights_variant(folder: Path) -> str | None:
    """`"fp16"` for a component that is there in half precision alone (`*.fp16.safetensors`)."""
    half = [".fp16." in file.name for file in folder.glob("*.safetensors")]
    return "fp16" if half and all(half) else None


def component_files(folder: Path, component: str, variant: str | None = None) -> list[Path]:
    """The files of one component of a model that are read when it is loaded: configuration, tokenizer, weights.

    Args:
        folder: the folder of the model, in diffusers' format.
        component: the name of its folder in there.
        variant: as `weights_variant` says of the network: of weights that are there in both precisions, the others are
            left out.
    """
    found = [path for path in sorted((folder / component).rglob("*")) if path.is_file()]
    weights = [path for path in found if path.suffix == ".safetensors"]
    read = [path for path in weights if (".fp16." in path.name) == (variant == "fp16")]
    side = [path for path in found if path.suffix in _SIDE_FILES and ".index." not in path.name]
    return [*side, *(read or weights)]


def files_digest(folder: Path, components: Iterable[str], variant: str | None = None) -> str:
    """SHA-256 of everything that these components of a model are loaded from, under names relative to the folder.

    A moved or renamed copy has the same digest, and so has one that another version of diffusers has saved again.

    Raises:
        OSError: a file cannot be read.
    """
    total = hashlib.sha256()
    for component in sorted(components):
        for path in component_files(folder, component, variant):
            content = _plain_config(path) if path.name.endswith("config.json") else None
            found = cached_digest(path) if content is None else hashlib.sha256(content).hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()}\0{found}\n".encode())
    return total.hexdigest()


def stored_precision(folder: Path, component: str, variant: str | None = None) -> str | None:
    """In which type the weights of a component are stored, as safetensors calls it; `None`: that cannot be read."""
    for path in component_files(folder, component, variant):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    return str(file.get_slice(next(iter(file.keys()))).get_dtype())
            except (SafetensorError, OSError, StopIteration):
                return None
    return None


def _plain_config(path: Path) -> bytes | None:
    """A configuration without what its writers say of themselves; `None` for what is none."""
    try:
        config: Any = json.loads(read_plain(path))
    except (ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    return json.dumps(
        {key: value for key, value in config.items() if key not in _SAID_BY_WRITERS}, sort_keys=True
    ).encode()
