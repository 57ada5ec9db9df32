"""Folders that commands are told to write to or to go on with."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hnkit.cli.options import NEWEST
from hnkit.errors import InputError


def refuse_existing(out: Path | None) -> None:
    """Say so before the work, not after it; the folder itself is made when there is something to write."""
    if out is not None and (out.exists() or out.is_symlink()):
        raise InputError(f"--out {out} exists already and is never overwritten: name a new folder")
    named, cure = ("runs/", "choose a folder with --out") if out is None else (f"--out {out}", "name another folder")
    for above in (Path("runs/new") if out is None else out).absolute().parents:
        if above.exists() or above.is_symlink():
            if not above.is_dir() or not os.access(above, os.W_OK):
                reason = "is read-only" if above.is_dir() else "is not a folder"
                raise InputError(f"{named} cannot be created, {above} {reason}: {cure}")
            return


def resumed_folder(resume: str, out: Path | None, kind: str, file: str) -> Path:
    """The run that `--resume` means: the one named, the one in `--out`, or the newest under `runs/`.

    Args:
        resume: a folder, or `NEWEST`.
        out: the value of `--out`.
        kind: the first word of the names under `runs/`, which go on with the time of the start: that says which is
            the newest, while a copy, a look inside or a new file beside the results change the folder's own time.
        file: what a folder must hold to be such a run.
    """
    if resume != NEWEST:
        if out is not None:
            raise InputError(f"--resume {resume} with --out {out}: a resumed run stays in its folder")
        return Path(resume)
    if out is not None:
        return out
    name = re.compile(rf"{kind}-(\d{{8}}-\d{{6}})(?:-(\d+))?")
    runs = [
        (match[1], int(match[2] or 1), folder)
        for folder in Path("runs").glob(f"{kind}-*")
        if (match := name.fullmatch(folder.name)) and (folder / file).is_file()
    ]
    if not runs:
        raise InputError("--resume: there is no run under runs/ to go on with: name its folder, --resume DIR")
    return max(runs)[2]
