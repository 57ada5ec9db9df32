"""Generated images in the folders that published scorers read; the scorers themselves run elsewhere.

    geneval        geneval-KIND/00000/metadata.jsonl and samples/00000.png      one folder for each prompt
    t2i-compbench  t2i-compbench-KIND/samples/PROMPT_000000.png                 numbered through all images
    dpg-bench      dpg-bench-KIND/ITEM.png                                      four images of a prompt, 2 x 2

KIND is `base` or `steered`. GenEval and DPG-Bench know more about a prompt than its text (what to look for, the item's
name): a `.jsonl` prompt file with their own records passes these on.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hnkit.errors import InputError
from hnkit.internal.files import atomic_write

Records = Mapping[str, Mapping[str, Any]]

_LONGEST_NAME = 200  # bytes of a file name that every file system takes, with room for the number


def prompt_records(source: str | Path | None) -> dict[str, dict[str, Any]]:
    """The records of a `.jsonl` prompt file by their prompt; empty for any other source.

    Args:
        source: what `--prompts` named; it has been read by `read_prompts` before, so its lines are sound.
    """
    if source is None or Path(source).suffix != ".jsonl":
        return {}
    lines = Path(source).expanduser().read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    return {
        " ".join(record["prompt"].split()): record
        for record in records
        if isinstance(record, dict) and isinstance(record.get("prompt"), str)
    }


def write_layout(
    name: str, folder: Path, kinds: Sequence[str], prompts: Sequence[str], count: int, records: Records
) -> None:
    """Arrange the images that `generate` has written under `folder` for a scorer.

    Args:
        name: one of `LAYOUTS`.
        folder: the run folder, with `prompt-000/base-00.png` and so on.
        kinds: "base", "steered".
        prompts: in the order of their folders.
        count: images of each prompt.
        records: what is known about a prompt besides its text.
    """
    for kind in kinds:
        place = folder / f"{name}-{kind}"
        place.mkdir()
        images = [
            [folder / f"prompt-{number:03d}" / f"{kind}-{row:02d}.png" for row in range(count)]
            for number in range(len(prompts))
        ]
        LAYOUTS[name](place, prompts, images, records)


def check_layout(name: str, prompts: Sequence[str], count: int) -> None:
    """Refuse what a layout cannot hold, before anything is generated."""
    if name not in LAYOUTS:
        raise InputError(f"--layout {name}: accepted are {', '.join(LAYOUTS)}")
    if name == "dpg-bench" and count != 4:
        raise InputError(
            f"--layout dpg-bench with --count {count}: its scorer reads 4 images of each prompt, --count 4"
        )
    if name == "t2i-compbench":
        for prompt in prompts:
            if "/" in prompt or "_" in prompt or not prompt.isprintable() or len(prompt.encode()) > _LONGEST_NAME:
                raise InputError(
                    f"--layout t2i-compbench names files by their prompt, which {prompt[:40]!r} cannot be: leave out "
                    f"'/', '_' and control characters and keep below {_LONGEST_NAME} bytes"
                )


Images = Sequence[Sequence[Path]]


def _geneval(place: Path, prompts: Sequence[str], images: Images, records: Records) -> None:
    for number, (prompt, paths) in enumerate(zip(prompts, images, strict=True)):
        samples = place / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        record = records.get(prompt, {"prompt": prompt})
        atomic_write(samples.parent / "metadata.jsonl", json.dumps(record, ensure_ascii=False) + "\n")
        for row, path in enumerate(paths):
            shutil.copyfile(path, samples / f"{row:05d}.png")


def _compbench(place: Path, prompts: Sequence[str], images: Images, records: Records) -> None:  # noqa: ARG001
    (place / "samples").mkdir()
    number = 0
    for prompt, paths in zip(prompts, images, strict=True):
        for path in paths:
            shutil.copyfile(path, place / "samples" / f"{prompt}_{number:06d}.png")
            number += 1


def _dpg(place: Path, prompts: Sequence[str], images: Images, records: Records) -> None:
    from matplotlib.image import imread, imsave

    for number, (prompt, paths) in enumerate(zip(prompts, images, strict=True)):
        item = str(records.get(prompt, {}).get("item_id", f"{number:05d}"))
        safe = "".join(character if character.isalnum() or character in "-_" else "_" for character in item)
        name = safe.encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore")
        if (place / f"{name}.png").exists():
            raise InputError(f"--layout dpg-bench: two prompts have the item_id {item[:40]!r}: give each its own")
        one, two, three, four = (imread(path)[..., :3] for path in paths)
        grid = np.concatenate([np.concatenate([one, two], axis=1), np.concatenate([three, four], axis=1)], axis=0)
        buffer = io.BytesIO()
        imsave(buffer, grid, format="png")
        atomic_write(place / f"{name}.png", buffer.getvalue())


LAYOUTS: Mapping[str, Callable[[Path, Sequence[str], Images, Records], None]] = {
    "geneval": _geneval,
    "t2i-compbench": _compbench,
    "dpg-bench": _dpg,
}
"""How each scorer's folder is filled."""
