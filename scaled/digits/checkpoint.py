"""The bundled folder: where it is, what it must contain, and whether it is intact."""

from __future__ import annotations

from pathlib import Path

from hnkit.errors import InputError
from hnkit.internal.files import file_digest, read_plain

CHECKSUMS = "SHA256SUMS"
CLIP_FOLDER = "clip"
JUDGE_FILE = "judge.safetensors"
LEGIBILITY_FILE = "legibility.safetensors"
ADAPTER_FOLDER = "adapter"
GUIDANCE_SCALE = 4.5
MAX_SEQUENCE_LENGTH = 8
CANVAS = 32


def model_folder() -> Path:
    """Folder of the weights that come with the package.

    Returns:
        ``scaled/digits/model``; it is a diffusers pipeline folder with the scorer, the judge and the figures beside.
    """
    return Path(__file__).resolve().parent / "model"


def read_checksums(folder: str | Path) -> dict[str, str]:
    """The list of files and their checksums.

    Args:
        folder: A model folder.

    Returns:
        Relative path to hexadecimal SHA-256.

    Raises:
        InputError: The list is missing or a line of it cannot be read.
    """
    path = Path(folder) / CHECKSUMS
    try:
        lines = read_plain(path).decode().splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"the digits model is incomplete: {path} is missing or unreadable; reinstall hnkit") from None
    sums = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        inside = name and not name.startswith("/") and ".." not in name.split("/")
        if not separator or len(digest) != 64 or not inside:
            raise InputError(f"the digits model is damaged: cannot read a line of {path}; reinstall hnkit")
        sums[name] = digest
    if not sums:
        raise InputError(f"the digits model is damaged: {path} is empty; reinstall hnkit")
    return sums


def write_checksums(folder: str | Path) -> None:
    """Write the list for all files of a folder.

    Args:
        folder: A model folder.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    lines = [f"{file_digest(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def verified_folder(folder: str | Path | None = None) -> Path:
    """Locate a model folder and check every file in it.

    Args:
        folder: The folder to check; the bundled one by default.

    Returns:
        The folder, all of whose listed files are present and intact.

    Raises:
        InputError: The folder or a file is missing, or a file does not match its checksum; the file is named.
    """
    folder = model_folder() if folder is None else Path(folder)
    if not folder.is_dir():
        raise InputError(f"the digits model is missing: no folder {folder}; reinstall hnkit")
    for name, expected in read_checksums(folder).items():
        path = folder / name
        try:
            found = file_digest(path)
        except OSError:
            message = f"the digits model is incomplete: {path} is missing or unreadable; reinstall hnkit"
            raise InputError(message) from None
        if found != expected:
            raise InputError(f"the digits model is damaged: {path} does not match its checksum; reinstall hnkit")
    return folder
