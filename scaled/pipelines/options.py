"""Options of every pipeline backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hnkit.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """The options every pipeline backend takes (table `[backend]` of a configuration)."""

    model_id: str = ""
    """Hub name of the model, or a local folder in diffusers' format."""
    size: int = 512
    """Side of the square image in pixels."""
    rank: int = 128
    lora_alpha: float = 256.0
    guidance: float = 0.0
    """Guidance scale of generator and hypernetwork."""
    max_sequence_length: int = 77
    """Prompt tokens, where the pipeline lets one choose."""
    device: str = "auto"
    """`auto`: the current CUDA device if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the frozen network and decoder; LoRA, delta and KL are float32 always."""
    hypernetwork_checkpointing: bool = False
    """Recompute the blocks of f in the backward pass: less memory, one more forward of f."""
    generator_checkpointing: bool = False
    vae_checkpointing: bool = False
    vae_slicing: bool = False
    """Decode one image at a time."""
    vae_tiling: bool = False
    """Decode large images in overlapping tiles; the image changes slightly."""
    compile: str = "no"
    """`no`, or a torch.compile backend (`inductor`); f is then checked against eager mode at the start."""
    cache_dir: str = "auto"
    """Folder for prompt embeddings; `auto`: hnkit's folder in the user's cache; empty: keep them in memory only."""
    local_files_only: bool = True
    """Never download: take the model from the local hub cache."""
    seed: int = 0
    """Of LoRA's random start, and of the noise that samplers of more than one step add on the way."""

    def __post_init__(self) -> None:
        for name in ("model_id", "cache_dir"):
            if isinstance(value := getattr(self, name), Path):
                object.__setattr__(self, name, str(value))
        if self.dtype not in DTYPES:
            raise InputError(f"backend.dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        for name in ("size", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise InputError(f"backend.{name} {getattr(self, name)}: it is 1 or more")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"backend.seed {self.seed}: it is a whole number from 0 to 2^63 - 1")
