"""What is particular to a family of distilled pipelines: one record of values, all of them with defaults.

A pipeline class that no record names runs on the defaults; the self-check at load says whether they hold for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def _nothing(_options: Any, _steps: int) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is particular to one diffusers pipeline class, as used for noise hypernetworks.

    Attributes:
        pipeline_class: the class that `model_index.json` names.
        network: the component that f is the twin of; empty: `transformer`, else `unet`.
        guidance: the argument of the call that takes the guidance scale.
        guidance_scale: the scale where a user names none; at 0 no classifier-free guidance runs in any class.
        arguments: arguments of every call of the pipeline, beside those that all classes share.
        varying: arguments of a call that depend on options and steps.
        text_arguments: names among `varying` that change what the text encoders are given.
        multiple: what divides every image side; 0: the decoder's factor, times 2 for a transformer.
        own_size: images are as large as the class says, whatever the caller asks for.
        training: classes of modules that must be in training mode, because they drop their gradients outside of it.
        first_call: inputs of the network's first call that f is given other values of, by name.
        embeddings: names of what `encode_prompt` returns, in order; `prompt_attention_mask` lets the cache trim
            `prompt_embeds`.
        conditioning: options of the family that change what f is given, with their types: an adapter records them.
        published: options of adapters that record nothing, those of the paper's code.
        last_layer: the layer that f's base leaves out, for adapters that do not say it and for plans, which find
            nothing out; everywhere else it is found.
    """

    pipeline_class: str
    network: str = ""
    guidance: str = "guidance_scale"
    guidance_scale: float = 0.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    varying: Callable[[Any, int], Mapping[str, Any]] = _nothing
    text_arguments: tuple[str, ...] = ()
    multiple: int = 0
    own_size: bool = False
    training: tuple[str, ...] = ()
    first_call: Mapping[str, float] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    conditioning: Mapping[str, type] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    last_layer: str = ""

    def network_of(self, pipe: Any) -> str:
        """The name of the component that f is the twin of, in a loaded pipeline."""
        return self.network or ("transformer" if getattr(pipe, "transformer", None) is not None else "unet")

    def side_multiple(self, pipe: Any) -> int:
        """What divides every image side that the pipeline takes, in pixels."""
        factor = int(getattr(pipe, "vae_scale_factor", 0) or getattr(pipe, "vae_scale_factor_spatial", 8))
        return self.multiple or factor * (1 if self.network_of(pipe) == "unet" else 2)
