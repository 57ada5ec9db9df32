"""What is particular to a family of pipelines, as one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


class Family(ABC):
    """What is particular to one diffusers pipeline class, as used for noise hypernetworks."""

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    network: ClassVar[str]
    """Component that f is the twin of."""
    last_layer: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    load_arguments: ClassVar[Mapping[str, Any]] = {}
    max_steps: ClassVar[int] = 1000
    multiple: ClassVar[int] = 8
    """What divides every image side that the pipeline takes."""
    conditioning: ClassVar[Mapping[str, type]] = {"size": int}
    """Options that change what f is given, with their types: an adapter records them."""
    published: ClassVar[Mapping[str, Any]] = {}
    """Options of adapters that record nothing, those of the paper's code."""

    @abstractmethod
    def noise_shape(self, pipe: Any, size: int) -> tuple[int, ...]:
        """Shape of one sample's noise at an image side of `size` pixels."""

    @abstractmethod
    def encode_arguments(self, options: Any) -> dict[str, Any]:
        """Keyword arguments of the pipeline's `encode_prompt`, beside the prompts."""

    @abstractmethod
    def embeddings(self, encoded: tuple[Any, ...]) -> dict[str, Tensor]:
        """What `encode_prompt` returned, by name, rows first."""

    @abstractmethod
    def embedding_shapes(self, pipe: Any, options: Any) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's row in each tensor of `embeddings`, from the configuration alone."""

    @abstractmethod
    def delta(
        self, pipe: Any, network: nn.Module, noise: Tensor, tensors: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """One forward of `network` on the noise, at the inputs the pipeline gives it in its first step."""

    @abstractmethod
    def call_arguments(self, options: Any, tensors: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        """Keyword arguments of the pipeline call, beside latents, size, generator and output type."""

    def plain_arguments(self, options: Any) -> dict[str, Any]:
        """Keyword arguments of a plain one-step call of the pipeline, beside the prompt, that match `options`."""
        size, guidance = options.size, options.guidance
        return {"num_inference_steps": 1, "guidance_scale": guidance, "height": size, "width": size}

    def attached_arguments(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a plain call of the pipeline by which prompts reach f as they did in training.

        Args:
            conditioning: what the adapter records of `conditioning`.
        """
        return {key: value for key, value in conditioning.items() if key == "max_sequence_length"}

    def pack(self, pipe: Any, noise: Tensor) -> Tensor:
        """The noise in the layout of the pipeline's argument `latents`."""
        return noise

    def unpack(self, pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `pack`."""
        return latents

    def prepared_scale(self, pipe: Any) -> float:
        """What the pipeline's `prepare_latents` multiplies noise by."""
        return 1.0
