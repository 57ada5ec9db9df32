"""What the CLIP- and BLIP-based rewards do with images and prompts before their model sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hnkit.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_images(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse anything but RGB images with one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"reward {name!r} takes images (n, 3, H, W) in [0, 1], not {tuple(images.shape)}")
    if len(prompts) != len(images):
        raise InputError(f"reward {name!r} takes one prompt per image: got {len(prompts)} for {len(images)} images")


@dataclass(frozen=True)
class Tokens:
    """How a reward turns prompts into tokens.

    Attributes:
        tokenizer: the tokenizer of the model.
        length: prompts are cut or padded to this many tokens.
        clean: applied to every prompt first.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    clean: Callable[[str], str] = str

    def require_fit(self, name: str, vocabulary: int, end: int | None = None) -> None:
        """Refuse a tokenizer that is not the model's, with which scores would be wrong without a word, or fail later.

        Args:
            name: the name of the reward, for the message.
            vocabulary: tokens that the model has embeddings of.
            end: the token at which the model reads a prompt's embedding; `None` if it reads it elsewhere.

        Raises:
            InputError: the tokenizer has more tokens, another end, or no token to pad with.
        """
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if largest >= vocabulary:
            fault = f"numbers its tokens up to {largest}, and the model knows {vocabulary}"
        elif end is not None and self.tokenizer.eos_token_id != end:
            fault = f"ends prompts with token {self.tokenizer.eos_token_id}, and the model reads token {end}"
        elif self.tokenizer.pad_token_id is None:
            fault = "has no token to pad with"
        else:
            return
        raise InputError(f"reward {name!r}: its tokenizer {fault}: give the model's own as tokenizer_id")

    def __call__(self, prompts: Sequence[str], images: Tensor) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, each `(n, length)`, on the device of the images."""
        texts = [self.clean(prompt) for prompt in prompts]
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return {name: tokens[name].to(images.device) for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class NoWords:
    """In the place of a tokenizer, where a reward is only counted: every prompt is as long as prompts can be."""

    eos_token_id: int | None = None
    pad_token_id: int = 0

    def get_vocab(self) -> dict[str, int]:
        """No words, which fit every model."""
        return {}

    def __call__(self, texts: Sequence[str], *, max_length: int, **options: object) -> dict[str, Tensor]:  # noqa: ARG002
        """`input_ids` and `attention_mask`, each `(n, max_length)`."""
        ids = torch.full((len(texts), max_length), self.eos_token_id or 0)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def preprocess(images: Tensor, size: int) -> Tensor:
    """Resize (shorter side to `size`, bicubic, antialiased), centre-crop to a square and normalise.

    Sizes and offsets are torchvision's `Resize` and `CenterCrop`: the longer side is rounded down, the offset of the
    crop to the nearest integer, halves to the even one.

    Args:
        images: `(n, 3, H, W)` in [0, 1], any floating dtype.
        size: side of the square the model sees, in pixels.

    Returns:
        `(n, 3, size, size)` float32, differentiable in `images`.
    """
    pixels = images.float()
    height, width = pixels.shape[-2:]
    short = min(height, width)
    if short != size:
        resized = (size * height // short, size * width // short)
        pixels = F.interpolate(pixels, size=resized, mode="bicubic", antialias=True, align_corners=False)
    top, left = (round((side - size) / 2) for side in pixels.shape[-2:])
    pixels = pixels[..., top : top + size, left : left + size]
    mean = pixels.new_tensor(CLIP_MEAN).view(3, 1, 1)
    std = pixels.new_tensor(CLIP_STD).view(3, 1, 1)
    return (pixels - mean) / std
