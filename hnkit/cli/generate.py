"""`hnkit generate`: base and steered images of prompts from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnkit.cli.folders import refuse_existing
from hnkit.cli.options import WithBackend, flags_of
from hnkit.config import GenerateSettings
from hnkit.errors import InputError
from hnkit.internal.values import setting

EXAMPLE = "hnkit generate --backend digits --prompt 'a three' --count 8"


@dataclass(frozen=True, kw_only=True)
class Options(WithBackend):
    """Write base and steered images, pair by pair from the same noise, and a contact sheet.

    Attributes:
        adapter: trained adapter, or the run folder that holds it; default: base images alone.
        prompts: .txt, .json, .jsonl, .csv:COLUMN, a folder of .txt, hf:NAME; default: the backend's held-out ones.
        prompt: one prompt (repeatable).
    """

    adapter: Path | None = setting(None, metavar="DIR")
    prompts: str | None = setting(None, metavar="FILE")
    prompt: tuple[str, ...] = setting(())
    settings: Mapping[str, Any] = flags_of(GenerateSettings)


def run(options: Options) -> int:
    """Write the images of every prompt; see `hnkit.generate`."""
    from hnkit.adapters import default_prompts, load_trained
    from hnkit.generate import generate_pairs, require_images
    from hnkit.internal.files import new_run_folder
    from hnkit.output import terminal
    from hnkit.output.layouts import check_layout
    from hnkit.prompts import read_records

    name = options.named_backend()
    settings = GenerateSettings(**options.settings)
    if options.prompts is not None and options.prompt:
        raise InputError("--prompts and --prompt together: name one source of prompts")
    refuse_existing(options.out)
    records = {} if options.prompts is None else read_records(options.prompts)
    texts = list(dict.fromkeys(options.prompt)) or list(records)
    if not all(text.strip() for text in texts):
        raise InputError("--prompt is empty: write a prompt")
    if texts and settings.layout is not None:
        check_layout(settings.layout, texts, settings.count, records)
    loaded, _ = load_trained(name, options.adapter, options.overrides)
    texts = texts or default_prompts(loaded)
    require_images(loaded, texts, settings, records)
    folder = new_run_folder(options.out, "generate")
    document = generate_pairs(loaded, texts, settings, folder, steered=options.adapter is not None, records=records)
    if options.as_json:
        terminal.print_json({**document, "run_folder": str(folder)})
    else:
        print(f"{document['images']} images; contact sheet: {folder / 'contact-sheet.png'}")
    return 0
