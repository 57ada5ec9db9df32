"""A trained noise hypernetwork in plain diffusers code.

Three lines, the first and last of them diffusers' own:

    pipe = SanaSprintPipeline.from_pretrained("Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers").to("cuda")
    pipe = attach(pipe, "runs/my-run/adapter")
    image = pipe("a red fox", num_inference_steps=2, generator=torch.Generator("cuda").manual_seed(0)).images[0]

The result is a pipeline of the same class: a scheduler is exchanged on it, it is offloaded, copied, pickled and saved
like any other. `pipe.detached()` is the plain pipeline again.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hnkit.errors import InputError
from hnkit.injection import Generators, deployed_noise
from hnkit.internal.seeds import forked
from hnkit.scaled.backends import factory_for
from hnkit.scaled.lora.adapter import Adapter, adapter_block, read_adapter, write_adapter
from hnkit.scaled.lora.twin import LoraSpec, load_lora, lora_targets, make_twin
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.calls import drawing, text_arguments, text_to_image_class
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.families.table import family_of
from hnkit.scaled.pipelines.hypernetwork import EACH, FirstStep, GivenTexts, HyperNetwork

ADAPTER_FOLDER = "adapter"
"""Where `save_pretrained` of a steered pipeline puts the adapter, beside the pipeline's own folders."""

_HINT = "a smaller batch, or pipe.vae.enable_slicing()"
_running: ContextVar[_Running | None] = ContextVar("the running call of a steered pipeline", default=None)


@dataclass
class _Running:
    """What is known inside a call of a steered pipeline.

    Attributes:
        given: the arguments of the call.
        texts: what `encode_prompt` has returned, call by call.
        moved: whether the noise has been moved.
    """

    given: Mapping[str, Any]
    texts: list[Any] = field(default_factory=list)
    moved: bool = False


def attach(pipe: Any, adapter: str | Path) -> Any:
    """A pipeline that moves its noise by a trained hypernetwork and otherwise is `pipe`, which is left unmodified.

    Args:
        pipe: a loaded diffusers pipeline on its device: of the class the adapter was trained on, or of another one over
            the same network (image to image, ControlNet) whose `prepare_latents` draws the noise. Offloading,
            compilation and other LoRAs are added to the result, not to `pipe` before.
        adapter: folder of a trained adapter (hnkit's, or in the layout of the paper's published one), or of its run.

    Returns:
        A pipeline of a subclass of `pipe`'s class, and a `SteeredPipeline`; the components are shared.

    Raises:
        InputError: another pipeline class, one with an adapter attached, a network with hooks or another LoRA on it, or
            an adapter that does not belong to this model.
    """
    if isinstance(pipe, SteeredPipeline):
        raise InputError("an adapter is attached to this pipeline already: attach another one to pipe.detached()")
    block = adapter_block(adapter)
    factory = factory_for(pipe, block.get("pipeline_class"))
    recorded = factory.recorded(adapter)
    family = factory.family or family_of(block.get("pipeline_class") or type(pipe).__name__)
    name = family.network_of(pipe)
    base = getattr(pipe, name, None)
    if base is None:
        raise InputError(f"a {type(pipe).__name__} has no {name}: {adapter} is an adapter of a {family.pipeline_class}")
    base = getattr(base, "_orig_mod", base)  # a compiled network stands for the one inside
    _refuse_hooks(pipe, base, name)
    options = factory.options(**recorded)
    zero_base = block.get("zero_base_layer") or family.last_layer or None
    targets = lora_targets(base, options.lora_layers, zero_base)
    expected = Adapter(
        objective="hypernoise",
        base_model=str(pipe.config.get("_name_or_path", "")) or "the given pipeline",
        base=base,
        spec=LoraSpec(int(recorded["rank"]), recorded["lora_alpha"], targets),
        zero_base=zero_base,
        guidance=family.guidance_scale if options.guidance is None else options.guidance,
        weights={},
        conditioning=family.published,
        pipeline_class=family.pipeline_class,
    )
    found = read_adapter(adapter, expected)
    twin = make_twin(base, found.spec, zero_base=found.zero_base)
    load_lora(twin, found.weights)
    steered = copy.copy(pipe)
    steered.__class__ = _steered_class(type(pipe))  # type: ignore[arg-type]
    steered._steer(family, options, found, twin)
    return steered


class SteeredPipeline:
    """What a pipeline becomes when its noise x is replaced by x + f(x); it takes every argument that it took before.

    A call notes what `encode_prompt` returns and moves the noise where `prepare_latents` draws it, or where it is given
    as `latents=`; the sampler is the library's, and so is the order of random draws: with f = 0 the images are
    bit-equal to the plain pipeline's. One forward of f is added, whatever the number of steps. Prompts reach f as they
    did in training: what the adapter records (SANA's instruction, the prompt's length) is the default of the call.

    An adapter that was trained with injected noise is used with it: fresh noise that depends on the call's generator
    and latents, and takes no draw from that generator.
    """

    hypernetwork: HyperNetwork
    family: Family

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline's own call returns."""
        call = super().__call__  # type: ignore[misc]
        given = inspect.signature(call).bind_partial(*args, **kwargs).arguments
        defaults = text_arguments(self.family, self, self._options)
        kwargs |= {key: value for key, value in defaults.items() if key not in given}
        running = _Running(dict(given))
        token = _running.set(running)
        try:
            with memory.explained(_HINT):
                result = call(*args, **kwargs)
        finally:
            _running.reset(token)
        if not running.moved:
            raise InputError(f"{type(self).__name__} did not draw its noise in prepare_latents: f could not move it")
        return result

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline's own method returns."""
        encoded = super().encode_prompt(*args, **kwargs)  # type: ignore[misc]
        running = _running.get()
        if running is not None:
            running.texts.append(encoded)
        return encoded

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline's own method returns; inside a call, with the noise moved."""
        running, plain_class = _running.get(), type(self).__mro__[2]
        if running is None:
            return super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        signature = inspect.signature(super().prepare_latents)  # type: ignore[misc]
        bound = signature.bind(*args, **kwargs)
        size = bound.arguments.get("height"), bound.arguments.get("width")

        def draw(shape: Any, *arguments: Any, **named: Any) -> Tensor:
            noise: Tensor = randn_tensor(shape, *arguments, **named)
            if running.moved:
                return noise
            generator = named.get("generator", arguments[0] if arguments else None)
            return self._move(noise.float(), running, self._sides(noise, size), generator).to(noise.dtype)

        from diffusers.utils.torch_utils import randn_tensor

        given = bound.arguments.get("latents")
        if given is not None:
            sides = self._sides(given, size)
            layout = self.hypernetwork.first_step.layout(sides, self._given_texts(running, len(given)))
            moved = self._move(layout.unpack(given.float()), running, sides, bound.arguments.get("generator"))
            bound.arguments["latents"] = layout.pack(moved).to(given)
        return drawing(self, draw, plain_class)(*bound.args, **bound.kwargs)

    def detached(self) -> Any:
        """The pipeline without the hypernetwork: of the class it had, with the components that this one has now."""
        plain_class: Any = type(self).__mro__[2]  # behind the subclass and this class
        plain = plain_class.__new__(plain_class)
        plain.__dict__.update(self.__dict__)
        for name in ("hypernetwork", "family", "_adapter", "_options"):
            del plain.__dict__[name]
        return plain

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Save the pipeline as it always is, and the adapter in the folder `adapter` inside, for `attach`.

        Raises:
            InputError: the weights are offloaded one by one, and no module holds them.
        """
        if any(parameter.is_meta for parameter in self._network.parameters()):
            raise InputError("sequential offloading has the weights: pipe.remove_all_hooks(), then save")
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        # the files of the base that are saved here are others than those it was loaded from
        write_adapter(Path(save_directory) / ADAPTER_FOLDER, replace(self._adapter, base_files=None))
        return result

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """The pipeline's own `from_pipe`, steered like `pipeline`; `detached()` comes without the hypernetwork."""
        if not isinstance(pipeline, SteeredPipeline):
            raise InputError("from_pipe of a steered class needs a steered pipeline: use attach(pipe, adapter)")
        plain_class: Any = cls.__mro__[2]
        made = plain_class.from_pipe(pipeline, **kwargs)
        made.__class__ = cls
        made._steer(pipeline.family, pipeline._options, pipeline._adapter, pipeline.hypernetwork.twin)
        return made

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the pipeline, and the hypernetwork with it; the LoRA weights stay float32."""
        super().to(*args, **kwargs)  # type: ignore[misc]
        self.hypernetwork.to(device=next(self._network.parameters()).device)
        return self

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """The pipeline's own method, and the same for the hypernetwork."""
        super().enable_sequential_cpu_offload(gpu_id, device)  # type: ignore[misc]
        from accelerate import cpu_offload

        cpu_offload(self.hypernetwork.twin, self._execution_device)  # type: ignore[attr-defined]

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """The pipeline's own method, and the same for the hypernetwork."""
        method = super().enable_group_offload  # type: ignore[misc]
        method(*args, **kwargs)
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        given.pop("exclude_modules", None)
        twin: Any = self.hypernetwork.twin
        twin.enable_group_offload(**given)

    def remove_all_hooks(self) -> None:
        """The pipeline's own method, and the same for the hypernetwork."""
        super().remove_all_hooks()  # type: ignore[misc]
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(self.hypernetwork.twin, recurse=True)

    def __copy__(self) -> Any:
        """A pipeline of its own over the same components: what is set on it does not reach this one."""
        other = _bare(type(self).__mro__[2])
        other.__dict__.update(self.__dict__)
        other._steer(self.family, self._options, self._adapter, self.hypernetwork.twin)
        return other

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The subclass is made on the spot, so that it is made again where the pipeline is copied or unpickled."""
        return _bare, (type(self).__mro__[2],), self.__dict__

    @property
    def _network(self) -> nn.Module:
        network: nn.Module = getattr(self, self.family.network_of(self))
        return network

    def _steer(self, family: Family, options: Any, adapter: Adapter, twin: nn.Module) -> None:
        self.family = family
        self._options = options
        self._adapter = adapter
        plain_class: Any = type(self).__mro__[2]
        pipe: Any = self
        if plain_class.__name__ != family.pipeline_class:  # f is called in the pipeline that it was trained in
            plain_class = text_to_image_class(family)
            taken = inspect.signature(plain_class).parameters
            pipe = plain_class(**{name: part for name, part in self.components.items() if name in taken})  # type: ignore[attr-defined]
        first_step = FirstStep(family, pipe, None, options, plain_class)
        self.hypernetwork = HyperNetwork(first_step, twin, adapter.guidance, _HINT)

    def _move(self, noise: Tensor, running: _Running, sides: tuple[int, int], generator: Any) -> Tensor:
        """Noise as the pipeline draws it, moved."""
        delta = self._delta(noise, running, sides)
        if self._adapter.injection is None:
            return noise + delta
        moved, _ = deployed_noise(self._adapter.injection, noise, delta, _fresh_generators(generator, noise))
        return moved

    def _delta(self, noise: Tensor, running: _Running, sides: tuple[int, int]) -> Tensor:
        network = self._network
        stored = any(parameter.dtype.itemsize == 1 for parameter in network.parameters())
        if stored or any("layerwise_casting" in name for name in _hook_names(network)):
            how = "in 8 bits" if stored else "in another type than they compute in"
            raise InputError(
                f"the network's weights are stored {how}, and the hypernetwork shares them: take layerwise casting or "
                "quantisation off"
            )
        offload = getattr(network, "_hf_hook", None)
        if offload is not None:  # the hypernetwork shares the weights: have them where the network would run
            offload.pre_forward(network)
        lora = [parameter for parameter in self.hypernetwork.parameters() if parameter.requires_grad]
        if any(parameter.device != noise.device and not parameter.is_meta for parameter in lora):
            for parameter in lora:
                parameter.data = parameter.data.to(noise.device)
        running.moved = True
        token = _running.set(None)  # f is a call of a pipeline, too
        try:
            texts = self._given_texts(running, len(noise))
            shape = self.hypernetwork.first_step.layout(sides, texts).shape
            if tuple(noise.shape[1:]) != shape:
                raise InputError(
                    f"{type(self).__name__} draws noise of shape {tuple(noise.shape)}, and the adapter moves "
                    f"{(len(noise), *shape)}: ask for what it was trained on (one image, no video)"
                )
            delta: Tensor = self.hypernetwork(noise, texts, sides)
        finally:
            _running.reset(token)
        return delta

    def _given_texts(self, running: _Running, rows: int) -> GivenTexts:
        """The texts of the running call for f's own: as they were encoded, or as the caller gave them."""
        each = next((running.given[name] for name in EACH if running.given.get(name)), 1)
        embedded = {
            name: value
            for name, value in running.given.items()
            if not running.texts and value is not None and ("embeds" in name or "attention_mask" in name)
        }
        return GivenTexts(running.texts, rows, int(each), embedded)

    def _sides(self, noise: Tensor, size: tuple[int | None, int | None]) -> tuple[int, int]:
        """Height and width of the image in pixels; where `prepare_latents` is not told, by the shape of the noise."""
        if size[0] and size[1]:
            return int(size[0]), int(size[1])
        factor = int(getattr(self, "vae_scale_factor", 8))
        return int(noise.shape[-2]) * factor, int(noise.shape[-1]) * factor


@functools.cache
def _steered_class(plain: type) -> Any:
    """The steered subclass of a pipeline class, under the name of that class: libraries write it to their files."""
    return type(plain.__name__, (SteeredPipeline, plain), {"__module__": plain.__module__, "__doc__": plain.__doc__})


def _fresh_generators(given: torch.Generator | list[torch.Generator] | None, latents: Tensor) -> Generators:
    """What injected noise is drawn from: what the call was given, and nothing of that is used up.

    Sampler noise is so the same with and without a hypernetwork. The latents are part of the seed, because one
    generator in the state it has may be given with many latents.
    """

    def fork(generator: torch.Generator, rows: Tensor) -> torch.Generator:
        digest = hashlib.sha256(rows.detach().float().cpu().numpy().tobytes()).hexdigest()
        return forked(generator, f"injected noise/{digest}")

    if given is None:
        return None
    if isinstance(given, torch.Generator):
        return fork(given, latents)
    return [fork(generator, row) for generator, row in zip(given, latents, strict=False)]


def _bare(plain: type) -> Any:
    steered = _steered_class(plain)
    return steered.__new__(steered)


def _hook_names(network: nn.Module) -> set[str]:
    """Names of the hooks that diffusers has put on the layers of a network."""
    return {name for m in network.modules() for name in getattr(getattr(m, "_diffusers_hook", None), "hooks", ())}


def _refuse_hooks(pipe: Any, base: nn.Module, name: str) -> None:
    """Hooks and LoRA layers would be shared with the hypernetwork, or copied into it at their present state."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules: Mapping[str, nn.Module] = dict(base.named_modules())
    if getattr(pipe, "_all_hooks", None) or any(hasattr(module, "_hf_hook") for module in modules.values()):
        raise InputError(
            "the pipeline has offloading hooks: attach the adapter first, then enable offloading on the result"
        )
    if names := _hook_names(base):
        raise InputError(
            f"the pipeline's {name} has the hooks {', '.join(sorted(names))}: attach the adapter first, then "
            "enable group offloading on the result; layerwise casting is not for weights that are shared"
        )
    if any(isinstance(module, BaseTunerLayer) for module in modules.values()):
        raise InputError(
            f"the pipeline's {name} carries another LoRA: pipe.unload_lora_weights(), attach the adapter, "
            "and load that LoRA into the result"
        )
