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
from hnkit.maps import Condition
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.backend import Known, PipelineBackend
from hnkit.scaled.pipelines.calls import StandIn, view
from hnkit.scaled.pipelines.conditions import Leaf, TextLayout
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.families.table import family_of
from hnkit.scaled.pipelines.hypernetwork import FirstStep
from hnkit.scaled.pipelines.layout import Layout
from hnkit.scaled.pipelines.loading import find_model, left_out
from hnkit.scaled.pipelines.options import DTYPES, PipelineOptions
from hnkit.scaled.pipelines.published import PUBLISHED_MODELS
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
    family, pipe = _pipeline(name, family, options)
    texts, shapes = planned_texts(family, pipe, options)
    layout = planned_layout(family, pipe, options, texts, shapes)
    known = Known(ShapesOnly(mode, shapes, DTYPES[options.dtype]), texts, layout)

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
        encoders=0,
    )


Planned = tuple[TextLayout, dict[str, tuple[int, ...]]]
"""How encoded texts are laid out, and the shape of one prompt's row in each of their tensors."""


def _sana_texts(pipe: Any, options: PipelineOptions) -> Planned:
    """Tokens of the encoder's width, and a mask of them."""
    tokens = options.max_sequence_length or 300
    names = ("prompt_embeds", "prompt_attention_mask")
    shapes: dict[str, tuple[int, ...]] = {names[0]: (tokens, pipe.transformer.config.caption_channels)}
    return TextLayout([tuple(Leaf(name, "rows") for name in names)], False, True), shapes | {names[1]: (tokens,)}


def _stable_diffusion_texts(pipe: Any, _: PipelineOptions) -> Planned:
    """CLIP's 77 tokens, of the width that the network attends to."""
    template = [(Leaf("0.0", "rows"), Leaf("0.1", "fixed"))]
    return TextLayout(template, False, True), {"0.0": (77, pipe.unet.config.cross_attention_dim)}


def _flux_texts(pipe: Any, options: PipelineOptions) -> Planned:
    """T5's tokens, CLIP's pooled embedding, and positions of zeros."""
    config, tokens = pipe.transformer.config, options.max_sequence_length or 512
    positions = Leaf("0.2", "fixed", value=torch.zeros(tokens, 3))
    template = [(Leaf("0.0", "rows"), Leaf("0.1", "rows"), positions)]
    shapes = {"0.0": (tokens, config.joint_attention_dim), "0.1": (config.pooled_projection_dim,)}
    return TextLayout(template, False, True), shapes


_TEXTS: Mapping[str, Callable[[Any, Any], Planned]] = {
    "SanaSprintPipeline": _sana_texts,
    "StableDiffusionPipeline": _stable_diffusion_texts,
    "FluxPipeline": _flux_texts,
}


def planned_texts(family: Family, pipe: Any, options: PipelineOptions) -> Planned:
    """What a prompt's texts become in a pipeline whose text encoders are not there.

    Raises:
        InputError: for this class that is not written down.
    """
    if family.pipeline_class not in _TEXTS:
        raise InputError(f"no plan for a {family.pipeline_class}: plans are made of {', '.join(_TEXTS)}")
    return _TEXTS[family.pipeline_class](pipe, options)


def planned_layout(
    family: Family,
    pipe: Any,
    options: PipelineOptions,
    texts: TextLayout,
    shapes: Any,
    device: torch.device | None = None,
) -> Layout:
    """The layouts of the noise: all that a pipeline does before its network can be run without weights.

    `device` is where the pipeline's tensors are, by default the CPU.
    """
    device = device or torch.device("cpu")
    bare = view(pipe, vae=StandIn(pipe.vae, lambda *_, **__: None))
    tensors = {
        name: torch.zeros(1, *shape, dtype=torch.long if "mask" in name else DTYPES[options.dtype], device=device)
        for name, shape in shapes.items()
    }
    step = FirstStep(family, bare, texts, options, device=device)
    return step.layout(options.sides, Condition(("",), tensors))


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


def _pipeline(backend: str, family: Family | None, options: PipelineOptions) -> tuple[Family, Any]:
    """The record of the model's class and the pipeline without text encoders; all tensors are on the device `meta`."""
    import diffusers

    found, configs = component_configs(options.model_id)
    if family is not None and found != family.pipeline_class:
        raise InputError(f"{options.model_id} is a {found}: backend {backend} needs a {family.pipeline_class}")
    family = family or family_of(found)
    try:
        network = family.network or ("transformer" if "transformer" in configs else "unet")
        parts = {name: _component(configs[name], DTYPES[options.dtype]) for name in (network, "vae")}
        scheduler: Any = getattr(diffusers, configs["scheduler"]["_class_name"])
        parts["scheduler"] = scheduler.from_config(configs["scheduler"])
        pipeline: Any = getattr(diffusers, family.pipeline_class)
        absent = {name: None for name in pipeline._get_signature_keys(pipeline)[0] if name not in parts}
        pipe = pipeline(**(absent | parts | left_out(pipeline)))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"no plan for {options.model_id!r}: its configuration is damaged ({reason_of(error)})"
        ) from error
    memory.apply_decoder_options(pipe.vae, options)
    memory.apply_storage(getattr(pipe, network), options)
    memory.set_checkpointing(getattr(pipe, network), options.generator_checkpointing)
    return family, pipe


def _component(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    import diffusers

    component: Any = getattr(diffusers, config["_class_name"])
    module: nn.Module = without_weights(lambda: component.from_config(dict(config)))
    kept = getattr(component, "_keep_in_fp32_modules", None) or ()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not any(part in name.split(".") for part in kept):
            tensor.data = tensor.data.to(dtype)
    return module.requires_grad_(False).eval()
