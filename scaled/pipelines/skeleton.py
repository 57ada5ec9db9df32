"""A pipeline backend without weights: its configuration alone, on fake tensors, so that a step of it can be counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hnkit.errors import InputError
from hnkit.internal.values import reason_of
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.backend import PipelineBackend
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.loading import find_model
from hnkit.scaled.pipelines.options import DTYPES, PipelineOptions
from hnkit.scaled.pipelines.published import PUBLISHED_MODELS
from hnkit.training.plan.skeleton import Objective, Skeleton, fake_mode, make_fake, without_weights


def make_skeleton(
    family: Family, options: PipelineOptions, build: Callable[..., PipelineBackend], objective: Objective
) -> Skeleton:
    """The backend of these options on fake tensors on the CPU, whatever device they name.

    Args:
        family: what is particular to the pipeline's class.
        options: the backend's, with the model named.
        build: makes the backend of `(family, options, pipeline, cache=...)`.
        objective: whether f or the generator itself is trained.

    Raises:
        InputError: the model's configuration is neither in a folder here nor among the published ones, or is another
            pipeline's.
    """
    options = replace(options, device="cpu", compile="no", cache_dir="")
    mode = fake_mode()
    pipe = _pipeline(family, options)
    shapes = ShapesOnly(mode, family.embedding_shapes(pipe, options), DTYPES[options.dtype])

    def built() -> PipelineBackend:
        backend = build(family, options, pipe, cache=shapes)
        return backend.direct() if objective == "direct" else backend

    backend = without_weights(built)
    network = getattr(pipe, family.network)
    make_fake(mode, (network, pipe.vae, backend.hypernetwork))
    return Skeleton(
        backend=backend,
        frozen={"network": network, "decoder": pipe.vae},
        decode=(pipe.vae, "decode"),
        mode=mode,
        encoders=0,
    )


@dataclass(frozen=True)
class ShapesOnly:
    """In the place of an `EmbeddingCache`: embeddings of the right shapes, whatever the prompts."""

    mode: FakeTensorMode
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    def rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Fake embeddings of `len(prompts)` rows; a mask is of whole numbers."""
        with self.mode:
            return {
                name: torch.zeros(len(prompts), *shape, dtype=torch.long if "mask" in name else self.dtype)
                for name, shape in self.shapes.items()
            }

    def store(self, prompts: Sequence[str]) -> None:
        """Nothing is encoded."""


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
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        configs = {}
        for name in index:
            for file in ("config.json", "scheduler_config.json"):
                if (folder / name / file).is_file():
                    configs[name] = json.loads((folder / name / file).read_text(encoding="utf-8"))
        return str(index["_class_name"]), configs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is not a readable model ({reason_of(error)}): give diffusers' format") from error


def _pipeline(family: Family, options: PipelineOptions) -> Any:
    """The pipeline without text encoders; all tensors are on the device `meta`."""
    import diffusers

    found, configs = component_configs(options.model_id)
    if found != family.pipeline_class:
        raise InputError(f"{options.model_id} is a {found}: backend {family.name} needs a {family.pipeline_class}")
    try:
        parts = {name: _component(configs[name], DTYPES[options.dtype]) for name in (family.network, "vae")}
        scheduler: Any = getattr(diffusers, configs["scheduler"]["_class_name"])
        parts["scheduler"] = scheduler.from_config(configs["scheduler"])
        pipeline: Any = getattr(diffusers, family.pipeline_class)
        absent = {name: None for name in pipeline._get_signature_keys(pipeline)[0] if name not in parts}
        pipe = pipeline(**(absent | parts | dict(family.load_arguments)))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"no plan for {options.model_id!r}: its configuration is damaged ({reason_of(error)})"
        ) from error
    memory.apply_decoder_options(pipe.vae, options)
    memory.set_checkpointing(getattr(pipe, family.network), options.generator_checkpointing)
    return pipe


def _component(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    import diffusers

    component: Any = getattr(diffusers, config["_class_name"])
    module: nn.Module = without_weights(lambda: component.from_config(dict(config)))
    kept = getattr(component, "_keep_in_fp32_modules", None) or ()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not any(part in name.split(".") for part in kept):
            tensor.data = tensor.data.to(dtype)
    return module.requires_grad_(False).eval()
