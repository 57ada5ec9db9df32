"""A frozen network whose large weights are stored in 8 or 4 bits and computed with in the type that they had.

`fp8`: 8-bit floating-point numbers (4 bits of exponent, 3 of fraction) times a power of two for each output, so that
what is computed with is exactly one rounding of W, in bfloat16 as in float32:

    W[i, :] ~ 2^k[i] e4m3(W[i, :] / 2^k[i]),   |W[i, :]|_max / 2^k[i] in (224, 448]

`nf4`: the nearest of 16 quantiles of the normal law, for 64 entries at a time times their largest magnitude
(arXiv 2305.14314, section 3).

The dense weight lives while its layer runs, forward and backward, and is no part of what autograd keeps. The library's
own layerwise casting serves inference alone: a backward pass finds its weights in 8 bits, and fails.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from hnkit.scaled.lora.base import remember

Form = Literal["fp8", "nf4"]
_LARGEST = 448.0
"""The largest number of e4m3."""
_BLOCK = 64
"""Entries that share a scale in 4 bits."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 numbers of 4-bit NormalFloat, as bitsandbytes has them."""


class _Stored(nn.Module):
    """What stored layers share: the weight as a property, made anew from its codes.

    Attributes:
        codes: the bits of the numbers, `uint8`, so that no change of type reaches them.
        scale: what they are multiplied by, for each output or each block.
        form: how they are stored.
        kind: the type that the weight had.
        shape: its shape.
    """

    codes: Tensor
    scale: Tensor
    form: Form
    kind: torch.dtype
    shape: torch.Size

    @property
    def weight(self) -> Tensor:
        """The dense weight, in the type that it had."""
        if self.form == "fp8":
            return self.codes.view(torch.float8_e4m3fn).to(self.kind) * self.scale.to(self.kind)
        numbers = torch.tensor(NF4, device=self.codes.device)
        found = torch.stack([self.codes >> 4, self.codes & 15], 1).flatten().long()
        return (numbers[found].view(-1, _BLOCK) * self.scale.float()).to(self.kind).view(self.shape)

    def run(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The layer of an input, with this bias."""
        raise NotImplementedError

    def pull(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input, which has this shape, for that of the output."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """What the layer returns."""
        output: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return output


class _Product(torch.autograd.Function):
    """A stored layer, which keeps nothing for its backward pass: the weight is made anew there."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape = layer, input.shape
        output: Tensor = layer.run(input, layer.bias)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.pull(gradients[0], ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        pushed: Tensor = ctx.layer.run(tangents[0], None)
        return pushed


class StoredLinear(_Stored, nn.Linear):  # type: ignore[misc, override]  # its weight is no parameter
    """A linear layer in few bits."""

    def run(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """See `_Stored`."""
        return functional.linear(input, self.weight, bias)

    def pull(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """See `_Stored`."""
        return gradient.matmul(self.weight.to(gradient.dtype)).reshape(shape)


class StoredConv2d(_Stored, nn.Conv2d):  # type: ignore[misc, override]  # its weight is no parameter
    """A convolution in few bits."""

    def run(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """See `_Stored`."""
        output: Tensor = self._conv_forward(input, self.weight, bias)
        return output

    def pull(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """See `_Stored`."""
        weight = self.weight.to(gradient.dtype)
        places = (self.stride, self.padding, self.dilation, self.groups)
        pulled: Tensor = conv2d_input(shape, weight, gradient, *places)  # type: ignore[no-untyped-call]
        return pulled


_STORED: dict[type[nn.Module], type[_Stored]] = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}


def store(network: nn.Module, form: Form) -> None:
    """Store the linear layers and convolutions of the network's blocks in 8 or 4 bits, in place.

    What is outside of the blocks (embeddings, the first and the last layer) is small, and stays as it is, as does a
    layer that `nf4` cannot divide into blocks of 64. By which weights the network is known is noted before.
    """
    if not is_stored(network):
        remember(network)
    for name, module in network.named_modules():
        if type(module) in _STORED and _in_block(name) and _plain(module):
            _store(module, form)


def _in_block(name: str) -> bool:
    """Whether a module is in one of a list of modules, as all blocks of the library's networks are."""
    return any(part.isdigit() for part in name.split("."))


def _plain(module: nn.Module) -> bool:
    """Whether the gradient above is that of the layer: convolutions that pad with something else have another."""
    return getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(getattr(module, "padding", 0), str)


def is_stored(network: nn.Module) -> bool:
    """Whether some weights of the network are stored in few bits."""
    return any(isinstance(module, _Stored) for module in network.modules())


@torch.no_grad()
def _store(layer: nn.Module, form: Form) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if form == "nf4" and weight.numel() % _BLOCK:
        return
    codes, scale = (_in_eight_bits if form == "fp8" else _in_four_bits)(weight.float())
    del layer.weight
    layer.__class__ = _STORED[type(layer)]
    layer.register_buffer("codes", codes)
    layer.register_buffer("scale", scale)
    vars(layer).update(form=form, kind=weight.dtype, shape=weight.shape)


def _in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1))
    exponent = torch.ceil(torch.log2(largest / _LARGEST)).clamp(min=-40)  # of a row of zeros it is minus infinity
    scale = torch.exp2(exponent)
    return (weight / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8), scale


def _in_four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    blocks = weight.reshape(-1, _BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    numbers = torch.tensor(NF4, device=weight.device)
    between = (numbers[1:] + numbers[:-1]) / 2
    codes = torch.bucketize(blocks / largest.clamp(min=torch.finfo(torch.float32).tiny), between).to(torch.uint8)
    pairs = codes.view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1], largest
