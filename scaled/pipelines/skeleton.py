"""A pipeline backend without weights: its configuration alone, on fake tensors, so that a step of it can be counted."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hnkit.errors import InputError
from hnkit.internal.files import read_plain
from hnkit.internal.values import reason_of
from hnkit.maps import Condition
from hnkit.scaled.lora.twin import set_autocast
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.backend import Known, PipelineBackend
from hnkit.scaled.pipelines.calls import StandIn, view
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.families.table import family_of
from hnkit.scaled.pipelines.hypernetwork import FirstStep
from hnkit.scaled.pipelines.layout import Layout
from hnkit.scaled.pipelines.loading import find_model, left_out, resolved, say_once, text_to_image
from hnkit.scaled.pipelines.options import DTYPES, PipelineOptions
from hnkit.scaled.pipelines.parts import exchange_scheduler
from hnkit.scaled.pipelines.published import PUBLISHED_MODELS
from hnkit.scaled.pipelines.texts import PlannedTexts, ShapesOnly, encoders_size, planned_texts
from hnkit.training.plan.ledger import stored
from hnkit.training.plan.skeleton import Objective, Skeleton, fake_mode, make_fake, without_weights


def make_skeleton(
    name: str,
    family: Family | None,
    options: PipelineOptions,
    build: Callable[..., PipelineBackend],
    objective: Objective,
) -> Skeleton:
    """The backend of these options on fake tensors on the CPU, whatever device they name.

    Args:
        name: the backend's name.
        family: what is particular to the pipeline's class; `None`: that of the model's configuration.
        options: the backend's, with the model named.
        build: makes the backend of `(family, options, pipeline, known=...)`.
        objective: whether f or the generator itself is trained.

    Raises:
        InputError: the model's configuration is neither in a folder here nor among the published ones, or is another
            pipeline's; or what the texts of its class become is not written down here.
    """
    options = replace(options, device="cpu", compile="no", cache_dir="")
    mode = fake_mode()
    family, pipe, encoders = _pipeline(name, family, options)
    exchange_scheduler(pipe, options)
    options = resolved(pipe, family, options)
    texts = planned_texts(family, pipe, options)
    layout = planned_layout(family, pipe, options, texts)
    known = Known(ShapesOnly(mode, texts, DTYPES[options.dtype]), texts.layout, layout)

    def built() -> PipelineBackend:
        backend = build(family, options, pipe, known=known)
        return backend.direct() if objective == "direct" else backend

    backend = without_weights(built)
    network = getattr(pipe, family.network_of(pipe))
    make_fake(mode, (network, pipe.vae, backend.hypernetwork))
    return Skeleton(
        backend=backend,
        frozen={"network": network, "decoder": pipe.vae},
        decode=(pipe.vae, "decode"),
        mode=mode,
        encoders=encoders,
        whole=_whole(network) if options.shard else 0,
        switched=functools.partial(_switched, backend),
    )


@contextlib.contextmanager
def _switched(backend: PipelineBackend, names: Iterable[str]) -> Iterator[None]:
    """Inside, these options of `memory.SAVERS` are on."""
    switches: dict[str, Callable[[bool], None]] = {
        "vae_checkpointing": functools.partial(memory.set_decoder_checkpointing, backend.pipeline.vae),
        "generator_checkpointing": functools.partial(memory.set_checkpointing, backend.network),
        "hypernetwork_checkpointing": functools.partial(memory.set_checkpointing, backend._twin),
        "lora_autocast": functools.partial(set_autocast, backend._twin, backend.lora, backend.last_layer),
    }
    chosen = [switches[name] for name in names]
    for switch in chosen:
        switch(True)
    try:
        yield
    finally:
        for switch in chosen:
            switch(False)


def _whole(network: nn.Module) -> int:
    """Bytes that a process has whole of a network that it shares out.

    They are what is in no block, once for the generator and once for f, and a block while it runs beside the next one.
    """
    blocks = [stored(block.parameters()) for blocks in memory.block_lists(network) for block in blocks]
    return 2 * (stored(network.parameters()) - sum(blocks)) + 2 * max(blocks, default=0)


def planned_layout(
    family: Family, pipe: Any, options: PipelineOptions, texts: PlannedTexts, device: torch.device | None = None
) -> Layout:
    """The layouts of the noise: all that a pipeline does before its network can be run without weights.

    `device` is where the pipeline's tensors are, by default the CPU.
    """
    device = device or torch.device("cpu")
    bare = view(pipe, vae=StandIn(pipe.vae, lambda *_, **__: None))
    tensors = {name: value.to(device) for name, value in texts.rows(1, DTYPES[options.dtype]).items()}
    step = FirstStep(family, bare, texts.layout, options, device=device)
    return step.layout(options.sides, Condition(("",), tensors))


def component_configs(model_id: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The pipeline class of a model, and the configuration of each of its components, by name.

    Raises:
        InputError: there is no folder of it here and its configuration is not written down.
    """
    try:
        folder = find_model(model_id)
    except InputError:
        if model_id in PUBLISHED_MODELS:
            model = PUBLISHED_MODELS[model_id]
            return model.pipeline, {name: dict(config) for name, config in model.components.items()}
        raise InputError(
            f"no plan for {model_id!r}: its configuration is not here; give backend.model_id as a folder with its "
            f"config.json files (weights are not needed), or one of {', '.join(PUBLISHED_MODELS)}"
        ) from None
    return _read_configs(folder)


def _read_configs(folder: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    try:
        index = json.loads(read_plain(folder / "model_index.json"))
        configs = {}
        for name, entry in index.items():
            for file in ("config.json", "scheduler_config.json"):
                if (folder / name / file).is_file():
                    found = json.loads(read_plain(folder / name / file))
                    configs[name] = {"_class_name": entry[1], **found}  # transformers' files do not name it
        return str(index["_class_name"]), configs
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is not a readable model ({reason_of(error)}): give diffusers' format") from error


def _pipeline(backend: str, family: Family | None, options: PipelineOptions) -> tuple[Family, Any, int]:
    """The record of the model's class, the pipeline without text encoders, and the bytes of these.

    All tensors are on the device `meta`.
    """
    import diffusers

    say_once()
    found, configs = component_configs(options.model_id)
    if family is not None and found != family.pipeline_class:
        raise InputError(f"{options.model_id} is a {found}: backend {backend} needs a {family.pipeline_class}")
    pipeline = text_to_image(found, options.model_id)
    family = family or family_of(found)
    network = family.network or ("transformer" if "transformer" in configs else "unet")
    if missing := [name for name in (network, "vae", "scheduler") if name not in configs]:
        raise InputError(
            f"no plan for {options.model_id!r}: the configuration of its {missing[0]} is not there; the folder needs "
            "that of every component, as diffusers saves them (weights are not needed)"
        )
    try:
        parts = {name: _component(configs[name], DTYPES[options.dtype]) for name in (network, "vae")}
        scheduler: Any = getattr(diffusers, configs["scheduler"]["_class_name"])
        parts["scheduler"] = scheduler.from_config(configs["scheduler"])
        absent = {name: None for name in pipeline._get_signature_keys(pipeline)[0] if name not in parts}
        pipe = pipeline(**(absent | parts | left_out(pipeline)))
        encoders = encoders_size(configs, DTYPES[options.dtype])
    except Exception as error:  # whatever the libraries' classes raise where a value is missing or nonsense
        raise InputError(
            f"no plan for {options.model_id!r}: its configuration is damaged ({reason_of(error)})"
        ) from error
    memory.apply_decoder_options(pipe.vae, options)
    memory.apply_storage(getattr(pipe, network), options)
    memory.set_checkpointing(getattr(pipe, network), options.generator_checkpointing)
    return family, pipe, encoders


def _component(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    import diffusers

    component: Any = getattr(diffusers, config["_class_name"])
    module: nn.Module = without_weights(lambda: component.from_config(dict(config)))
    kept = getattr(component, "_keep_in_fp32_modules", None) or ()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not any(part in name.split(".") for part in kept):
            tensor.data = tensor.data.to(dtype)
    return module.requires_grad_(False).eval()
