"""What a pipeline's text encoders hold and return, without their weights: for plans.

How long a prompt becomes, and which tensors, is a property of the pipeline's class; what each holds stands in the
configurations of its text encoders. Where texts are as long as their prompt, a plan takes the longest that the
pipeline does not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.scaled.pipelines.conditions import Leaf, TextLayout
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.options import PipelineOptions
from hnkit.training.plan.skeleton import without_weights

Shape = tuple[int, ...]
_CLIP = 77
"""Tokens of every prompt that CLIP reads."""


@dataclass(frozen=True)
class PlannedTexts:
    """What a prompt's texts become.

    Attributes:
        layout: how they are taken apart.
        shapes: the shape of one prompt's row in each tensor of a condition.
        whole: names of the tensors of whole numbers: masks and positions.
        lengths: the tensors that hold a prompt's length, with that length.
    """

    layout: TextLayout
    shapes: Mapping[str, Shape]
    whole: Sequence[str] = ()
    lengths: Mapping[str, int] = field(default_factory=dict)

    def rows(
        self, count: int, dtype: torch.dtype, mode: AbstractContextManager[Any] | None = None
    ) -> dict[str, Tensor]:
        """The tensors of `count` prompts, made in `mode`; lengths are real ones, since texts are cut by them."""
        with mode or nullcontext():
            rows = {
                name: torch.zeros(count, *shape, dtype=torch.long if name in self.whole else dtype)
                for name, shape in self.shapes.items()
            }
        return rows | {name: torch.full((count,), length) for name, length in self.lengths.items()}


@dataclass(frozen=True)
class ShapesOnly:
    """In the place of an `EmbeddingCache`: embeddings of the right shapes, whatever the prompts."""

    mode: AbstractContextManager[Any]
    texts: PlannedTexts
    dtype: torch.dtype

    def rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Fake embeddings of `len(prompts)` rows."""
        return self.texts.rows(len(prompts), self.dtype, self.mode)

    def store(self, prompts: Sequence[str]) -> None:
        """Nothing is encoded."""


def _rows(*names: str | None) -> list[Any]:
    """The template of one call that returns rows, and `None` where no name is given."""
    return [
        tuple(
            Leaf(f"0.{i}", "fixed") if name is None else Leaf(name, "rows", length=None) for i, name in enumerate(names)
        )
    ]


def _masked(pipe: Any, tokens: int, *more: None) -> PlannedTexts:
    """Tokens of the encoder's width, and a mask of them."""
    embeds, mask = names = ("prompt_embeds", "prompt_attention_mask")
    shapes: dict[str, Shape] = {embeds: (tokens, pipe.transformer.config.caption_channels), mask: (tokens,)}
    return PlannedTexts(TextLayout(_rows(*names, *more), False, True), shapes, (mask,))


def _sana(pipe: Any, options: PipelineOptions) -> PlannedTexts:
    return _masked(pipe, options.max_sequence_length or 300)


def _pixart(pipe: Any, options: PipelineOptions) -> PlannedTexts:
    return _masked(pipe, options.max_sequence_length or 120, None, None)


def _stable_diffusion(pipe: Any, _: PipelineOptions) -> PlannedTexts:
    return PlannedTexts(
        TextLayout(_rows("0.0", None), False, True), {"0.0": (_CLIP, pipe.unet.config.cross_attention_dim)}
    )


def _xl(pipe: Any, _: PipelineOptions) -> PlannedTexts:
    """The tokens of two encoders side by side, and the second's pooled embedding."""
    config = pipe.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes: dict[str, Shape] = {"0.0": (_CLIP, config.cross_attention_dim), "0.2": (pooled,)}
    return PlannedTexts(TextLayout(_rows("0.0", None, "0.2", None), False, True), shapes)


def _sd3(pipe: Any, options: PipelineOptions) -> PlannedTexts:
    """CLIP's tokens, then T5's, and the pooled embeddings of two CLIPs."""
    config, tokens = pipe.transformer.config, _CLIP + (options.max_sequence_length or 256)
    shapes: dict[str, Shape] = {"0.0": (tokens, config.joint_attention_dim), "0.2": (config.pooled_projection_dim,)}
    return PlannedTexts(TextLayout(_rows("0.0", None, "0.2", None), False, True), shapes)


def _flux(pipe: Any, options: PipelineOptions) -> PlannedTexts:
    """T5's tokens, CLIP's pooled embedding, and positions of zeros."""
    config, tokens = pipe.transformer.config, options.max_sequence_length or 512
    positions = Leaf("0.2", "fixed", value=torch.zeros(tokens, 3))
    template = [(Leaf("0.0", "rows"), Leaf("0.1", "rows"), positions)]
    shapes: dict[str, Shape] = {"0.0": (tokens, config.joint_attention_dim), "0.1": (config.pooled_projection_dim,)}
    return PlannedTexts(TextLayout(template, False, True), shapes)


def _klein(pipe: Any, options: PipelineOptions) -> PlannedTexts:
    """Three layers of Qwen3 side by side, and the position of every token."""
    tokens = options.max_sequence_length or 512
    shapes: dict[str, Shape] = {"0.0": (tokens, pipe.transformer.config.joint_attention_dim), "0.1": (tokens, 4)}
    return PlannedTexts(TextLayout(_rows("0.0", "0.1"), False, True), shapes, ("0.1",))


def _z_image(pipe: Any, options: PipelineOptions) -> PlannedTexts:
    """A list of one tensor a prompt, each as long as its prompt."""
    tokens = options.max_sequence_length or 512
    shapes: dict[str, Shape] = {"0.0": (tokens, pipe.transformer.config.cap_feat_dim)}
    return PlannedTexts(TextLayout([(Leaf("0.0", "list"), [])], False, True), shapes, lengths={"0.0.length": tokens})


def _qwen(pipe: Any, options: PipelineOptions) -> PlannedTexts:
    """Rows as long as the longest prompt, and a mask where they differ."""
    tokens = options.max_sequence_length or 512
    shapes: dict[str, Shape] = {"0.0": (tokens, pipe.transformer.config.joint_attention_dim)}
    mask = Leaf("0.1", "mask", length=1, value=torch.zeros(0, tokens, dtype=torch.long), optional=True)
    template = [(Leaf("0.0", "rows", length=1), mask)]
    return PlannedTexts(TextLayout(template, True, True), shapes, lengths={"0.0.length": tokens})


_TEXTS: Mapping[str, Callable[[Any, Any], PlannedTexts]] = {
    "SanaSprintPipeline": _sana,
    "StableDiffusionPipeline": _stable_diffusion,
    "LatentConsistencyModelPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _xl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "Flux2KleinPipeline": _klein,
    "ZImagePipeline": _z_image,
    "QwenImagePipeline": _qwen,
    "PixArtAlphaPipeline": _pixart,
}


def planned_texts(family: Family, pipe: Any, options: PipelineOptions) -> PlannedTexts:
    """What a prompt's texts become in a pipeline whose text encoders are not there.

    Raises:
        InputError: for this class that is not written down.
    """
    if family.pipeline_class not in _TEXTS:
        raise InputError(f"no plan for a {family.pipeline_class}: plans are made of {', '.join(_TEXTS)}")
    return _TEXTS[family.pipeline_class](pipe, options)


def encoders_size(configs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> int:
    """Bytes of the text encoders among a model's components, as the library loads them in this type."""
    return sum(_size(config, dtype) for name, config in configs.items() if name.startswith("text_encoder"))


def _size(config: Mapping[str, Any], dtype: torch.dtype) -> int:
    import transformers

    kind: Any = getattr(transformers, config["_class_name"])
    plain = {key: value for key, value in config.items() if key != "_class_name"}
    module: nn.Module = without_weights(lambda: kind(kind.config_class.from_dict(plain)))
    kept = {*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:  # transformers keeps these in single precision for this type alone
        kept |= {*(getattr(module, "_keep_in_fp32_modules", None) or ())}
    return sum(
        parameter.numel() * (4 if kept.intersection(name.split(".")) else dtype.itemsize)
        for name, parameter in module.named_parameters()
    )
