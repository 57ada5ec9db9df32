"""Python code for the model card of an adapter."""

from __future__ import annotations

from typing import Any

from hnkit.scaled.pipelines.calls import plain_arguments
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.options import PipelineOptions
from hnkit.scaled.pipelines.parts import scheduler_settings, split_hub_file

_LOADERS = (("huggingface_hub", "hf_hub_download"), ("safetensors.torch", "load_file"))


def direct_code(backend: str, rank: int, alpha: float) -> str:
    """How the LoRA of direct fine-tuning, whose folder is `adapter`, is used."""
    return (
        "from hnkit.backend import backend_factory\n\n"
        f"factory = backend_factory({backend!r})\n"
        f"options = factory.options(rank={rank}, lora_alpha={alpha:g})\n"
        "generator = factory.load(options).direct()\n"
        "generator.load_adapter(adapter)"
    )


def attach_code(family: Family, pipe: Any, network: str, options: PipelineOptions, variant: str | None = None) -> str:
    """How a hypernetwork, whose folder is `adapter`, is attached to the pipeline that these options make."""
    called = plain_arguments(family, pipe, options)
    arguments = ", ".join(f"{key}={value!r}" for key, value in called.items())
    kind = type(pipe).__name__
    imports, lines = _parts_code(pipe, network, options)
    names = ", ".join(dict.fromkeys([kind, *imports]))
    half = options.dtype != "float32"
    loaded = [repr(options.model_id), *([f"dtype=torch.{options.dtype}"] if half else [])]
    loaded += [f"variant={variant!r}"] if variant else []
    return "\n".join(
        [
            *(["import torch"] if half else []),
            f"from diffusers import {names}",
            "from hnkit.scaled.attach import attach",
            *[f"from {module} import {name}" for module, name in _LOADERS if any(f"{name}(" in line for line in lines)],
            "",
            f"pipe = {kind}.from_pretrained({', '.join(loaded)})",
            *lines,
            "pipe = attach(pipe, adapter)",
            f"images = pipe(prompt=prompt, {arguments}).images",
        ]
    )


def _parts_code(pipe: Any, name: str, options: PipelineOptions) -> tuple[list[str], list[str]]:
    """Classes to import, and the lines that exchange network, LoRA and scheduler as the backend did."""
    imports, lines = [], []
    if options.network_id.endswith(".safetensors"):
        place = split_hub_file(options.network_id)
        file = f"hf_hub_download({place[0]!r}, {place[1]!r})" if place else repr(options.network_id)
        lines.append(f"pipe.{name}.load_state_dict(load_file({file}))")
    elif options.network_id:
        imports.append(type(getattr(pipe, name)).__name__)
        lines.append(f"pipe.{name} = {imports[-1]}.from_pretrained({options.network_id!r})")
    if options.lora:
        place = split_hub_file(options.lora)
        source = f"{place[0]!r}, weight_name={place[1]!r}" if place else repr(options.lora)
        lines += [
            f"pipe.load_lora_weights({source})",
            f"pipe.fuse_lora(components=[{name!r}], lora_scale={options.lora_scale!r})",
            "pipe.unload_lora_weights()",
        ]
    if options.scheduler or options.scheduler_config:
        kind = type(pipe.scheduler).__name__
        settings = "".join(f", {key}={value!r}" for key, value in scheduler_settings(options).items())
        imports.append(kind)
        lines.append(f"pipe.scheduler = {kind}.from_config(pipe.scheduler.config{settings})")
    return imports, lines
