"""Backends at the published sizes with random weights, for benchmarks: nothing is downloaded.

Network and decoder are made once, on the device; each backend on them has modules of its own over the same weights, so
that the options of one do not reach the next. Text encoders are left out: embeddings are random, and training needs
the encoders only once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from hnkit.backend import backend_factory
from hnkit.maps import Condition
from hnkit.scaled.lora.twin import share_weights
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.backend import Known, PipelineBackend
from hnkit.scaled.pipelines.families.table import family_of
from hnkit.scaled.pipelines.loading import leave_out_cudnn_attention, left_out
from hnkit.scaled.pipelines.options import DTYPES, PipelineOptions
from hnkit.scaled.pipelines.published import PUBLISHED_MODELS
from hnkit.scaled.pipelines.skeleton import planned_layout
from hnkit.scaled.pipelines.texts import PlannedTexts, planned_texts

TOKENS = 40
"""Tokens of a prompt, where a mask says how many there are."""
SMALL: Mapping[str, Mapping[str, Any]] = {
    "SanaTransformer2DModel": {
        "num_attention_heads": 4, "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 64,
        "cross_attention_dim": 128, "caption_channels": 64,
    },
    "AutoencoderDC": {
        "encoder_block_out_channels": [16, 16, 16, 32, 32, 32], "encoder_layers_per_block": [1] * 6,
        "decoder_block_out_channels": [16, 16, 16, 32, 32, 32], "decoder_layers_per_block": [1] * 6,
    },
    "FluxTransformer2DModel": {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
    },
    "AutoencoderKL": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
}  # fmt: skip
"""What is smaller in the layers of a run without a GPU; classes and connections are the same."""


@dataclass(frozen=True)
class Model:
    """A published model with random weights.

    Attributes:
        name: the backend's.
        options: the defaults of its backend, at the device and type of the weights.
        pipe: the pipeline, without text encoders.
        network: the name of the component that f is the twin of.
    """

    name: str
    options: Any
    pipe: Any
    network: str

    @property
    def parameters(self) -> int:
        """Parameters of the network."""
        return sum(parameter.numel() for parameter in getattr(self.pipe, self.network).parameters())

    def backend(self, **changes: Any) -> PipelineBackend:
        """A backend with these options, on modules of its own over the model's weights.

        Weights that are stored in another way are so from then on, for later backends as well: the model's own would
        have to stay beside them.
        """
        options: PipelineOptions = replace(self.options, **changes)
        memory.apply_storage(getattr(self.pipe, self.network), options)
        family = family_of(type(self.pipe).__name__)
        parts = {name: self.pipe.components[name] for name in self.pipe.components}
        parts |= {name: share_weights(parts[name]) for name in (self.network, "vae")}
        pipe = type(self.pipe)(**parts, **left_out(type(self.pipe)))
        memory.apply_decoder_options(pipe.vae, options)
        memory.set_checkpointing(getattr(pipe, self.network), options.generator_checkpointing)
        texts = planned_texts(family, pipe, options)
        device = next(getattr(pipe, self.network).parameters()).device
        layout = planned_layout(family, pipe, options, texts, device)
        known = Known(RandomTexts(texts, DTYPES[options.dtype]), texts.layout, layout)
        return PipelineBackend(family, options, pipe, name=self.name, known=known)


@dataclass(frozen=True)
class RandomTexts:
    """In the place of an `EmbeddingCache`: random embeddings, and masks of `TOKENS` tokens."""

    texts: PlannedTexts
    dtype: torch.dtype

    def rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        found = self.texts.rows(len(prompts), self.dtype)
        for name, shape in self.texts.shapes.items():
            if "mask" in name:
                found[name] = (torch.arange(shape[0]) < TOKENS).long().repeat(len(prompts), 1)
            elif name not in self.texts.whole:
                found[name] = torch.randn(len(prompts), *shape, generator=generator).to(self.dtype)
        return found


def make(name: str, tiny: bool, layers: Mapping[str, Mapping[str, Any]] = SMALL, **changes: Any) -> Model:
    """The model of a backend's default options: on the GPU in bfloat16, or of small `layers` on the CPU in float32."""
    device, dtype = ("cpu", "float32") if tiny else ("cuda", "bfloat16")
    options = backend_factory(name).options(device=device, dtype=dtype, cache_dir="", self_check=False)
    options = replace(options, **changes)
    published = PUBLISHED_MODELS[options.model_id]
    leave_out_cudnn_attention(torch.device(device))
    torch.manual_seed(0)
    parts: dict[str, Any] = {}
    for part, config in published.components.items():
        if part.startswith("text_encoder"):
            continue
        values = {key: value for key, value in config.items() if key != "_class_name"}
        kind: Any = getattr(diffusers, config["_class_name"])
        small = layers.get(config["_class_name"], {}) if tiny else {}
        parts[part] = _made(kind, values | small, torch.device(device), DTYPES[dtype])
    pipeline: Any = getattr(diffusers, published.pipeline)
    absent = {part: None for part in pipeline._get_signature_keys(pipeline)[0] if part not in parts}
    return Model(name, options, pipeline(**(absent | parts | left_out(pipeline))), published.network)


def _made(kind: Any, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A component with the library's own random weights, made where and as it is used."""
    if not issubclass(kind, nn.Module):  # a scheduler
        return kind.from_config(dict(config))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            made = kind.from_config(dict(config))
    finally:
        torch.set_default_dtype(before)
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(device, dtype)
    return made.requires_grad_(False).eval()


def condition(backend: PipelineBackend, count: int) -> Condition:
    """The condition of `count` prompts."""
    return backend.encode([f"prompt {number}" for number in range(count)])


def machine(tiny: bool) -> str:
    """What the figures are of."""
    import platform

    return f"{platform.machine()} CPU, small layers" if tiny else torch.cuda.get_device_name()
