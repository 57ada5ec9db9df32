"""What `hnkit generate` writes: base and steered images of every prompt from the same noise, and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnkit.backend import Backend, completed
from hnkit.config import GenerateSettings
from hnkit.errors import InputError
from hnkit.internal.files import atomic_write, write_json
from hnkit.internal.seeds import generator_for
from hnkit.maps import ConditionedMap, NoiseMap
from hnkit.output.images import image_png
from hnkit.output.layouts import check_layout, write_layout
from hnkit.output.page import Picture, Section, Table, Text, write_html
from hnkit.output.plots import GREY, new_canvas, style, to_png
from hnkit.prompts import Records

_SHEET_PROMPTS, _SHEET_IMAGES = 8, 6


def generate_pairs(
    backend: Backend,
    prompts: Sequence[str],
    settings: GenerateSettings,
    folder: Path,
    *,
    steered: bool = True,
    records: Records | None = None,
) -> dict[str, Any]:
    """Write base and steered images side by side, and what was done.

    Args:
        backend: with its adapter loaded.
        prompts: distinct; `prompt-000/base-00.png` and `prompt-000/steered-00.png` come from the same noise.
        settings: of the run.
        folder: an existing, empty run folder.
        steered: write steered images too; false for a backend without an adapter.
        records: what a prompt file says of its prompts besides their text (see `hnkit.prompts.read_records`), for a
            scorer's layout.

    Returns:
        What `report.json` holds.

    Raises:
        InputError: a prompt that the layout cannot hold, before anything is written; outputs that are no images.
    """
    if settings.layout is not None:
        check_layout(settings.layout, prompts, settings.count, records)
    sheets: dict[str, dict[str, list[Tensor]]] = {}
    kinds = ["base", "steered"] if steered else ["base"]
    written = 0
    for number, prompt in enumerate(prompts):
        place = folder / f"prompt-{number:03d}"
        place.mkdir()
        for start in range(0, settings.count, settings.batch):
            rows = range(start, min(settings.count, start + settings.batch))
            outputs = _pair(backend, prompt, _noise(backend, settings.seed, rows), settings.steps, steered)
            for kind in kinds:
                for row, image in zip(rows, outputs[kind], strict=True):
                    atomic_write(place / f"{kind}-{row:02d}.png", image_png(image))
                    written += 1
                if number < _SHEET_PROMPTS:
                    shown = sheets.setdefault(prompt, {}).setdefault(kind, [])
                    shown.extend(outputs[kind][: max(0, _SHEET_IMAGES - len(shown))])
        atomic_write(place / "prompt.txt", prompt + "\n")
    sheet = contact_sheet(sheets)
    atomic_write(folder / "contact-sheet.png", sheet)
    if settings.layout is not None:
        write_layout(settings.layout, folder, kinds, prompts, settings.count, records or {})
    document = {
        "backend": backend.name, "images": written, "prompts": list(prompts), "kinds": kinds, **asdict(settings),
    }  # fmt: skip
    caption = "Each prompt's base images above and its steered ones below, column by column from the same noise."
    rows_ = tuple((f"prompt-{number:03d}", prompt) for number, prompt in enumerate(prompts))
    sections = [
        Section("Contact sheet", (Picture(sheet, caption),)),
        Section("Prompts", (Table(("folder", "prompt"), rows_), Text(json.dumps(asdict(settings))))),
    ]
    write_html(folder / "report.html", f"hnkit generate: {backend.name}", sections)
    write_json(folder / "report.json", document)
    return document


def require_images(
    backend: Backend, prompts: Sequence[str], settings: GenerateSettings, records: Records | None = None
) -> None:
    """Refuse prompts that the layout cannot hold, and, by making one image, a backend whose outputs are none."""
    if settings.layout is not None:
        check_layout(settings.layout, prompts, settings.count, records)
    _pair(backend, prompts[0], _noise(backend, settings.seed, range(1)), settings.steps, steered=False)


def _noise(backend: Backend, seed: int, rows: range) -> Tensor:
    """Noise of image k: a function of the seed and of k alone, so that prompts and runs are paired."""
    dtype = completed(backend).noise_dtype
    parameter = next(iter(backend.hypernetwork.parameters()), torch.zeros(()))
    draws = [torch.randn(backend.noise_shape, dtype=dtype, generator=generator_for(seed, "generate", k)) for k in rows]
    return torch.stack(draws).to(parameter.device)


@torch.no_grad()
def _pair(backend: Backend, prompt: str, noise: Tensor, steps: int, steered: bool) -> dict[str, list[Tensor]]:
    texts = [prompt] * len(noise)
    condition = backend.encode(texts)
    outputs = {"base": backend.generate(noise, condition, steps)}
    if steered:
        f: NoiseMap = ConditionedMap(backend.hypernetwork, condition)
        outputs["steered"] = backend.generate(noise + f(noise).to(noise.dtype), condition, steps)
    for images in outputs.values():
        if images.dim() != 4 or images.shape[1] != 3:
            raise InputError(
                f"backend {backend.name} makes outputs of shape {tuple(images.shape[1:])}, not images: use verify-bound"
            )
    return {kind: list(images.float().cpu()) for kind, images in outputs.items()}


def contact_sheet(sheets: dict[str, dict[str, list[Tensor]]]) -> bytes:
    """Prompts down, images across; of each prompt the base images above the steered ones.

    Args:
        sheets: prompt -> kind ("base", "steered") -> images `(3, H, W)` in [0, 1].
    """
    kinds = list(next(iter(sheets.values())))
    columns = max(len(images) for by_kind in sheets.values() for images in by_kind.values())
    cell, gap, left, head = 1.2, 0.05, 0.3, 0.32  # inches
    block = head + len(kinds) * (cell + gap)
    width, height = left + columns * (cell + gap) + 0.1, len(sheets) * block + 0.1
    with style():
        figure = new_canvas(width, height)
        for number, (prompt, by_kind) in enumerate(sheets.items()):
            top = height - number * block
            figure.text(left / width, (top - 0.23) / height, _shortened(prompt, int(columns * 17)), fontsize=9.5)
            for row, kind in enumerate(kinds):
                bottom = top - head - (row + 1) * (cell + gap) + gap
                middle = (bottom + cell / 2) / height
                figure.text(0.09 / width, middle, kind, rotation=90, va="center", fontsize=8.5, color=GREY)
                for column, image in enumerate(by_kind[kind]):
                    place = (left + column * (cell + gap)) / width, bottom / height, cell / width, cell / height
                    axes = figure.add_axes(place)
                    axes.set_axis_off()
                    axes.imshow(np.clip(image.permute(1, 2, 0).numpy(), 0, 1), interpolation="nearest")
        return to_png(figure)


def _shortened(prompt: str, longest: int) -> str:
    text = " ".join(prompt.replace("$", r"\$").split())
    return text if len(text) <= longest else text[: longest - 3] + "..."
