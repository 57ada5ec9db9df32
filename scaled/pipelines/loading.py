"""From a model's name or folder to a loaded, frozen pipeline."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hnkit.errors import InputError
from hnkit.internal.values import reason_of
from hnkit.scaled.internal.hub import local_folder, missing_model, without_bars
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.identity import weights_variant
from hnkit.scaled.pipelines.options import DTYPES, PipelineOptions


def load_pipeline(family: Family, options: PipelineOptions) -> Any:
    """Load and freeze the pipeline that `options` name, on its device; text encoders stay on the CPU.

    Raises:
        InputError: the model is not there, is another pipeline's, or its files are damaged.
    """
    import diffusers
    import diffusers.utils.logging
    import transformers.utils.logging

    folder = find_model(options.model_id, options.local_files_only)
    _check_index(folder, family)
    bars = without_bars(diffusers.utils.logging, transformers.utils.logging)
    try:
        with bars, torch.random.fork_rng(devices=[]):  # models draw initial weights before the real ones are read
            pipe = getattr(diffusers, family.pipeline_class).from_pretrained(
                folder,
                dtype=DTYPES[options.dtype],
                local_files_only=True,
                use_safetensors=True,
                variant=weights_variant(folder / family.network),
                **family.load_arguments,
            )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        reason = reason_of(error, 200)
        raise InputError(f"model {options.model_id!r} does not load from {folder}: {reason}") from error
    device = find_device(options.device)
    for name, component in pipe.components.items():
        if name.startswith("tokenizer"):
            memory.drop_word_cache(component)
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            if name not in family.encoders:
                with memory.explained(memory.advice(options)):
                    component.to(device)
    memory.apply_decoder_options(pipe.vae, options)
    memory.set_checkpointing(getattr(pipe, family.network), options.generator_checkpointing)
    return pipe


def find_model(model_id: str, local_files_only: bool = True) -> Path:
    """The folder of a model: `model_id` itself if it is one, else its snapshot in the local hub cache.

    Raises:
        InputError: it is neither, and downloading is off.
    """
    folder = local_folder(model_id)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if local_files_only:
            return Path(snapshot_download(model_id, local_files_only=True))
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(model_id, use_safetensors=True))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise missing_model("backend.model_id", model_id, error, local_files_only=local_files_only) from error


def _check_index(folder: Path, family: Family) -> None:
    try:
        found = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} has no readable model_index.json: give a folder in diffusers' format") from error
    if found != family.pipeline_class:
        raise InputError(f"{folder} holds a {found}: backend {family.name} needs a {family.pipeline_class}")


def without_encoders(pipe: Any, family: Family) -> Any:
    """A second pipeline object over the same components, without text encoders: they may live elsewhere."""
    bare = copy.copy(pipe)
    for name in family.encoders:
        setattr(bare, name, None)
    bare.set_progress_bar_config(disable=True)
    return bare


def find_device(name: str) -> torch.device:
    """The device of this name; `auto`: the current card where there is one."""
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"backend.device {name!r} cannot be used here: choose auto, cpu, or cuda") from error
    return device
