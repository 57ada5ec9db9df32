"""What a run shares: its adapter with a card that stands by itself, as a folder and on the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hnkit.errors import InputError
from hnkit.internal.files import new_run_folder, read_plain
from hnkit.internal.folders import adapter_folder
from hnkit.internal.values import reason_of

CARD = "README.md"
CITATION = """@article{eyring2025noise,
  title   = {Noise Hypernetworks: Amortizing Test-Time Compute in Diffusion Models},
  author  = {Eyring, Luca and Karthik, Shyamgopal and Dosovitskiy, Alexey and Ruiz, Nataniel and Akata, Zeynep},
  journal = {arXiv preprint arXiv:2508.09968},
  year    = {2025}
}"""
_NAME = re.compile(r"(?:[\w.-]+/)?(?![.-])[\w.-]+(?<![.-])", re.ASCII)
_LOCAL = re.compile(r"(?<![^\s'\"`=(\[])(?:/|~/|[A-Za-z]:\\)[^\s'\"`,;)\]]+")


def publish(
    run: str | Path,
    *,
    to: str | None = None,
    out: str | Path | None = None,
    license_name: str | None = None,
    private: bool = False,
) -> dict[str, Any]:
    """Write what a run shares to a new folder, and upload that folder where a name on the Hub is given.

    The folder holds the adapter, the newest samples, the plot of the training and the card, with metadata (base model,
    license, tags), samples and citation. Absolute paths are replaced by their last part; configuration and logs, which
    name places of the machine, stay at home.

    Args:
        run: the folder of a finished or exported run, or of an adapter.
        to: `NAME` or `USER/NAME` on the Hugging Face Hub; `None`: nothing is uploaded.
        out: a new folder; `None`: under `runs/`.
        license_name: the adapter's license as the Hub names it, `mit` say; it is bound by the base model's.
        private: make a private repository.

    Returns:
        `folder`, `files`, and `url`, which is `None` where nothing was uploaded.

    Raises:
        InputError: there is no adapter, `to` is no name, or the Hub cannot be reached or refuses; the folder is kept
            and named.
    """
    source = adapter_folder(run)
    if not any(path.suffix in (".safetensors", ".bin") for path in source.iterdir()):
        raise InputError(f"{run} holds no adapter: name a finished run, an exported one, or the folder of an adapter")
    if to is not None:
        _require_name(to)
    folder = new_run_folder(None if out is None else Path(out), "push")
    pictures = _copy(source, Path(run), folder)
    text = read_plain(source / CARD).decode() if (source / CARD).is_file() else "# Noise hypernetwork\n"
    (folder / CARD).write_text(_without_places(_card(text, pictures, license_name)), encoding="utf-8")
    url = None if to is None else _upload(folder, to, private)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {"folder": str(folder), "files": [name for name in files if not name.startswith(".")], "url": url}


def _require_name(to: str) -> None:
    if not _NAME.fullmatch(to) or ".." in to or "--" in to or len(to) > 96:  # the Hub's own rules
        raise InputError(f"--to {to} is no name of a repository: NAME or USER/NAME, letters, digits, - _ .")


def _copy(source: Path, run: Path, folder: Path) -> list[str]:
    """Copy weights, configuration and pictures; returns the pictures."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix == ".json":
            settings = _without_places_in(json.loads(read_plain(path)))
            (folder / path.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        elif path.is_file() and path.name != CARD and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    samples = sorted((run / "samples").glob("*.png"))[-1:]
    shown = [*samples, *(path for path in [run / "training.png"] if path.is_file())]
    for path in shown:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in shown]


def _card(text: str, pictures: Sequence[str], license_name: str | None) -> str:
    """The card of the run with the license, the pictures and how to cite."""
    card = ModelCard(text, ignore_metadata_errors=True)
    known: dict[str, Any] = dict(card.data.to_dict())  # type: ignore[no-untyped-call]
    data = ModelCardData(**known | ({} if license_name is None else {"license": license_name}))
    captions = {"training.png": "The training: loss, reward and nats."}
    default = "Base outputs above, steered ones below, each column from the same noise and prompt."
    shown = [f"![{captions.get(name, default)}]({name})\n\n*{captions.get(name, default)}*" for name in pictures]
    parts = [
        card.text.strip(),
        *(["## Samples", *shown] if shown else []),
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _without_places(text: str) -> str:
    """A text in which an absolute path of this machine is replaced by its last part."""
    return _LOCAL.sub(lambda match: re.split(r"[\\/]", match[0].rstrip("/\\"))[-1], text)


def _without_places_in(value: Any) -> Any:
    """The same for every text of a JSON document."""
    if isinstance(value, str):
        return _without_places(value)
    if isinstance(value, Mapping):
        return {key: _without_places_in(inner) for key, inner in value.items()}
    return [_without_places_in(inner) for inner in value] if isinstance(value, list) else value


def _upload(folder: Path, to: str, private: bool) -> str:
    kept = f"everything to upload is in {folder}"
    api = HfApi(library_name="hnkit")
    try:
        repository = api.create_repo(to, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message="Noise hypernetwork, its card and samples",
            ignore_patterns=[".*"],
        )
    except LocalTokenNotFoundError as error:
        raise InputError(f"--to {to}: not logged in to the Hub: run hf auth login first; {kept}") from error
    except OfflineModeIsEnabled as error:
        raise InputError(f"--to {to}: HF_HUB_OFFLINE is set: unset it to upload; {kept}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        cure = "log in with hf auth login, with a token that may write there" if status in (401, 403) else "try again"
        raise InputError(f"--to {to}: the Hub refused, {reason_of(error)}: {cure}; {kept}") from error
    except Exception as error:
        if not _is_network_error(error):
            raise
        raise InputError(f"--to {to}: the Hub cannot be reached, {reason_of(error)}: try again; {kept}") from error
    return str(repository)


def _is_network_error(error: Exception) -> bool:
    """No route, no name, no certificate: an error of httpx, httpx2 or requests, as huggingface_hub's version has it."""
    bases = {base.__name__ for base in type(error).__mro__}
    return isinstance(error, OSError) or bool(bases & {"TransportError", "RequestException"})
