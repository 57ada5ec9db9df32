"""Skeletons of published models by a plain call of their network and decoder, one forward pass each, for `plans.py`.

What a pipeline does around the two (schedules, packing, conversions) is left out: it is small beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from hnkit.backend import BackendBase
from hnkit.maps import Condition
from hnkit.scaled.lora.twin import LoraSpec, lora_targets, make_twin
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.options import DTYPES, PipelineOptions
from hnkit.scaled.pipelines.published import PUBLISHED_MODELS
from hnkit.training.plan.skeleton import Objective, Skeleton, fake_mode, make_fake, without_weights

Tensors = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plain:
    """How a network and its decoder are called at 1024 x 1024 pixels, or at 512 x 512 where that is said.

    Attributes:
        last: name of the network's last layer.
        noise: shape of one row of noise as the network takes it.
        texts: shape of one row of each embedding.
        call: `(network, noise, embeddings)` to the network's output.
        latents: shape of one row as the decoder takes it.
    """

    last: str
    noise: Shape
    texts: Mapping[str, Shape]
    call: Callable[[nn.Module, Tensor, Tensors], Tensor]
    latents: Shape


def _xl(network: Any, x: Tensor, texts: Tensors) -> Tensor:
    added = {"text_embeds": texts["pooled"], "time_ids": torch.zeros(len(x), 6, dtype=x.dtype)}
    found: Tensor = network(x, 999, texts["tokens"], added_cond_kwargs=added, return_dict=False)[0]
    return found


def _sd3(network: Any, x: Tensor, texts: Tensors) -> Tensor:
    time = torch.ones(len(x), dtype=x.dtype)
    found: Tensor = network(x, texts["tokens"], texts["pooled"], time, return_dict=False)[0]
    return found


def _z_image(network: Any, x: Tensor, texts: Tensors) -> Tensor:
    time = torch.ones(len(x), dtype=x.dtype)
    found = network([row.unsqueeze(1) for row in x], time, list(texts["tokens"]), return_dict=False)[0]
    return torch.stack([row.squeeze(1) for row in found])


def _grid(count: int, side: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([torch.zeros_like(rows), rows, columns, torch.zeros_like(rows)], -1)
    return place.reshape(1, side * side, 4).repeat(count, 1, 1)


def _klein(network: Any, x: Tensor, texts: Tensors) -> Tensor:
    tokens = texts["tokens"]
    found: Tensor = network(
        hidden_states=x,
        encoder_hidden_states=tokens,
        timestep=torch.ones(len(x), dtype=x.dtype),
        img_ids=_grid(len(x), 64),
        txt_ids=torch.zeros(len(x), tokens.shape[1], 4, dtype=torch.long),
        guidance=None,
        return_dict=False,
    )[0]
    return found


def _qwen(network: Any, x: Tensor, texts: Tensors) -> Tensor:
    found: Tensor = network(
        hidden_states=x,
        encoder_hidden_states=texts["tokens"],
        timestep=torch.ones(len(x), dtype=x.dtype),
        img_shapes=[[(1, 64, 64)]] * len(x),
        return_dict=False,
    )[0]
    return found


PLAIN: dict[str, Plain] = {
    "stabilityai/sdxl-turbo": Plain(
        "conv_out", (4, 64, 64), {"tokens": (77, 2048), "pooled": (1280,)}, _xl, (4, 64, 64)
    ),  # 512 px, its own size
    "stabilityai/stable-diffusion-3.5-large-turbo": Plain(
        "proj_out", (16, 128, 128), {"tokens": (333, 4096), "pooled": (2048,)}, _sd3, (16, 128, 128)
    ),
    "Tongyi-MAI/Z-Image-Turbo": Plain(
        "all_final_layer.2-1.linear", (16, 128, 128), {"tokens": (512, 2560)}, _z_image, (16, 128, 128)
    ),
    "black-forest-labs/FLUX.2-klein-4B": Plain(
        "proj_out", (4096, 128), {"tokens": (512, 7680)}, _klein, (32, 128, 128)
    ),
    "Qwen/Qwen-Image": Plain("proj_out", (4096, 64), {"tokens": (512, 3584)}, _qwen, (16, 1, 128, 128)),
}
"""Prompts are as long as the pipelines allow by default."""


class PlainBackend(BackendBase):
    """A network, its twin and a decoder, called plainly."""

    def __init__(self, plain: Plain, network: nn.Module, vae: nn.Module, options: PipelineOptions) -> None:
        self.name, self.plain, self.network, self.vae = "plain", plain, network, vae
        self.noise_shape, self.dtype = plain.noise, DTYPES[options.dtype]
        spec = LoraSpec(options.rank, options.lora_alpha, lora_targets(network))
        twin = make_twin(network, spec, zero_base=plain.last)
        memory.set_checkpointing(twin, options.hypernetwork_checkpointing)
        self.hypernetwork = _Called(plain, twin, self.dtype)
        self.mode: Any = None

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Embeddings of the right shapes."""
        with self.mode:
            rows = {key: torch.zeros(len(prompts), *s, dtype=self.dtype) for key, s in self.plain.texts.items()}
        return Condition(tuple(prompts), rows)

    def generate(self, noise: Tensor, condition: Condition, steps: int = 1) -> Tensor:
        """One evaluation of the network, and the decoder."""
        latents = self.plain.call(self.network, noise.to(self.dtype), condition.tensors)
        vae: Any = self.vae
        images = vae.decode(latents.reshape(len(noise), *self.plain.latents), return_dict=False)[0]
        images = images[:, :, 0] if images.dim() == 5 else images
        return (images / 2 + 0.5).clamp(0, 1).float()

    def save_adapter(self, folder: Path) -> None:
        """Nothing is trained."""
        raise NotImplementedError

    def load_adapter(self, folder: Path) -> None:
        """Nothing is trained."""
        raise NotImplementedError


class _Called(nn.Module):
    def __init__(self, plain: Plain, twin: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.plain, self.twin, self.dtype = plain, twin, dtype

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        """The delta, float32."""
        return self.plain.call(self.twin, noise.to(self.dtype), condition.tensors).float()


class PlainFactory:
    """A factory of skeletons alone."""

    name = "plain"
    options = PipelineOptions
    savers: ClassVar[Mapping[str, str]] = memory.SAVERS

    def skeleton(self, options: PipelineOptions, objective: Objective = "hypernoise") -> Skeleton:
        """The model of `options` on fake tensors."""
        model, plain, mode = PUBLISHED_MODELS[options.model_id], PLAIN[options.model_id], fake_mode()
        built = {name: _component(model.components[name], options) for name in (model.network, "vae")}
        network, vae = built[model.network], built["vae"]
        memory.apply_decoder_options(vae, options)
        memory.set_checkpointing(network, options.generator_checkpointing)
        backend = without_weights(lambda: PlainBackend(plain, network, vae, replace(options, device="cpu")))
        make_fake(mode, (network, vae, backend.hypernetwork))
        backend.mode = mode
        return Skeleton(backend, {"network": network, "decoder": vae}, (vae, "decode"), mode)


def _component(config: Mapping[str, Any], options: PipelineOptions) -> nn.Module:
    kind: Any = getattr(diffusers, config["_class_name"])
    module: nn.Module = without_weights(lambda: kind.from_config(dict(config)))
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(DTYPES[options.dtype])
    return module.requires_grad_(False).eval()
