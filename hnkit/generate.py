"""What `hnkit generate` writes: base and steered images of every prompt from the same noise, and a contact sheet."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hnkit import __version__
from hnkit.backend import Backend, completed, steer
from hnkit.config import GenerateSettings, split_model, split_permissions
from hnkit.errors import InputError, NonFiniteError
from hnkit.internal.files import (
    atomic_write,
    document_digest,
    encoded,
    file_digest,
    read_plain,
    read_sealed,
    write_json,
    write_sealed,
)
from hnkit.internal.seeds import generator_for
from hnkit.internal.values import shown, typed_values
from hnkit.internal.workers import ALONE, Workers, shared_out
from hnkit.maps import slices
from hnkit.output.images import image_png
from hnkit.output.layouts import check_layout, write_layout
from hnkit.output.page import Card, Cell, Code, Picture, Section, Table, Text, write_html
from hnkit.output.plots import GREY, new_canvas, style, to_png
from hnkit.prompts import Records

PLAN = "generate.json"
PROMPTS = "prompts.jsonl"
TEXT, SEAL = "prompt.txt", "images.json"
"""In the folder of a prompt: its text, and, last of all, the digests of its images and what they were made from."""
_SHEET_PROMPTS, _SHEET_IMAGES = 8, 6


@dataclass(frozen=True)
class GeneratePlan:
    """Everything that a folder of images depends on; with it, the folder can be gone on with.

    Attributes:
        backend: name of the installed backend.
        settings: the settings of the run.
        prompts: the prompts, in the order of their folders.
        records: what the prompt file said of them besides their text.
        overrides: `backend.key=value`, as the user gave them.
        adapter: folder of the adapter or of its run; `None`: base images alone.
        adapter_files: SHA-256 of the adapter's files by name: images of one adapter are not mixed with another's.
        model: SHA-256 of the base model where the backend knows it.
        version: the version of hnkit.
    """

    backend: str
    settings: GenerateSettings
    prompts: tuple[str, ...]
    records: Records
    overrides: tuple[str, ...] = ()
    adapter: str | None = None
    adapter_files: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    version: str = __version__

    def write(self, folder: str | Path) -> None:
        """Make `folder` the folder of this run; leave to download is not written into it.

        Prompts that were read from a file are written beside the plan with what that file said of them.
        """
        if self.records:
            lines = [json.dumps({**self.records.get(text, {}), "prompt": text}) for text in self.prompts]
            atomic_write(Path(folder) / PROMPTS, "\n".join(lines) + "\n")
        document = {**vars(self), "settings": asdict(self.settings), "overrides": split_permissions(self.overrides)[1]}
        write_sealed(Path(folder) / PLAN, document)

    @property
    def asked(self) -> str:
        """SHA-256 of what was asked, as `provenance.json` names it."""
        return document_digest([self.backend, asdict(self.settings), self.made_from])

    @property
    def made_from(self) -> str:
        """SHA-256 of what every image is made from besides the settings, by content: what was moved is the same."""
        kept = split_permissions(split_model(self.overrides)[1])[1]
        return document_digest([list(kept), dict(self.adapter_files), self.model])

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The plan of a folder.

        Raises:
            InputError: no run of `generate` is there, or its plan is damaged.
        """
        try:
            document = read_sealed(Path(folder) / PLAN)
            if not isinstance(document, dict) or set(document) != {item.name for item in fields(cls)}:
                raise ValueError("it has other keys")
            settings = GenerateSettings(**typed_values(document.pop("settings"), GenerateSettings, PLAN))
            records = document.pop("records")
            values = typed_values(document, _PlainPlan, PLAN)
            files, adapter = values.pop("adapter_files"), values.pop("adapter")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"--resume {folder}: no images are begun there ({PLAN} is missing or damaged): name the folder of a run"
            ) from error
        if lifting := split_permissions(values["overrides"])[0]:
            raise InputError(f"--resume {folder}: its {PLAN} has {lifting[0]!r}: only your own flag may allow that")
        return cls(settings=settings, records=records, adapter=adapter and str(adapter), adapter_files=files, **values)


@dataclass(frozen=True)
class _PlainPlan:
    """The types of what `GeneratePlan` holds besides its settings and records."""

    backend: str
    prompts: tuple[str, ...]
    overrides: tuple[str, ...]
    adapter: Path | None
    adapter_files: dict[str, str]
    model: str | None
    version: str


def generate_pairs(
    backend: Backend,
    prompts: Sequence[str],
    settings: GenerateSettings,
    folder: str | Path,
    *,
    steered: bool = True,
    records: Records | None = None,
    workers: Workers = ALONE,
    made_from: str = "",
    card: Card | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write base and steered images side by side, and what was done.

    A prompt's folder is complete when its `images.json` says that its images were made from the same, and text and
    images are as they were written; complete ones are kept, so a run that was cut short is gone on with by the same
    call, and ends with the same files. Of a folder that is not complete, what has a name of ours is made again, and
    what somebody put beside stays.

    Args:
        backend: the backend, with its adapter loaded.
        prompts: distinct; `prompt-000/base-00.png` and `prompt-000/steered-00.png` come from the same noise.
        settings: the settings of the run.
        folder: an existing run folder, empty or with what the same run has written so far.
        steered: write steered images too; false for a backend without an adapter.
        records: what a prompt file says of its prompts besides their text (see `hnkit.prompts.read_records`), for a
            scorer's layout.
        workers: the processes that the prompts are shared out over; they see the same folder.
        made_from: the digest of what the images are made from besides the settings; see `GeneratePlan.made_from`.
        card: what is known of the adapter, at the head of the page; `None`: nothing.
        command: the command that makes these images again, in their folder; empty: the page names none.
        say: a function that is told of each prompt when it begins.
        warn: a function that is told, in one line each, of prompts that were written before and have been made again.

    Returns:
        What `report.json` holds.

    Raises:
        InputError: a prompt that the layout cannot hold, before anything is written; outputs that are no images.
        NonFiniteError: an image, or the delta of the noise, holds NaN or infinity.
        OSError: the disk is full or read-only; what is complete is kept.
    """
    folder = Path(folder)
    if settings.layout is not None:
        check_layout(settings.layout, prompts, settings.count, records)
    kinds = ["base", "steered"] if steered else ["base"]
    source = _source(backend.name, settings, made_from)
    names = _names(kinds, settings.count)
    for number, prompt in shared_out(prompts, workers):
        place = prompt_folder(folder, number)
        if place.is_symlink():
            raise InputError(f"{place} is a link, and links are not followed: name the folder of a run itself")
        say(_shortened(prompt, 60))
        lacking = _lacking(place, prompt, names, source)
        if lacking is None:
            continue
        place.mkdir(exist_ok=True)
        digests: dict[str, str] = {}
        for part in slices(settings.count, settings.batch):
            rows = range(part.start, part.stop)
            outputs = _pair(backend, prompt, rows, settings, steered)
            for kind in kinds:
                for row, image in zip(rows, outputs[kind], strict=True):
                    name, content = f"{kind}-{row:02d}.png", image_png(image)
                    atomic_write(place / name, content)
                    digests[name] = hashlib.sha256(content).hexdigest()
        atomic_write(place / TEXT, prompt + "\n")
        write_sealed(place / SEAL, {"prompt": prompt, "made_from": source, "images": digests})
        if lacking:
            warn(f"{place}: {lacking}: its images were made again")
    return workers.on_main(lambda: _report(backend, prompts, settings, folder, kinds, records or {}, card, command))


def _report(
    backend: Backend,
    prompts: Sequence[str],
    settings: GenerateSettings,
    folder: Path,
    kinds: Sequence[str],
    records: Records,
    card: Card | None,
    command: str,
) -> dict[str, Any]:
    """What is made of all images together: the contact sheet, the scorer's layout, the report."""
    sheet = contact_sheet(_shown(folder, prompts[:_SHEET_PROMPTS], kinds, min(settings.count, _SHEET_IMAGES)))
    atomic_write(folder / "contact-sheet.png", sheet)
    if settings.layout is not None:
        write_layout(settings.layout, folder, kinds, prompts, settings.count, records)
    written = len(prompts) * settings.count * len(kinds)
    document = {
        "backend": backend.name, "images": written, "prompts": list(prompts), "kinds": kinds, **asdict(settings),
        "verdict": None if card is None else card.to_json(),
    }  # fmt: skip
    caption = "Each prompt's base images above and its steered ones below, column by column from the same noise."
    rows_ = tuple((prompt_folder(folder, number).name, prompt) for number, prompt in enumerate(prompts))
    chosen: tuple[tuple[Cell, ...], ...] = tuple((key, value) for key, value in asdict(settings).items())
    sections = [
        Section("Contact sheet", (Picture(sheet, caption, samples=True),)),
        Section("Prompts", (Table(("folder", "prompt"), rows_),)),
        Section("Settings", (Table(("setting", "value"), chosen),)),
    ]
    if command:
        where = [Text(f"In the run folder, whose {PROMPTS} has every prompt:")] if records else []
        sections.append(Section("Reproduce", (*where, Code(command))))
    lead = "" if card is None else "This is the adapter's verdict, as its training measured it; the images are new."
    write_html(folder / "report.html", f"hnkit generate: {backend.name}", sections, lead=lead, card=card)
    write_json(folder / "report.json", document)
    return document


def prompt_folder(folder: str | Path, number: int) -> Path:
    """Where the images of a prompt are."""
    return Path(folder) / f"prompt-{number:03d}"


def complete_prompts(folder: str | Path, plan: GeneratePlan) -> int:
    """How many prompts of a run have all their images, as they were written."""
    source = _source(plan.backend, plan.settings, plan.made_from)
    names = _names(["base"] if plan.adapter is None else ["base", "steered"], plan.settings.count)
    return sum(
        _lacking(prompt_folder(folder, number), prompt, names, source) is None
        for number, prompt in enumerate(plan.prompts)
    )


def _source(backend: str, settings: GenerateSettings, made_from: str) -> str:
    """The digest of all that an image depends on besides its prompt and its number."""
    return document_digest([backend, settings.seed, settings.steps, made_from])


def _names(kinds: Sequence[str], count: int) -> set[str]:
    return {f"{kind}-{row:02d}.png" for kind in kinds for row in range(count)}


def _lacking(place: Path, prompt: str, names: set[str], source: str) -> str | None:
    """What was wrong with a prompt's folder that was complete once; empty: it never was; `None`: it is complete."""
    try:
        seal = read_sealed(place / SEAL)
        images, made_from = dict(seal["images"]), seal["made_from"]
    except FileNotFoundError:
        return f"{SEAL} was missing" if (place / TEXT).exists() else ""
    except (OSError, ValueError, LookupError, TypeError):
        return f"{SEAL} was damaged"
    if made_from != source or set(images) != names:
        return "its images were another run's"
    text = None
    with contextlib.suppress(OSError):
        text = read_plain(place / TEXT)
    if seal.get("prompt") != prompt or text != encoded(prompt + "\n"):
        return f"{TEXT} was missing, or was not the text of this prompt"
    for name in sorted(images):
        try:
            if file_digest(place / name) != images[name]:
                return f"{name} was not the image that had been written"
        except OSError:
            return f"{name} was missing"
    return None


def require_images(
    backend: Backend, prompts: Sequence[str], settings: GenerateSettings, records: Records | None = None
) -> None:
    """Refuse prompts that the layout cannot hold or the backend cannot encode, and a backend that makes no images.

    Every prompt is encoded, which a backend with a cache does once, and one image is made.

    Raises:
        InputError: names the prompt or the shape.
    """
    if settings.layout is not None:
        check_layout(settings.layout, prompts, settings.count, records)
    completed(backend).prepare(prompts)
    for prompt in prompts:
        backend.encode([prompt])
    _pair(backend, prompts[0], range(1), settings, steered=False)


def _shown(
    folder: Path, prompts: Sequence[str], kinds: Sequence[str], count: int
) -> dict[str, dict[str, list[Tensor]]]:
    """The images of the contact sheet, as they were written."""
    return {
        prompt: {
            kind: [_read_png(prompt_folder(folder, number) / f"{kind}-{row:02d}.png") for row in range(count)]
            for kind in kinds
        }
        for number, prompt in enumerate(prompts)
    }


def _read_png(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(io.BytesIO(read_plain(path))) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _noise(backend: Backend, seed: int, rows: range) -> Tensor:
    """Noise of image k: a function of the seed and of k alone, so that prompts and runs are paired."""
    dtype = completed(backend).noise_dtype
    parameter = next(iter(backend.hypernetwork.parameters()), torch.zeros(()))
    draws = [torch.randn(backend.noise_shape, dtype=dtype, generator=generator_for(seed, "generate", k)) for k in rows]
    return torch.stack(draws).to(parameter.device)


@torch.no_grad()
def _pair(
    backend: Backend, prompt: str, rows: range, settings: GenerateSettings, steered: bool
) -> dict[str, list[Tensor]]:
    noise = _noise(backend, settings.seed, rows)
    condition = backend.encode([prompt] * len(rows)).of_images(settings.seed, rows)
    outputs = {"base": backend.generate(noise, condition, settings.steps)}
    if steered:
        moved = steer(backend, noise, condition, settings.steps)
        what = f"the delta f(x) of the noise under prompt {shown(prompt)}"
        _require_finite(moved.delta, what, "the adapter is damaged")
        outputs["steered"] = moved.images
    for kind, images in outputs.items():
        if images.dim() != 4 or images.shape[1] != 3:
            raise InputError(
                f"backend {backend.name} makes outputs of shape {tuple(images.shape[1:])}, not images: use verify-bound"
            )
        cure = "try backend.dtype=float32, another guidance" + (", or another adapter" if kind == "steered" else "")
        _require_finite(images, f"a {kind} image of prompt {shown(prompt)}", cure)
    return {kind: list(images.float().cpu()) for kind, images in outputs.items()}


def _require_finite(values: Tensor, what: str, cure: str) -> None:
    """A file of pixels has no way to say "not a number": it would be written as black."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        raise NonFiniteError(f"{what} holds {int((~finite).sum())} values that are not finite: {cure}")


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
    if len(text) <= longest:
        return text
    beginning = text[: longest - 3]
    return f"{beginning if text[len(beginning)] == ' ' else beginning.rpartition(' ')[0] or beginning}..."
