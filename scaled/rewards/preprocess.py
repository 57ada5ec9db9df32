"""The differentiable preprocessing shared by the CLIP- and BLIP-based rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hnkit.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_images(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse anything but RGB images with one prompt each."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"reward {name!r} takes images (n, 3, H, W) in [0, 1], not {tuple(images.shape)}")
    if len(prompts) != len(images):
        raise InputError(f"reward {name!r} takes one prompt per image: got {len(prompts)} for {len(images)} images")


def tokenise(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], length: int, images: Tensor) -> Any:
    """`input_ids` and `attention_mask`, `(n, length)`, on the images' device; prompts are cut or padded to `length`."""
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokens.to(images.device)


def preprocess(images: Tensor, size: int) -> Tensor:
    """Resize (shorter side to `size`, bicubic, antialiased), centre-crop to a square and normalise.

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
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    pixels = pixels[..., top : top + size, left : left + size]
    mean = pixels.new_tensor(CLIP_MEAN).view(3, 1, 1)
    std = pixels.new_tensor(CLIP_STD).view(3, 1, 1)
    return (pixels - mean) / std
