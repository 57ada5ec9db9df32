"""Reward models that take less of a card: computed in bfloat16, or there only while they score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hnkit.backend import Reward

Scorer = TypeVar("Scorer", bound=nn.Module)
Precision = Literal["float32", "bfloat16"]
PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a reward's network computes in. What comes of it (cosines, the last layers of a head) is float32 always: an HPS
score near 0.28 moves in steps of 0.002 in bfloat16."""


class OffCard(nn.Module):
    """A reward whose weights are on the card only while it scores.

    Its gradient with respect to the images is taken in the same visit, so that nothing of the network is kept for the
    backward pass: the scores of different rows do not depend on each other, and the gradient of any sum of them is the
    gradients of the rows, each times its factor.

    Attributes:
        name: how reports call it.
        weight: its weight in a sum of rewards.
        reward: the reward, on the CPU.
        device: where it scores.
        off_card: what a plan asks, to count no standing weights.
    """

    off_card = True

    def __init__(self, reward: Reward, device: torch.device) -> None:
        super().__init__()
        self.name, self.weight = reward.name, reward.weight
        self.reward = reward
        self.device = device

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the reward returns."""
        if torch.is_grad_enabled() and images.requires_grad:
            scores: Tensor = _AtOnce.apply(images, self, tuple(prompts))  # type: ignore[no-untyped-call]
            return scores
        with self.visiting():
            return self.reward(images, prompts)

    @contextmanager
    def visiting(self) -> Iterator[None]:
        """Inside, the weights are on the card."""
        module = cast(nn.Module, self.reward)
        tensors = [*module.parameters(), *module.buffers()]
        homes = [tensor.data for tensor in tensors]
        try:
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = torch.empty_like(home, device=self.device).copy_(home, non_blocking=True)
            yield
        finally:
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = home


class _AtOnce(torch.autograd.Function):
    """Scores of images, whose gradients are found with them."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, owner: OffCard, prompts: Sequence[str]) -> Tensor:
        with owner.visiting(), torch.enable_grad():
            leaf = images.detach().requires_grad_()
            scores = owner.reward(leaf, prompts)
            (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        ctx.save_for_backward(gradient)
        return scores.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].view(-1, *[1] * (gradient.dim() - 1)), None, None


def placed(reward: Scorer, device: str, offload: bool) -> Scorer | OffCard:
    """A reward on its device, or on the CPU in the wrapper that takes it there."""
    if not offload:
        return reward.to(device)
    reward = reward.to("cpu")
    if torch.device(device).type == "cuda":  # from pinned memory a copy is several times as fast
        for tensor in (*reward.parameters(), *reward.buffers()):
            tensor.data = tensor.data.pin_memory()
    return OffCard(cast(Reward, reward), torch.device(device))
