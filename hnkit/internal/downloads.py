"""The one line about a model or a data set that is not on this machine, and the switch that lets it be fetched."""

from __future__ import annotations

import shlex

from hnkit.errors import InputError
from hnkit.internal.values import reason_of


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
    fetched = "nothing is downloaded unasked" if local_files_only else f"it could not be fetched ({reason_of(cause)})"
    switch = "allow it with --set backend.local_files_only=false, " if local_files_only else ""
    command = ["hf", "download", *(["--repo-type", "dataset"] if data_set else []), name]
    instead = "give a file of prompts" if data_set else "give the path of a folder that holds it"
    return InputError(
        f"{what}: {name!r} is not a local folder and not in the local cache, and {fetched}: run {shlex.join(command)} "
        f"where there is a network, {switch}or {instead}"
    )
