"""The one line about a model or a data set that is not on this machine, and the switch that lets it be fetched."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hnkit.errors import InputError
from hnkit.internal.values import reason_of

_ON_HUB = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9._-]{1,96}")
"""OWNER/NAME; a few old models, among them tokenizers of rewards, have no owner."""


def means_folder(name: str) -> bool:
    """Whether a name is meant as a folder: the hub could have none such, or its owner's is a folder that is here."""
    return not _ON_HUB.fullmatch(name) or ("/" in name and Path(name).parent.is_dir())


def no_folder(what: str, name: str) -> InputError:
    """The error for the folder of a model that does not exist."""
    return InputError(
        f"{what}: there is no folder {name!r}: give the path of one that holds the model, or OWNER/NAME "
        "of a model that hf download has put into the hub's local cache"
    )


def not_here(
    what: str, name: str, cause: BaseException, *, local_files_only: bool, data_set: bool = False
) -> InputError:
    """The error for something on the hub that is not in a local cache nor, where that is on, reachable.

    Args:
        what: what is being loaded, e.g. `"reward 'pickscore'"`.
        name: its name on the hub.
        cause: what the library raised; it is the reason where downloading is on.
        local_files_only: downloading is off.
        data_set: it is a data set of prompts, else a model.
    """
    if not data_set and means_folder(name):
        return no_folder(what, name)
    fetched = "nothing is downloaded unasked" if local_files_only else f"it could not be fetched ({reason_of(cause)})"
    switch = "allow it with --set backend.local_files_only=false, " if local_files_only else ""
    command = ["hf", "download", *(["--repo-type", "dataset"] if data_set else []), name]
    instead = "give a file of prompts" if data_set else "give the path of a folder that holds it"
    return InputError(
        f"{what}: {name!r} is not a local folder and not in the local cache, and {fetched}: run {shlex.join(command)} "
        f"where there is a network, {switch}or {instead}"
    )
