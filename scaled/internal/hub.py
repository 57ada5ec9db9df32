"""The one place that reads models from a local folder or the hub's cache, and says in one line what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError

from hnkit.errors import InputError
from hnkit.internal.downloads import not_here
from hnkit.internal.values import reason_of

Loaded = TypeVar("Loaded")
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
    HfHubHTTPError,
    HFValidationError,
    StrictDataclassError,
)
"""What the libraries raise at a missing or damaged file, a configuration that is none of theirs, and at pickled weights
that are more than tensors."""


def local_folder(source: str | Path) -> Path | None:
    """The folder that `source` names, `None` if it names none."""
    try:
        folder = Path(source).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL in it, the home of no user
        return None


def missing_model(what: str, source: str | Path, cause: BaseException, *, local_files_only: bool = True) -> InputError:
    """The one line for a model that is neither a readable folder nor in the cache nor, where that is on, reachable."""
    source = str(source)
    if local_folder(source) is None:
        return not_here(what, source, cause, local_files_only=local_files_only)
    reason = reason_of(cause)
    return InputError(f"{what}: the folder {source} is not a readable model ({reason}): give a complete folder")


@contextmanager
def without_bars(*libraries: Any) -> Iterator[None]:
    """Inside, the libraries whose `logging` modules are given show no progress bars: the commands have their own."""
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def pretrained(
    load: Callable[..., Loaded], source: str | Path, *, what: str, local_files_only: bool = True, **kwargs: Any
) -> Loaded:
    """Call a library's `from_pretrained` on a folder or a hub name.

    Args:
        load: e.g. `CLIPModel.from_pretrained`.
        source: a local folder, or a name on the hub.
        what: what is being loaded, for the message, e.g. `"reward 'pickscore'"`.
        local_files_only: never download.
        **kwargs: further options, which are passed to `load`. `trust_remote_code` is never among them.

    Raises:
        InputError: nothing could be loaded from there.
    """
    from transformers.utils import logging

    try:
        with without_bars(logging):
            return load(str(source), local_files_only=local_files_only, **kwargs)
    except _UNREADABLE as error:
        raise missing_model(what, source, error, local_files_only=local_files_only) from error


def hub_file(source: str | Path, filename: str, *, what: str, local_files_only: bool = True) -> Path:
    """The path of one file of a local folder or of a hub repository: from the cache, or downloaded where that is on.

    Raises:
        InputError: it is in neither place.
    """
    folder = local_folder(source)
    if folder is not None:
        if not (folder / filename).is_file():
            raise InputError(f"{what}: the folder {source} has no file {filename}: give a folder that holds it")
        return folder / filename
    try:
        return Path(hf_hub_download(str(source), filename, local_files_only=local_files_only))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise missing_model(what, source, error, local_files_only=local_files_only) from error
