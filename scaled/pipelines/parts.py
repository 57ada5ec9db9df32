"""Parts that distilled checkpoints exchange in a pipeline: a LoRA, its network, its scheduler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hnkit.errors import InputError
from hnkit.internal.cache import cached_digest
from hnkit.internal.values import reason_of
from hnkit.scaled.internal.hub import hub_file, local_folder
from hnkit.scaled.pipelines.identity import component_files
from hnkit.scaled.pipelines.options import PipelineOptions

_UNREADABLE = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def exchange_network(pipe: Any, name: str, options: PipelineOptions) -> None:
    """Put the network that `options.network_id` names in the place of the pipeline's own, in its type.

    Raises:
        InputError: nothing readable is there, or it is a network of another shape.
    """
    if not options.network_id:
        return
    network: Any = getattr(pipe, name)
    what = "backend.network_id"
    folder = local_folder(options.network_id)
    try:
        if folder is not None and (folder / "config.json").is_file():
            with torch.random.fork_rng(devices=[]):
                found = type(network).from_pretrained(folder, dtype=network.dtype, local_files_only=True)
            wanted = {key: value.shape for key, value in network.state_dict().items()}
            given = {key: value.shape for key, value in found.state_dict().items()}
            if wanted != given:
                key = min(key for key in wanted | given if wanted.get(key) != given.get(key))
                raise InputError(
                    f"{what} {options.network_id!r} is another network: {key!r} differs in shape or is new"
                )
            setattr(pipe, name, found)
            return
        weights = load_file(_one_file(options.network_id, options, what))
        with torch.no_grad():
            network.load_state_dict({key: value.to(network.dtype) for key, value in weights.items()})
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(
            f"{what} {options.network_id!r} does not fit {type(network).__name__}: {reason_of(error)}"
        ) from error


def fuse_lora(pipe: Any, name: str, options: PipelineOptions) -> None:
    """Load the LoRA that `options.lora` names and add it to the network's weights; nothing of it stays beside them.

    Raises:
        InputError: nothing readable is there, the pipeline takes none, or it is the LoRA of another network.
    """
    if not options.lora:
        return
    network: Any = getattr(pipe, name)
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"backend.lora {options.lora!r}: {type(pipe).__name__} takes no LoRA")
    path = _one_file(options.lora, options, "backend.lora")
    try:
        weights = load_file(path)
        with torch.random.fork_rng(devices=[]), _unsaid():
            pipe.load_lora_weights(dict(weights))
        layers = {key.rsplit(".lora_", 1)[0] for key, _ in network.named_parameters() if ".lora_" in key}
        _require_all(options.lora, weights, layers, name)
        pipe.fuse_lora(components=[name], lora_scale=options.lora_scale)
        pipe.unload_lora_weights()
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(
            f"backend.lora {options.lora!r} does not fit {type(network).__name__}: {reason_of(error)}"
        ) from error


def exchange_scheduler(pipe: Any, options: PipelineOptions) -> None:
    """Give the pipeline the scheduler that the options name, with their settings on top of its own.

    Raises:
        InputError: diffusers has no such class, or it has no such setting.
    """
    if not options.scheduler and not options.scheduler_config:
        return
    import diffusers

    kind = getattr(diffusers, options.scheduler, None) if options.scheduler else type(pipe.scheduler)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise InputError(f"backend.scheduler {options.scheduler!r}: diffusers has no scheduler of that name")
    settings = scheduler_settings(options)
    known = kind._get_init_keys(kind)  # type: ignore[attr-defined]
    if unknown := [key for key in settings if key not in known]:
        near = ", ".join(sorted(known - {"self"}))
        raise InputError(f"backend.scheduler_config {unknown[0]!r}: {kind.__name__} has no such setting: it has {near}")
    try:
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)  # type: ignore[attr-defined]
    except _UNREADABLE as error:
        raise InputError(f"backend.scheduler {kind.__name__} refuses these settings: {reason_of(error)}") from error


def require_schedule(scheduler: Any, options: PipelineOptions) -> None:
    """Refuse a schedule that starts at more noise than the scheduler knows.

    Raises:
        InputError: it does.
    """
    last = int(scheduler.config.get("num_train_timesteps", 1000)) - 1
    who = type(scheduler).__name__
    if options.timesteps and options.timesteps[0] > last:
        raise InputError(f"backend.timesteps {list(options.timesteps)}: those of {who} are 0 to {last}")
    if options.sigmas and options.sigmas[0] > 1 and "FlowMatch" in who:
        raise InputError(f"backend.sigmas {list(options.sigmas)}: those of {who} are at most 1, which is noise alone")


def scheduler_settings(options: PipelineOptions) -> dict[str, Any]:
    """The settings that `options.scheduler_config` names."""
    return {key: _value(text) for key, text in (entry.split("=", 1) for entry in options.scheduler_config)}


def parts_digest(model: str, options: PipelineOptions) -> str:
    """SHA-256 of a model of the digest `model`, with what was exchanged in its network."""
    total = hashlib.sha256(model.encode())
    for what in ("network_id", "lora"):
        if source := getattr(options, what):
            folder = local_folder(source)
            whole = what == "network_id" and folder is not None and (folder / "config.json").is_file()
            files = (
                component_files(folder.parent, folder.name) if whole and folder else [_one_file(source, options, what)]
            )
            total.update(f"{what}\0{options.lora_scale if what == 'lora' else ''}\0".encode())
            total.update("\n".join(cached_digest(file) for file in files).encode())
    return total.hexdigest() if options.network_id or options.lora else model


def split_hub_file(source: str) -> tuple[str, str] | None:
    """Repository and file of `OWNER/NAME/FILE.safetensors`; `None` for what is no such name, or is a file here."""
    if not source.endswith(".safetensors") or source.count("/") < 2 or source[0] in "/.~" or Path(source).is_file():
        return None
    return "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:])


def _value(text: str) -> Any:
    """A number, a boolean or null as in JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _one_file(source: str, options: PipelineOptions, what: str) -> Path:
    """The safetensors file that `source` names: itself, the one in its folder, or `REPOSITORY/FILE` of the hub."""
    path = Path(source).expanduser()
    if path.suffix in _PICKLED:
        raise InputError(
            f"{what} {source!r}: pickled weights are not read; store them once as safetensors: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
        )
    if path.suffix == ".safetensors" and path.is_file():
        return path
    if (folder := local_folder(source)) is not None:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise InputError(f"{what}: the folder {source} has {len(files)} safetensors files: name one of them")
        return files[0]
    if (place := split_hub_file(source)) is not None:
        return hub_file(*place, what=what, local_files_only=options.local_files_only)
    raise InputError(
        f"{what}: {source!r} is no safetensors file, no folder with one, and no OWNER/NAME/FILE.safetensors of the hub"
    )


@contextmanager
def _unsaid() -> Iterator[None]:
    """Inside, diffusers logs nothing: what fails is raised as well, and is said in one line."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _require_all(source: str, weights: Any, layers: set[str], name: str) -> None:
    """Refuse a LoRA of which diffusers left out a part, with nothing but a warning."""
    given = {
        key.rsplit(".lora_", 1)[0] for key in weights if ".lora_" in key and "text_encoder" not in key.split(".")[0]
    }
    given = {key for key in given if not key.startswith("lora_te")}
    if not layers or len(layers) < len(given):
        raise InputError(
            f"backend.lora {source!r} is of another network: {len(layers)} of its {len(given)} layers fit this {name}"
        )
