"""The hypernetwork of a pipeline: its own network with an adapter, from noise to delta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.maps import Condition
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.families.family import Family


class HyperNetwork(nn.Module):
    """The map `f(x | c)` of a pipeline: the twin at the inputs of the first sampling step, in float32."""

    def __init__(self, family: Family, pipe: Any, twin: nn.Module, guidance: float, advice: str) -> None:
        super().__init__()
        self.twin = twin
        self.guidance = guidance
        self._family = family
        self._pipe = pipe
        self._advice = advice

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        """The delta of each row of `noise`, float32."""
        if len(noise) != len(condition):
            raise InputError(f"{len(noise)} noises and {len(condition)} prompts given: one prompt per noise")
        with memory.explained(self._advice):
            delta = self._family.delta(self._pipe, self.twin, noise, condition.tensors, self.guidance)
        return delta.float()


class NoDelta(nn.Module):
    """The hypernetwork of direct fine-tuning: it holds the trainable generator and leaves the noise alone."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self.twin = twin

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        """Zeros, float32."""
        return torch.zeros_like(noise, dtype=torch.float32)
