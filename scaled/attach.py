"""A trained noise hypernetwork in plain diffusers code.

Three lines, the first and last of them diffusers' own:

    pipe = SanaSprintPipeline.from_pretrained("Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers").to("cuda")
    pipe = attach(pipe, "runs/my-run/adapter")
    image = pipe("a red fox", num_inference_steps=2, generator=torch.Generator("cuda").manual_seed(0)).images[0]
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.maps import Condition
from hnkit.scaled.lora.adapter import Adapter, adapter_options, read_adapter
from hnkit.scaled.lora.twin import LoraSpec, load_lora, lora_targets, make_twin
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.families.flux import FluxFamily
from hnkit.scaled.pipelines.families.sana import SanaFamily
from hnkit.scaled.pipelines.families.sd_turbo import SDTurboFamily
from hnkit.scaled.pipelines.hypernetwork import HyperNetwork

FAMILIES: tuple[Family, ...] = (SanaFamily(), SDTurboFamily(), FluxFamily())
_GUIDANCE = {"sana": 4.5}


def attach(pipe: Any, adapter: str | Path) -> SteeredPipeline:
    """A pipeline that moves its noise by a trained hypernetwork and otherwise is `pipe`, which is left unmodified.

    Args:
        pipe: a loaded diffusers pipeline of one of the supported classes, on its device.
        adapter: folder of a trained adapter (hnkit's, or in the layout of the paper's published one).

    Raises:
        InputError: another pipeline class, offloading hooks, or an adapter that does not belong to this model.
    """
    family = next((family for family in FAMILIES if family.pipeline_class == type(pipe).__name__), None)
    if family is None:
        known = ", ".join(family.pipeline_class for family in FAMILIES)
        raise InputError(f"a {type(pipe).__name__} was given: noise hypernetworks exist for {known}")
    if getattr(pipe, "_all_hooks", None):
        raise InputError("the pipeline has offloading hooks: attach the adapter to a pipeline without them")
    folder = Path(adapter)
    base = getattr(pipe, family.network)
    options = adapter_options(folder)
    expected = Adapter(
        objective="hypernoise",
        base_model=str(pipe.config._name_or_path),
        base=base,
        spec=LoraSpec(int(options["rank"]), options["lora_alpha"], lora_targets(base)),
        zero_base=family.last_layer,
        guidance=_GUIDANCE.get(family.name, 0.0),
        weights={},
    )
    found = read_adapter(folder, expected)
    twin = make_twin(base, found.spec, zero_base=family.last_layer)
    load_lora(twin, found.weights)
    hint = "a smaller batch, or pipe.vae.enable_slicing()"
    return SteeredPipeline(pipe, HyperNetwork(family, pipe, twin, found.guidance, hint), family)


class SteeredPipeline:
    """A diffusers pipeline whose noise x is replaced by x + f(x); takes every argument that the pipeline takes.

    Each call works on a shallow copy of the pipeline that notes the prompt embeddings on their way from
    `encode_prompt` and moves the noise on its way out of `prepare_latents`; the sampler is the library's, and so is
    the order of random draws: with f = 0 the images are bit-equal to the plain pipeline's. One forward of f is added,
    whatever the number of steps. Every other attribute is the pipeline's.
    """

    def __init__(self, pipe: Any, hypernetwork: HyperNetwork, family: Family) -> None:
        self.pipe = pipe
        self.hypernetwork = hypernetwork
        self.family = family

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline's own call returns."""
        tensors: dict[str, Tensor] = {}

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            encoded = self.pipe.encode_prompt(*args, **kwargs)
            if not tensors:  # a second call is for a negative prompt
                tensors.update(self.family.embeddings(encoded))
            return encoded

        def prepare_latents(
            count: int, channels: int, height: int, width: int, dtype: torch.dtype, *args: Any, **kwargs: Any
        ) -> Any:
            prepared = self.pipe.prepare_latents(count, channels, height, width, dtype, *args, **kwargs)
            latents = prepared[0] if isinstance(prepared, tuple) else prepared
            moved = self._move(latents, height, width, Condition(("",) * count, tensors))
            return (moved, *prepared[1:]) if isinstance(prepared, tuple) else moved

        steered = copy.copy(self.pipe)
        steered.encode_prompt = encode_prompt
        steered.prepare_latents = prepare_latents
        with memory.explained("a smaller batch, or pipe.vae.enable_slicing()"):
            return type(self.pipe).__call__(steered, *args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> SteeredPipeline:
        """Move the pipeline, and the hypernetwork with it."""
        self.pipe.to(*args, **kwargs)
        self.hypernetwork.to(device=getattr(self.pipe, self.family.network).device)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pipe"], name)

    def _move(self, latents: Tensor, height: int, width: int, condition: Condition) -> Tensor:
        family, pipe = self.family, self.pipe
        scale = family.prepared_scale(pipe)
        noise = family.unpack(pipe, latents, height, width).float() / scale
        delta = family.pack(pipe, self.hypernetwork(noise, condition))
        return (latents.float() + scale * delta.float()).to(latents.dtype)
