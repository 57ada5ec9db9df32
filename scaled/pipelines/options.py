"""Options of every pipeline backend."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hnkit.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

QUANTIZED = ("no", "fp8", "nf4")


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """The options every pipeline backend takes (table `[backend]` of a configuration)."""

    model_id: str = ""
    """Hub name of the model, or a local folder in diffusers' format."""
    size: int = 512
    """Side of the image in pixels, where `height` or `width` says no other; 0: the pipeline's own."""
    height: int = 0
    width: int = 0
    rank: int = 128
    lora_alpha: float = 256.0
    lora_layers: tuple[str, ...] = ()
    """Names of layers that get LoRA, or ends of names as `to_q`; the last layer always does. Empty: every linear layer
    and ungrouped convolution."""
    lora_autocast: bool = False
    """Compute LoRA in the network's type, with float32 weights: f keeps no float32 copy of each layer's input."""
    guidance: float = 0.0
    """Guidance scale of generator and hypernetwork."""
    max_sequence_length: int = 0
    """Prompt tokens, where the pipeline lets one choose; 0: its own number."""
    lora: str = ""
    """Folder, safetensors file or hub name of a LoRA that is loaded and fused into the frozen model."""
    lora_scale: float = 1.0
    network_id: str = ""
    """Folder, safetensors file or hub name of a network (UNet or transformer) in the place of the model's own."""
    scheduler: str = ""
    """Class of diffusers in the place of the model's scheduler; it starts from the settings of that."""
    scheduler_config: tuple[str, ...] = ()
    """Settings of the scheduler, as `name=value`."""
    timesteps: tuple[int, ...] = ()
    """The schedule, step by step, for a model that was distilled at other timesteps than its scheduler's."""
    sigmas: tuple[float, ...] = ()
    """The same for pipelines that take noise levels."""
    device: str = "auto"
    """`auto`: the current CUDA device if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the frozen network and decoder; LoRA, delta and KL are float32 always."""
    quantize: Literal["no", "fp8", "nf4"] = "no"
    """Store the linear layers and convolutions of the frozen network's blocks in 8 bits (`fp8`) or in 4 (`nf4`), and
    compute with them in `dtype`: half or a quarter of the network's memory, and rounded weights."""
    hypernetwork_checkpointing: bool = False
    """Recompute the blocks of f in the backward pass: less memory, one more forward of f."""
    generator_checkpointing: bool = False
    vae_checkpointing: bool = False
    vae_slicing: bool = False
    """Decode one image at a time, and again in the backward pass: the decoder's activations of one image are kept."""
    vae_tiling: bool = False
    """Decode large images in overlapping tiles; the image changes slightly."""
    compile: str = "no"
    """`no`, or a torch.compile backend (`inductor`) for the repeated blocks of f and of the generator, which are then
    checked against eager mode at the start."""
    shard: bool = False
    """Share the frozen network out over the processes of torchrun while training: each keeps 1 / W of it, and a block
    is whole only while it runs."""
    cache_dir: str = "auto"
    """Folder for prompt embeddings; `auto`: hnkit's folder in the user's cache; empty: keep them in memory only."""
    local_files_only: bool = True
    """Never download: take the model from the local hub cache."""
    self_check: bool = True
    """Refuse a model at load whose hypernetwork or gradients would be wrong."""
    seed: int = 0
    """Of LoRA's random start, and of the noise that samplers of more than one step add on the way."""

    def __post_init__(self) -> None:
        for name in ("model_id", "cache_dir"):
            if isinstance(value := getattr(self, name), Path):
                object.__setattr__(self, name, str(value))
        if self.dtype not in DTYPES:
            raise InputError(f"backend.dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.quantize not in QUANTIZED:
            raise InputError(f"backend.quantize {self.quantize!r}: choose one of {', '.join(QUANTIZED)}")
        if self.shard:
            self.require_shardable()
        for name in ("size", "height", "width", "max_sequence_length"):
            if getattr(self, name) < 0:
                raise InputError(f"backend.{name} {getattr(self, name)}: it is 1 or more, 0 for the pipeline's own")
        if self.timesteps and self.sigmas:
            raise InputError("backend.timesteps and backend.sigmas are both given: one of them is the schedule")
        for name, least in (("timesteps", "0 or more"), ("sigmas", "above 0")):
            given: tuple[float, ...] = getattr(self, name)
            if not all(math.isfinite(value) and (value > 0 or (value == 0 and name == "timesteps")) for value in given):
                raise InputError(f"backend.{name} {list(given)}: each of them is a finite number, {least}")
            if not all(one > next_one for one, next_one in itertools.pairwise(given)):
                raise InputError(f"backend.{name} {list(given)}: from noise to image, each is below the one before")
        if bad := [entry for entry in self.scheduler_config if "=" not in entry]:
            raise InputError(f"backend.scheduler_config {bad[0]!r}: write NAME=VALUE")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"backend.seed {self.seed}: it is a whole number from 0 to 2^63 - 1")

    def require_shardable(self) -> None:
        """Refuse what cannot be shared out over processes."""
        if self.quantize != "no":
            raise InputError(
                f"backend.quantize {self.quantize!r}: weights in few bits cannot be sharded, set it to no, or "
                "backend.shard to false"
            )
        if self.compile != "no":
            raise InputError(
                f"backend.compile {self.compile!r}: a sharded network is not compiled, set it to no, or backend.shard "
                "to false"
            )

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.height or self.size, self.width or self.size

    @property
    def schedule(self) -> int:
        """The number of steps of the schedule that `timesteps` or `sigmas` give; 0 where they give none."""
        return len(self.timesteps) or len(self.sigmas)


RECORDED: dict[str, type] = {
    "height": int, "width": int, "max_sequence_length": int, "lora": str, "lora_scale": float, "network_id": str,
    "scheduler": str, "scheduler_config": list, "timesteps": list, "sigmas": list, "quantize": str,
    "lora_layers": list,
}  # fmt: skip
"""Options that change the generator or what f is given: an adapter records those that are not at their defaults."""
