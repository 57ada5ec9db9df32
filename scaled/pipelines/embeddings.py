"""Prompt embeddings, computed once: in memory, and on disk keyed by what they are a function of.

With every training prompt on disk the text encoder is not needed any more and can leave the accelerator. A prompt is
encoded by itself, so that its embedding does not depend on what is encoded beside it, and nothing that is wrong with
the folder on disk costs more than time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hnkit.internal.cache import cache_folder
from hnkit.internal.files import atomic_write
from hnkit.maps import slices
from hnkit.scaled.pipelines.identity import files_digest

Encoder = Callable[[Sequence[str]], Mapping[str, Tensor]]
Row = dict[str, Tensor]

MASK = "prompt_attention_mask"
_TRIMMED = "prompt_embeds"
_SHARD = 64
"""Prompts per file."""


class EmbeddingCache:
    """Rows of prompt embeddings: an in-memory least-recently-used store over an optional folder of safetensors files.

    Masked positions carry no information (attention gives them weight exactly zero), so rows are stored up to their
    last unmasked token: a SANA prompt of 20 tokens takes 90 kB instead of 1.4 MB.

    Args:
        encode: a function that makes one row of each prompt, whatever the others are.
        folder: where rows are kept; a folder that cannot be read or written, or is full, is done without.
        in_memory: how many rows are kept in memory.
    """

    def __init__(self, encode: Encoder, folder: Path | None, *, in_memory: int = 4096) -> None:
        self._encode = encode
        self._folder = folder
        self._limit = in_memory
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._files: dict[str, tuple[Path, int]] = {}
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                for path in sorted(folder.glob("*.safetensors")):
                    self._index(path)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._rows or prompt in self._files

    def rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Stacked embeddings of the prompts, on the CPU; those that are missing are encoded."""
        found = {prompt: self._lookup(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, row in found.items() if row is None]
        if missing:
            found |= dict(zip(missing, self._compute(missing), strict=True))
        return _stack([found[prompt] or {} for prompt in prompts])

    def store(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are not stored yet, and write them if there is a folder."""
        known = self._files if self._folder is not None else self._rows
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for part in slices(len(missing), _SHARD):
            if self._folder is None and part.start >= self._limit:
                return  # memory holds no more: the others are encoded where they are used
            chunk = missing[part]
            rows = self._compute(chunk)
            if self._folder is None:
                continue
            try:
                self._write(self._folder, chunk, rows)
            except OSError:
                self._folder = None  # full, or not to be written: what is there is still read

    def _compute(self, prompts: Sequence[str]) -> list[Row]:
        encoded = {key: value.detach().cpu() for key, value in self._encode(prompts).items()}
        rows = [_trim({key: value[i] for key, value in encoded.items()}) for i in range(len(prompts))]
        for prompt, row in zip(prompts, rows, strict=True):
            self._remember(prompt, row)
        return rows

    def _remember(self, prompt: str, row: Row) -> None:
        self._rows[prompt] = row
        self._rows.move_to_end(prompt)
        while len(self._rows) > self._limit:
            self._rows.popitem(last=False)

    def _lookup(self, prompt: str) -> Row | None:
        if prompt in self._rows:
            self._rows.move_to_end(prompt)
            return self._rows[prompt]
        if prompt not in self._files:
            return None
        path, number = self._files[prompt]
        row = _read_row(path, number)
        if row is None:
            # A damaged file is a lost cache entry, not a lost run: forget the file and encode its prompts again.
            self._files = {p: place for p, place in self._files.items() if place[0] != path}
            _forget(path)
            return None
        self._remember(prompt, row)
        return row

    def _index(self, path: Path) -> None:
        header = _read_header(path)
        if header is None:
            _forget(path)
            return
        for number, prompt in enumerate(header):
            self._files[prompt] = (path, number)

    def _write(self, folder: Path, prompts: Sequence[str], rows: Sequence[Row]) -> None:
        tensors = {f"{i}.{key}": value.contiguous() for i, row in enumerate(rows) for key, value in row.items()}
        metadata = {
            "prompts": json.dumps(list(prompts), ensure_ascii=True),
            "checksums": json.dumps({key: _checksum(value) for key, value in tensors.items()}),
        }
        name = hashlib.sha256("\0".join(prompts).encode()).hexdigest()[:24]
        path = folder / f"{name}.safetensors"
        atomic_write(path, save(tensors, metadata=metadata))
        for number, prompt in enumerate(prompts):
            self._files[prompt] = (path, number)


def cache_root() -> Path | None:
    """The user's cache folder for embeddings; `None` for a user without a home."""
    return cache_folder("embeddings")


def embedding_key(folder: Path, components: Sequence[str], settings: Mapping[str, object]) -> str:
    """A name for all that embeddings are a function of, beside the prompt.

    Args:
        folder: the folder of the model.
        components: the names of its text encoders and tokenizers, which are known by the content of their files.
        settings: how prompts are encoded.

    Raises:
        OSError: a file of the model cannot be read.
    """
    libraries = {name: version(name) for name in ("torch", "transformers", "diffusers")}
    facts = {**settings, **libraries, "machine": platform.machine(), "text": files_digest(folder, components)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _trim(row: Row) -> Row:
    """Drop the positions after the last unmasked token; remember the full length."""
    if MASK not in row:
        return row
    mask = row[MASK]
    used = int(mask.nonzero().max()) + 1 if bool(mask.any()) else 0
    return row | {_TRIMMED: row[_TRIMMED][:used].clone()}


def _stack(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Batch the rows, with zeros where masked positions were dropped."""
    batch: dict[str, Tensor] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if key == _TRIMMED and MASK in rows[0]:
            length = rows[0][MASK].numel()
            full = values[0].new_zeros((len(rows), length, values[0].shape[-1]))
            for i, value in enumerate(values):
                full[i, : len(value)] = value
            batch[key] = full
        else:
            batch[key] = joined(values)
    return batch


def joined(rows: Sequence[Tensor]) -> Tensor:
    """The rows as one tensor, those that are shorter than the longest with zeros at their end."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(list(rows))
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())  # a length has no dimension


def _read_header(path: Path) -> list[str] | None:
    """The prompts of a cache file; `None` when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            prompts = json.loads((file.metadata() or {})["prompts"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    return prompts if isinstance(prompts, list) else None


def _read_row(path: Path, number: int) -> Row | None:
    """One row of a cache file; `None` when it is missing or its checksum does not match."""
    prefix = f"{number}."
    try:
        with safe_open(path, framework="pt") as file:
            checksums = json.loads((file.metadata() or {})["checksums"])
            row = {key.removeprefix(prefix): file.get_tensor(key) for key in checksums if key.startswith(prefix)}
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    if not row or any(_checksum(value) != checksums[prefix + key] for key, value in row.items()):
        return None
    return row
