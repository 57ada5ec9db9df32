"""The hypernetwork of a pipeline: its own network with an adapter, from noise to delta."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.maps import Condition
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.calls import PipelineCall, accepted_by, call_arguments, view, without_encoders
from hnkit.scaled.pipelines.conditions import TextLayout
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.layout import Layout, find_layout


@dataclass(frozen=True)
class GivenTexts:
    """The texts of a running call of a pipeline, in the place of a condition.

    Attributes:
        texts: what `encode_prompt` has returned, call by call.
        rows: the number of images.
        each: images per prompt.
        embedded: embeddings that the caller gave, where `encode_prompt` was not asked.
    """

    texts: Sequence[Any]
    rows: int
    each: int = 1
    embedded: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rows."""
        return self.rows

    def arguments(self) -> dict[str, Any]:
        """Arguments of a call of the same batch."""
        prompts = {} if self.embedded else {"prompt": [""] * (self.rows // self.each)}
        return {**prompts, **self.embedded, **(dict.fromkeys(EACH, self.each) if self.each > 1 else {})}


EACH = ("num_images_per_prompt", "num_videos_per_prompt")
"""What pipelines call the number of images of each prompt."""


class FirstStep:
    """What a pipeline gives its network in its first step, for any function in the place of the network.

    Attributes:
        family: the record of the pipeline's class.
        pipe: the pipeline; its text encoders are not used.
        texts: how its encoded texts are laid out; `None`: they are given as they are.
        plain_class: the class whose call it is; `None`: the pipeline's.
        options: size, schedule and prompt length of the call.
        device: where texts are; `None`: with the network.
    """

    def __init__(
        self,
        family: Family,
        pipe: Any,
        texts: TextLayout | None,
        options: Any,
        plain_class: type | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.family = family
        self.pipe = pipe
        self.texts = texts
        self.options = options
        self.plain_class = plain_class
        self.device = device
        self.scheduler = copy.deepcopy(pipe.scheduler)  # of its own: a scheduler counts the steps of a call
        self._layouts: dict[tuple[int, int], Layout] = {}

    def know(self, size: tuple[int, int], layout: Layout) -> None:
        """Take a layout as found, for images of `size`."""
        self._layouts[size] = layout

    def layout(self, size: tuple[int, int], condition: Condition | GivenTexts) -> Layout:
        """The layouts of noise for images of `size` (height, width), found once, by the texts of `condition`."""
        if size not in self._layouts:
            one = condition.select(torch.zeros(1, dtype=torch.long)) if isinstance(condition, Condition) else condition
            with torch.no_grad():
                self._layouts[size] = find_layout(self._call(one, size, self.options.guidance))
        return self._layouts[size]

    def output(
        self, network: Any, noise: Tensor, condition: Condition | GivenTexts, guidance: float, size: tuple[int, int]
    ) -> Tensor:
        """What `network` makes of the inputs of the first step, in the layout of the noise, rows in their order."""
        layout = self.layout(size, condition)
        if self.texts is None or isinstance(condition, GivenTexts):
            return self._read(layout, self.raw(network, noise, condition, guidance, size), len(noise))
        parts, order = [], []
        for rows in self.texts.groups(condition.tensors):
            part = condition if len(rows) == len(condition) else condition.select(rows)
            x = noise if len(rows) == len(condition) else noise[rows.to(noise.device)]
            parts.append(self._read(layout, self.raw(network, x, part, guidance, size), len(x)))
            order.append(rows)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[torch.argsort(torch.cat(order)).to(noise.device)]

    def _read(self, layout: Layout, output: Any, rows: int) -> Tensor:
        """The output in the layout of the noise; of rows in a list, `find_layout` sees the first."""
        found = layout.read(output)
        if len(found) != rows:
            raise InputError(
                f"self-check 'layout': {type(self.pipe).__name__} gives its network {len(found)} rows for {rows}: if "
                "that is classifier-free guidance, set backend.guidance to a value without it (1, or 0); else no "
                "hypernetwork can be made of it"
            )
        return found

    def raw(
        self, network: Any, noise: Tensor, condition: Condition | GivenTexts, guidance: float, size: tuple[int, int]
    ) -> Any:
        """What `network` returns, as it returns it, for rows that can share a batch."""
        latents = self.layout(size, condition).pack(noise)
        return self._call(condition, size, guidance).first(self._given(network), latents=latents)

    def _given(self, network: Any) -> Any:
        """The network, given the family's own values of some inputs."""
        if not self.family.first_call:
            return network
        fixed = self.family.first_call

        def called(*args: Any, **kwargs: Any) -> Any:
            changed = {name: torch.full_like(kwargs[name], value) for name, value in fixed.items()}
            return network(*args, **kwargs | changed)

        return called

    def _call(self, condition: Condition | GivenTexts, size: tuple[int, int], guidance: float) -> PipelineCall:
        pipe = without_encoders(view(self.pipe, self.plain_class, scheduler=self.scheduler))
        name = self.family.network_of(pipe)
        arguments = call_arguments(self.family, pipe, self.options, self.options.schedule or 1, guidance)
        arguments |= {"height": size[0], "width": size[1]}
        if isinstance(condition, GivenTexts):
            return PipelineCall(pipe, name, arguments | accepted_by(pipe, condition.arguments()), condition.texts)
        assert self.texts is not None
        device = self.device or next(getattr(pipe, name).parameters()).device
        texts = self.texts.texts(condition.tensors, device)
        return PipelineCall(pipe, name, arguments | {"prompt": list(condition.prompts)}, texts)


class HyperNetwork(nn.Module):
    """The map `f(x | c)` of a pipeline: the twin at the inputs of the first sampling step, in float32."""

    def __init__(self, first_step: FirstStep, twin: nn.Module, guidance: float, advice: str) -> None:
        super().__init__()
        self.twin = twin
        self.guidance = guidance
        self.first_step = first_step
        self._advice = advice

    def forward(self, noise: Tensor, condition: Condition | GivenTexts, size: tuple[int, int] | None = None) -> Tensor:
        """The delta of each row of `noise`, float32, for images of `size` (by default that of the options)."""
        if len(noise) != len(condition):
            raise InputError(f"{len(noise)} noises and {len(condition)} prompts given: one prompt per noise")
        sides = size or self.first_step.options.sides
        with memory.explained(self._advice):
            return self.first_step.output(self.twin, noise, condition, self.guidance, sides).float()


class NoDelta(nn.Module):
    """The hypernetwork of direct fine-tuning: it holds the trainable generator and leaves the noise alone."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self.twin = twin

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        """Zeros, float32."""
        return torch.zeros_like(noise, dtype=torch.float32)
