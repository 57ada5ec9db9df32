"""From a model's name or folder to a loaded, frozen pipeline."""

from __future__ import annotations

import inspect
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hnkit.errors import InputError
from hnkit.internal.downloads import no_folder
from hnkit.internal.files import read_plain
from hnkit.internal.values import reason_of
from hnkit.scaled.internal.hub import local_folder, missing_model, without_bars
from hnkit.scaled.pipelines import memory, parts
from hnkit.scaled.pipelines.calls import encoder_names
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.families.table import family_of
from hnkit.scaled.pipelines.identity import weights_variant
from hnkit.scaled.pipelines.options import DTYPES, PipelineOptions


def load_pipeline(backend: str, family: Family | None, options: PipelineOptions) -> tuple[Any, Family, PipelineOptions]:
    """Load and freeze the pipeline that `options` name, on its device; text encoders stay on the CPU.

    So does all of it where the network is about to be shared out: no card has to hold it whole.

    Args:
        backend: its name, for messages.
        family: the record of the class that the model has to be of; `None`: of the class that its folder names.
        options: the options; those that leave something to the pipeline come back with its values.

    Returns:
        The pipeline, its record, and the options as they hold for it.

    Raises:
        InputError: the model is not there, is another pipeline's, or its files are damaged; a LoRA, network or
            scheduler does not fit it.
    """
    import diffusers
    import diffusers.utils.logging
    import transformers.utils.logging

    say_once()
    folder = find_model(options.model_id, options.local_files_only)
    found = _class_name(folder)
    if family is not None and found != family.pipeline_class:
        raise InputError(f"{folder} holds a {found}: backend {backend} needs a {family.pipeline_class}")
    family = family or family_of(found)
    kind = text_to_image(found, folder)
    bars = without_bars(diffusers.utils.logging, transformers.utils.logging)
    try:
        with bars, torch.random.fork_rng(devices=[]):  # models draw initial weights before the real ones are read
            pipe = kind.from_pretrained(
                folder,
                dtype=DTYPES[options.dtype],
                local_files_only=True,
                use_safetensors=True,
                variant=weights_variant(_network_folder(folder)),
                **left_out(kind),
            )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        reason = reason_of(error, 200)
        raise InputError(f"model {options.model_id!r} does not load from {folder}: {reason}") from error
    name = family.network_of(pipe)
    for part, why in ((name, "no hypernetwork can be made of it"), ("vae", "its noise is not that of a latent image")):
        if getattr(pipe, part, None) is None:
            raise InputError(f"{folder} holds a {found} without a {part}: {why}")
    parts.exchange_network(pipe, name, options)
    parts.fuse_lora(pipe, name, options)
    parts.exchange_scheduler(pipe, options)
    parts.require_schedule(pipe.scheduler, options)
    options = resolved(pipe, family, options)
    device = torch.device("cpu") if waits_for_shards(options) else find_device(options.device)
    leave_out_cudnn_attention(device)
    memory.apply_storage(getattr(pipe, name), options)
    encoders = encoder_names(pipe)
    for part, component in pipe.components.items():
        if part.startswith("tokenizer"):
            memory.drop_word_cache(component)
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            if part not in encoders:
                with memory.explained(memory.advice(options)):
                    component.to(device)
    for module in getattr(pipe, name).modules():
        if type(module).__name__ in family.training:
            module.train()
    memory.apply_decoder_options(pipe.vae, options)
    memory.set_checkpointing(getattr(pipe, name), options.generator_checkpointing)
    return pipe, family, options


def waits_for_shards(options: PipelineOptions) -> bool:
    """Whether the options ask for a network that is shared out, and there are processes to share it out over."""
    distributed = torch.distributed
    there = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return options.shard and there


class _Once(logging.Filter):
    """Lets each message through one time: pipelines say the same at every call, and training makes thousands."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        fresh = message not in self._said
        self._said.add(message)
        return fresh


class _NoImages(logging.Filter):
    """Drops what transformers says of image processors without torchvision: no image goes through one here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "requires torchvision" not in record.getMessage()


def say_once() -> None:
    """Have the libraries say each thing one time, and nothing that is of no concern here."""
    import diffusers.utils.logging
    import transformers.utils.logging

    assert diffusers.utils.logging  # it is there, and so are its handlers
    assert transformers.utils.logging
    for library, kind in (("diffusers", _Once), ("transformers", _NoImages)):
        for handler in logging.getLogger(library).handlers:
            if not any(isinstance(found, kind) for found in handler.filters):
                handler.addFilter(kind())


def text_to_image(name: str, where: object) -> Any:
    """The class of diffusers' pipelines of this name.

    Raises:
        InputError: there is none, or it takes no prompts; the message says `where` it was named.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "encode_prompt"):
        raise InputError(f"{where} holds a {name}: noise hypernetworks are for text-to-image pipelines of diffusers")
    return kind


def left_out(kind: type) -> dict[str, Any]:
    """Components that would paint over an image or look at it: none of them is differentiable."""
    accepted = inspect.signature(kind).parameters
    unwanted = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    return {name: value for name, value in unwanted.items() if name in accepted}


def resolved(pipe: Any, family: Family, options: PipelineOptions) -> PipelineOptions:
    """The options with the pipeline's own values where they leave something to it."""
    guidance = family.guidance_scale if options.guidance is None else options.guidance
    if all(options.sides):
        return replace(options, guidance=guidance)
    height, width = _own_sides(pipe, family.network_of(pipe))
    if height == width:
        return replace(options, guidance=guidance, size=height)
    return replace(options, guidance=guidance, height=options.height or height, width=options.width or width)


def _own_sides(pipe: Any, network: str) -> tuple[int, int]:
    """Height and width of the images that the pipeline makes where a caller says nothing."""
    parameters = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    height, width = (parameters[name].default if name in parameters else None for name in ("height", "width"))
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    found = getattr(pipe, "default_sample_size", None) or getattr(pipe, network).config.get("sample_size")
    sides = [found, found] if isinstance(found, int) else found
    if not (isinstance(sides, list | tuple) and len(sides) == 2 and all(isinstance(side, int) for side in sides)):
        return 1024, 1024
    factor = getattr(pipe, "vae_scale_factor", 8)
    return sides[0] * factor, sides[1] * factor


def find_model(model_id: str, local_files_only: bool = True) -> Path:
    """The folder of a model: `model_id` itself if it is one, else its snapshot in the local hub cache.

    Raises:
        InputError: it is neither, and downloading is off.
    """
    folder = local_folder(model_id)
    if folder is not None:
        return folder
    if model_id.endswith((".safetensors", ".ckpt", ".gguf")):
        raise InputError(
            f"backend.model_id {model_id!r} is a single file: store it as a folder once, by "
            "PIPELINE_CLASS.from_single_file(FILE).save_pretrained(FOLDER) of diffusers, and give that"
        )
    if model_id.startswith(("/", "./", "../", "~")):
        raise no_folder("backend.model_id", model_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if local_files_only:
            return Path(snapshot_download(model_id, local_files_only=True))
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(model_id, use_safetensors=True))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        if "/" not in model_id:  # every pipeline on the hub has an owner
            raise no_folder("backend.model_id", model_id) from error
        raise missing_model("backend.model_id", model_id, error, local_files_only=local_files_only) from error


def _network_folder(folder: Path) -> Path:
    return folder / ("transformer" if (folder / "transformer").is_dir() else "unet")


def _class_name(folder: Path) -> str:
    try:
        return str(json.loads(read_plain(folder / "model_index.json"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} has no readable model_index.json: give a folder in diffusers' format") from error


def leave_out_cudnn_attention(device: torch.device) -> None:
    """On a card, switch cuDNN's attention off in this process; torch has three other kernels.

    Its backward pass in half precision gives gradients that are not finite, or an illegal access that ends the process,
    at some lengths of sequences on cards of the H100 class: torch 2.11 to 2.13, pytorch/pytorch#196678. FLUX's are
    among them. For the whole process, since rewards have attention as well and blocks are recomputed in the backward
    pass, out of any context.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


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
