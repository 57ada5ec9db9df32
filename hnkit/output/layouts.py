"""Generated images in the folders that published scorers read; the scorers themselves run elsewhere.

    geneval        geneval-KIND/00000/metadata.jsonl and samples/00000.png      one folder for each prompt
    geneval2       geneval2-KIND/image_paths-00.json                            one list for each image of a prompt
    t2i-compbench  t2i-compbench-KIND/samples/PROMPT_000000.png                 numbered through all images
    dpg-bench      dpg-bench-KIND/ITEM.png                                      four images of a prompt, 2 x 2

KIND is `base` or `steered`. GenEval and DPG-Bench need to know more about a prompt than its text (what to look for, the
item's name): the benchmark's own prompt file or folder says it. `tests/interop/` states what each scorer reads, with
the version that was read.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hnkit.errors import InputError
from hnkit.internal.files import atomic_write, read_plain, write_json
from hnkit.internal.values import shown
from hnkit.output.images import rgb_png
from hnkit.prompts import Records

Images = Sequence[Sequence[Path]]

_LONGEST_NAME = 200  # bytes of a file name that every file system takes, with room for the number


@dataclass(frozen=True)
class Layout:
    """How images are arranged for one scorer.

    Attributes:
        write: fills a folder with the images of the prompts, given as paths `[prompt][image]`.
        fault: what keeps a prompt with this record from being scored, in words; `None` if nothing does.
        count: images of each prompt that the scorer reads; `None` if it takes any number.
    """

    write: Callable[[Path, Sequence[str], Images, Records], None]
    fault: Callable[[str, Mapping[str, Any]], str | None]
    count: int | None = None


def write_layout(
    name: str, folder: Path, kinds: Sequence[str], prompts: Sequence[str], count: int, records: Records
) -> None:
    """Arrange the images that `generate` has written under `folder` for a scorer.

    A folder gets its name when it is whole. In one that has it, what differs from the images as they are now is written
    again, and what somebody put beside stays.

    Args:
        name: one of `LAYOUTS`.
        folder: the run folder, with `prompt-000/base-00.png` and so on.
        kinds: "base", "steered".
        prompts: the prompts, in the order of their folders.
        count: images of each prompt.
        records: what is known about a prompt besides its text.

    Raises:
        InputError: something in a folder is a link.
    """
    for kind in kinds:
        whole = folder / f"{name}-{kind}"
        place = whole.with_name(f".{whole.name}.tmp")
        if place.exists():  # of a run that was cut short here
            shutil.rmtree(place)
        place.mkdir()
        images = [
            [folder / f"prompt-{number:03d}" / f"{kind}-{row:02d}.png" for row in range(count)]
            for number in range(len(prompts))
        ]
        LAYOUTS[name].write(place, prompts, images, records)
        if whole.is_dir():
            _mend(whole, place)
            shutil.rmtree(place)
        else:
            place.rename(whole)


def _mend(whole: Path, fresh: Path) -> None:
    """Write again what differs in a folder from how it is made now."""
    for path in (fresh, *sorted(fresh.rglob("*"))):
        there = whole / path.relative_to(fresh)
        if there.is_symlink():
            raise InputError(f"{there} is a link, and links are not followed: take it out of the run folder")
        if path.is_dir():
            there.mkdir(exist_ok=True)
        elif not there.is_file() or read_plain(there) != path.read_bytes():
            atomic_write(there, path.read_bytes())


def check_layout(name: str, prompts: Sequence[str], count: int, records: Records | None = None) -> None:
    """Refuse what a layout cannot hold or its scorer cannot read, before anything is generated.

    Args:
        name: as the user wrote it.
        prompts: empty while they are not known.
        count: images of each prompt.
        records: the records of the prompts, as `read_records` gives them.

    Raises:
        InputError: names the first prompt and what is wrong with it.
    """
    if name not in LAYOUTS:
        raise InputError(f"--layout {name}: accepted are {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    if layout.count is not None and count != layout.count:
        raise InputError(
            f"--layout {name} with --count {count}: its scorer reads {layout.count} images of each prompt, "
            f"--count {layout.count}"
        )
    for prompt in prompts:
        if fault := layout.fault(prompt, (records or {}).get(prompt, {})):
            raise InputError(f"--layout {name}, prompt {shown(prompt)}: {fault}")
    if name == "dpg-bench":
        items = [str((records or {})[prompt]["item_id"]).casefold() for prompt in prompts]
        twice = next((item for item in items if items.count(item) > 1), None)
        if twice is not None:
            raise InputError(f"--layout dpg-bench: two prompts have the item_id {shown(twice)}: give each its own")


# --- GenEval ----------------------------------------------------------------------------------------------------


def _geneval_fault(_: str, record: Mapping[str, Any]) -> str | None:
    source = "give GenEval's own evaluation_metadata.jsonl as --prompts"
    missing = [key for key in ("tag", "include") if key not in record]
    if missing:
        return f"no record with {' and '.join(missing)}, which its scorer reads: {source}"
    if not isinstance(record["tag"], str) or not isinstance(record["include"], list):
        return f"'tag' is not a string or 'include' not a list: {source}"
    clauses = [*record["include"], *(record.get("exclude") or [])]
    for clause in clauses:
        if (
            not isinstance(clause, dict)
            or not isinstance(clause.get("class"), str)
            or not isinstance(clause.get("count"), int)
        ):
            return f"{shown(clause)} has no 'class' and 'count': {source}"
    for number, clause in enumerate(record["include"]):
        position = clause.get("position")
        # the target is an earlier clause; the scorer indexes the ones that it has seen
        if position is not None and not (
            isinstance(position, list)
            and len(position) == 2
            and isinstance(position[1], int)
            and 0 <= position[1] < number
        ):
            return f"position {shown(position)} does not name an earlier object: {source}"
    return None


def _geneval(place: Path, prompts: Sequence[str], images: Images, records: Records) -> None:
    for number, (prompt, paths) in enumerate(zip(prompts, images, strict=True)):
        samples = place / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        # plain ASCII, one document: the scorer opens it in the encoding of its locale
        atomic_write(samples.parent / "metadata.jsonl", json.dumps(records[prompt]))
        for row, path in enumerate(paths):
            shutil.copyfile(path, samples / f"{row:05d}.png")


# --- GenEval 2 --------------------------------------------------------------------------------------------------


def _geneval2(place: Path, prompts: Sequence[str], images: Images, records: Records) -> None:
    lists: list[dict[str, str]] = [{} for _ in images[0]] if images else []
    for prompt, paths in zip(prompts, images, strict=True):
        text = str(records.get(prompt, {}).get("prompt", prompt))  # looked up by the benchmark's exact words
        for path, paths_of in zip(paths, lists, strict=True):
            paths_of[text] = str(path.resolve())  # the scorer opens it from wherever it runs
    for row, paths_of in enumerate(lists):
        write_json(place / f"image_paths-{row:02d}.json", paths_of)


# --- T2I-CompBench ----------------------------------------------------------------------------------------------


def _compbench_fault(prompt: str, _: Mapping[str, Any]) -> str | None:
    if any(part in prompt for part in ("/", "\\", "_", ".png")) or not prompt.isprintable():
        return "it names files by their prompt: leave out '/', '\\', '_', '.png' and control characters"
    if len(prompt.encode()) > _LONGEST_NAME:
        return f"it names files by their prompt: keep below {_LONGEST_NAME} bytes"
    return None


def _compbench(place: Path, prompts: Sequence[str], images: Images, records: Records) -> None:  # noqa: ARG001
    (place / "samples").mkdir()
    number = 0
    for prompt, paths in zip(prompts, images, strict=True):
        for path in paths:
            shutil.copyfile(path, place / "samples" / f"{prompt}_{number:06d}.png")
            number += 1


# --- DPG-Bench --------------------------------------------------------------------------------------------------


def _dpg_fault(_: str, record: Mapping[str, Any]) -> str | None:
    if "item_id" not in record:
        return (
            "no item_id, by which its scorer finds the questions: give the benchmark's own folder of .txt files as "
            "--prompts (the name of a file is its item_id), or a .jsonl or .csv with that field"
        )
    item = str(record["item_id"])
    # the scorer takes the file name up to its first dot
    if not item or not all(character.isalnum() or character in "-_ " for character in item) or item != item.strip():
        return f"item_id {shown(item)} is no file name: use letters, digits, '-' and '_'"
    if len(item.encode()) > _LONGEST_NAME:
        return f"item_id {shown(item)} is no file name: keep below {_LONGEST_NAME} bytes"
    return None


def _dpg(place: Path, prompts: Sequence[str], images: Images, records: Records) -> None:
    from PIL import Image

    for prompt, paths in zip(prompts, images, strict=True):
        one, two, three, four = (np.asarray(Image.open(io.BytesIO(read_plain(path))).convert("RGB")) for path in paths)
        grid = np.concatenate([np.concatenate([one, two], axis=1), np.concatenate([three, four], axis=1)], axis=0)
        atomic_write(place / f"{records[prompt]['item_id']}.png", rgb_png(grid))


LAYOUTS: Mapping[str, Layout] = {
    "geneval": Layout(_geneval, _geneval_fault),
    "geneval2": Layout(_geneval2, lambda _prompt, _record: None),
    # its 3-in-1 score takes the images ten by ten
    "t2i-compbench": Layout(_compbench, _compbench_fault, count=10),
    "dpg-bench": Layout(_dpg, _dpg_fault, count=4),
}
"""How each scorer's folder is filled."""
