"""Where a pipeline's noise goes: from the shape it draws, through the argument `latents`, to its network's input.

Between the two a pipeline scales and rearranges (2 x 2 patches as tokens, a frame dimension), and no two classes do it
alike. It is found out, not written down: marked noise is drawn, and the marks are read off the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.scaled.pipelines.calls import PipelineCall, drawing, view

_BASE = 32
"""Marks are written in digits of this base: eight bits of bfloat16 hold them through two roundings."""


@dataclass(frozen=True)
class Layout:
    """The layouts of one row of noise, at one image size.

    Attributes:
        shape: as the pipeline draws it, without the row.
        dtype: the type it draws.
        given: as its argument `latents` takes it.
        to_given: the drawn entry that stands at each place of `given`; `None`: the same.
        from_network: the place in the network's input, and so in its output, of each drawn entry; `None`: the same.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    given: tuple[int, ...]
    to_given: Tensor | None
    from_network: Tensor | None

    def pack(self, noise: Tensor) -> Tensor:
        """Noise `(n, *shape)` as the argument `latents`."""
        flat = noise.flatten(1)
        if self.to_given is not None:
            flat = flat.index_select(1, self.to_given.to(flat.device))
        return flat.reshape(len(noise), *self.given).to(self.dtype)

    def unpack(self, latents: Tensor) -> Tensor:
        """The inverse of `pack`, but for the type.

        Raises:
            InputError: they are of another shape, whose entries would be taken for those of other places.
        """
        if tuple(latents.shape[1:]) != self.given:
            taken = ", ".join(str(side) for side in self.given)
            raise InputError(f"latents of shape {tuple(latents.shape)}: for this image they are (n, {taken})")
        flat = latents.flatten(1)
        if self.to_given is not None:
            flat = flat.index_select(1, torch.argsort(self.to_given).to(flat.device))
        return flat.reshape(len(latents), *self.shape)

    def read(self, output: Any) -> Tensor:
        """What the network returned, in the layout of the noise.

        Twice the channels are a mean and a variance: the mean is taken.

        Raises:
            InputError: the output has another number of entries than the noise.
        """
        found = stacked(output)
        size = math.prod(self.shape)
        if found[0].numel() == 2 * size and found.ndim > 2:
            found = found.chunk(2, dim=1)[0]
        if found[0].numel() != size:
            raise InputError(
                f"self-check 'layout': the network returns {tuple(found.shape)} for noise (n, "
                f"{', '.join(str(side) for side in self.shape)}): no hypernetwork can be made of it"
            )
        flat = found.flatten(1)
        if self.from_network is not None:
            flat = flat.index_select(1, self.from_network.to(flat.device))
        return flat.reshape(len(found), *self.shape)


def stacked(output: Any) -> Tensor:
    """The tensor in what a diffusers network returns: a tuple, an output object, or a list of one tensor a row."""
    output = getattr(output, "sample", output)
    if isinstance(output, tuple):
        output = output[0]
    return torch.stack(list(output)) if isinstance(output, list) else output


def find_layout(call: PipelineCall) -> Layout:
    """Find the layouts of the noise of a pipeline call, by its network's input with and without `latents=`.

    Args:
        call: a call for some prompts, without `latents` and `generator`.

    Raises:
        InputError: the pipeline ignores `latents`, draws no noise, or gives its network something else than one row of
            it, scaled and rearranged.
    """
    drawn: list[tuple[tuple[int, ...], torch.dtype]] = []

    def entries(values: Tensor | None, latents: Tensor | None = None) -> list[Tensor]:
        """Every tensor of the network's first input, for drawn noise of these values."""

        def draw(shape: Any, _generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
            drawn.append((tuple(shape), dtype or torch.float32))
            flat = torch.zeros(math.prod(shape[1:])) if values is None else values
            return flat.repeat(shape[0]).reshape(shape).to(dtype=dtype, device=device)

        marked = view(call.pipe)
        marked.prepare_latents = drawing(marked, draw)
        extra = {} if latents is None else {"latents": latents}
        found: list[Tensor] = replace(call, pipe=marked).first(lambda *a, **k: list(_tensors([a, k])), **extra)
        return found

    who = type(call.pipe).__name__
    blank = entries(None) if hasattr(call.pipe, "prepare_latents") else []
    if not drawn:
        raise InputError(f"self-check 'layout': {who} draws no noise in prepare_latents: it cannot be steered")
    if len(drawn) > 1:
        raise InputError(f"self-check 'layout': {who} draws {len(drawn)} noises: a hypernetwork moves one")
    if not all(map(torch.equal, blank, entries(None))):
        raise InputError(
            f"self-check 'layout': {who} draws a second noise outside of randn_tensor: it cannot be steered"
        )
    (rows, *shape), dtype = drawn[0]
    size = math.prod(shape)
    ones = entries(torch.ones(size))
    places = [i for i, (a, b) in enumerate(zip(blank, ones, strict=True)) if a.shape == b.shape and not a.equal(b)]
    if not places:
        raise InputError(f"self-check 'layout': the network's input does not depend on the noise of {who}")
    place, row = places[0], slice(None)
    if rows > 1 and ones[place].numel() == rows * size:
        row = slice(0, 1)
    if ones[place][row].numel() != size:
        raise InputError(
            f"self-check 'layout': {who} gives its network {ones[place].numel()} entries for {size} of noise: if "
            "that is classifier-free guidance, set backend.guidance to a value without it (1, or 0); else no "
            "hypernetwork can be made of it"
        )
    order = _read_marks(who, size, lambda values: entries(values)[place][row])
    device = blank[place].device
    network_shapes = blank[place].shape[-len(shape) :], blank[place].shape[1:], blank[place].shape
    for given in dict.fromkeys(tuple(sides) for sides in (shape, *network_shapes)):
        if math.prod(given) != size:
            continue

        def through(values: Tensor, given: tuple[int, ...] = given) -> Tensor:
            latents = values.repeat(rows).reshape(rows, *given).to(dtype=dtype, device=device)
            return entries(None, latents=latents)[place][row]

        try:
            if through(torch.ones(size)).shape != ones[place][row].shape:
                continue
            order_given = _read_marks(who, size, through)
        except (InputError, RuntimeError, IndexError, AssertionError):
            continue  # not the layout that this class takes
        to_given = torch.empty_like(order)
        to_given[order_given] = order
        return Layout(tuple(shape), dtype, given, _or_none(to_given), _or_none(torch.argsort(order)))
    raise InputError(f"self-check 'layout': {who} ignores latents=, or changes them: no hypernetwork can steer it")


def _read_marks(who: str, size: int, through: Callable[[Tensor], Tensor]) -> Tensor:
    """The number of the noise entry that stands at each place of what `through` makes of it."""
    scale = through(torch.ones(size)).flatten().float()
    if not bool((scale - scale[0]).abs().max() <= 0.02 * scale[0].abs()) or float(scale[0]) == 0:
        raise InputError(f"self-check 'layout': {who} gives its network something else than scaled noise")
    numbers = torch.arange(size)
    order = torch.zeros(size, dtype=torch.long)
    for digit in range(max(1, math.ceil(math.log(size, _BASE) - 1e-9))):
        seen = through((numbers // _BASE**digit % _BASE).float()).flatten().float() / scale[0]
        if not bool(((seen - seen.round()).abs() < 0.45).all()):
            raise InputError(f"self-check 'layout': {who} gives its network something else than scaled noise")
        order += seen.round().long().cpu() * _BASE**digit
    if not bool((order.sort().values == numbers).all()):
        raise InputError(f"self-check 'layout': {who} gives its network something else than rearranged noise")
    return order


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors([value[key] for key in sorted(value)])
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _or_none(index: Tensor) -> Tensor | None:
    return None if bool((index == torch.arange(len(index))).all()) else index
