"""What the three real backends share: one diffusers pipeline, frozen, and the twin of its network as hypernetwork.

A `Family` says what is particular to a pipeline class (a screenful each, in sana.py, sd_turbo.py, flux.py); everything
else is here once. No sampler is written: `generate` is the pipeline's own `__call__`, without its `no_grad`.
"""

from __future__ import annotations

import copy
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from hnkit.scaled.internal.hub import local_folder, missing_model, without_bars
from hnkit.scaled.lora.adapter import Adapter, read_adapter, write_adapter
from hnkit.scaled.lora.twin import LoraSpec, load_lora, lora_state, lora_targets, make_twin
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.embeddings import EmbeddingCache, cache_root, model_key
from safetensors import SafetensorError
from torch import Tensor, nn

from hnkit.backend import Condition
from hnkit.errors import InputError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        if self.dtype not in _DTYPES:
            raise InputError(f"backend.dtype {self.dtype!r}: choose one of {', '.join(_DTYPES)}")
        for name in ("size", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise InputError(f"backend.{name} {getattr(self, name)}: it is 1 or more")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"backend.seed {self.seed}: it is a whole number from 0 to 2^63 - 1")


class Family(ABC):
    """What is particular to one diffusers pipeline class, as used for noise hypernetworks."""

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    network: ClassVar[str]
    """Component that f is the twin of."""
    last_layer: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    load_arguments: ClassVar[Mapping[str, Any]] = {}
    max_steps: ClassVar[int] = 1000
    multiple: ClassVar[int] = 8
    """What divides every image side that the pipeline takes."""

    @abstractmethod
    def noise_shape(self, pipe: Any, size: int) -> tuple[int, ...]:
        """Shape of one sample's noise at an image side of `size` pixels."""

    @abstractmethod
    def encode_arguments(self, options: Any) -> dict[str, Any]:
        """Keyword arguments of the pipeline's `encode_prompt`, beside the prompts."""

    @abstractmethod
    def embeddings(self, encoded: tuple[Any, ...]) -> dict[str, Tensor]:
        """What `encode_prompt` returned, by name, rows first."""

    @abstractmethod
    def delta(
        self, pipe: Any, network: nn.Module, noise: Tensor, tensors: Mapping[str, Tensor], guidance: float
    ) -> Tensor:
        """One forward of `network` on the noise, at the inputs the pipeline gives it in its first step."""

    @abstractmethod
    def call_arguments(self, options: Any, tensors: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        """Keyword arguments of the pipeline call, beside latents, size, generator and output type."""

    def plain_arguments(self, options: Any) -> dict[str, Any]:
        """Keyword arguments of a plain one-step call of the pipeline, beside the prompt, that match `options`."""
        size, guidance = options.size, options.guidance
        return {"num_inference_steps": 1, "guidance_scale": guidance, "height": size, "width": size}

    def pack(self, pipe: Any, noise: Tensor) -> Tensor:
        """The noise in the layout of the pipeline's argument `latents`."""
        return noise

    def unpack(self, pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `pack`."""
        return latents

    def prepared_scale(self, pipe: Any) -> float:
        """What the pipeline's `prepare_latents` multiplies noise by."""
        return 1.0


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


class PipelineBackend:
    """A frozen diffusers pipeline with a noise hypernetwork: implements `hnkit.backend.Backend`.

    Attributes:
        name: of the backend, for reports.
        noise_shape: of one sample.
        hypernetwork: `f(x | c)`, zero at the start; its parameters that require gradients are the LoRA weights.
        pipeline: the unmodified diffusers pipeline that makes the images (its text encoders are kept apart).
        options: as loaded.
        objective: `"hypernoise"`, or `"direct"` when the LoRA is on the generator itself.
    """

    def __init__(
        self,
        family: Family,
        options: PipelineOptions,
        pipe: Any,
        *,
        name: str,
        cache: EmbeddingCache | None = None,
        objective: Literal["hypernoise", "direct"] = "hypernoise",
    ) -> None:
        self.name = name
        self.options = options
        self.objective = objective
        self.family = family
        if options.size % family.multiple:
            raise InputError(f"backend.size {options.size}: {name} takes a multiple of {family.multiple}")
        self.noise_shape = family.noise_shape(pipe, options.size)
        self._encoder_pipe = pipe
        self._base: nn.Module = getattr(pipe, family.network)
        self.pipeline = _without_encoders(pipe, family)
        self._cache = cache or EmbeddingCache(self._encode_now, self._cache_folder())
        spec = LoraSpec(options.rank, options.lora_alpha, lora_targets(self._base))
        self.hypernetwork = self._install(spec)

    @property
    def max_steps(self) -> int:
        """The most sampler steps that the pipeline's scheduler takes."""
        return self.family.max_steps

    @property
    def device(self) -> torch.device:
        """Where noise, conditions and images live."""
        return next(self._base.parameters()).device

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Embeddings of the prompts, from the cache where they are known.

        Raises:
            InputError: no prompts, or an empty one.
        """
        if isinstance(prompts, str) or not prompts:
            raise InputError("no prompts given: encode takes a list of one or more")
        blank = [i for i, prompt in enumerate(prompts) if not prompt.strip()]
        if blank:
            raise InputError(f"prompt {blank[0] + 1} of {len(prompts)} is empty: give it some text or leave it out")
        tensors = self._cache.rows(prompts)
        return Condition(tuple(prompts), {key: value.to(self.device) for key, value in tensors.items()})

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode a prompt set into the cache, so that training needs the text encoders no more."""
        self._cache.store(prompts)

    def generate(
        self,
        noise: Tensor,
        condition: Condition,
        steps: int = 1,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Images of `noise`, by the pipeline's own sampler; differentiable, float32, shape `(n, 3, size, size)`.

        Args:
            noise: standard normal or steered, shape `(n, *noise_shape)`.
            condition: of the n rows.
            steps: of the sampler.
            generator: of the noise that a sampler of several steps adds; `None`: one seeded with `options.seed`, so
                that base and steered images of the same batch share it. One per row makes rows independent of their
                place in the batch.

        Raises:
            InputError: shapes do not match, or the scheduler refuses that number of steps.
        """
        self._check(noise, condition, steps)
        if generator is None:
            generator = torch.Generator(device=noise.device).manual_seed(self.options.seed)
        arguments = self.family.call_arguments(self.options, condition.tensors, steps)
        sample: Any = inspect.unwrap(type(self.pipeline).__call__)  # the library's sampler without its torch.no_grad
        with memory.explained(memory.advice(self.options)):
            try:
                images: Tensor = sample(
                    self.pipeline,
                    latents=self.family.pack(self.pipeline, noise),
                    height=self.options.size,
                    width=self.options.size,
                    num_inference_steps=steps,
                    generator=generator,
                    output_type="pt",
                    return_dict=False,
                    **arguments,
                )[0]
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise InputError(f"{self.family.pipeline_class} refused {steps} step(s): {reason}") from error
        return images.float()

    def direct(self) -> PipelineBackend:
        """The direct fine-tuning twin of this backend: the same LoRA, on the generator itself, and no noise map."""
        return type(self)(
            self.family,
            self.options,
            self._encoder_pipe,
            name=self.name,
            cache=self._cache,
            objective="direct",
        )

    def memory_advice(self) -> str:
        """Which options would reduce memory further, for an out-of-memory message."""
        return memory.advice(self.options)

    def usage(self) -> str:
        """Python code that uses the saved adapter, for its model card; `adapter` is its folder."""
        if self.objective == "direct":
            return (
                "from hnkit.backend import backend_factory\n\n"
                f"factory = backend_factory({self.name!r})\n"
                f"options = factory.options(rank={self._spec.rank}, lora_alpha={self._spec.alpha:g})\n"
                "generator = factory.load(options).direct()\n"
                "generator.load_adapter(adapter)"
            )
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.family.plain_arguments(self.options).items())
        return (
            f"from diffusers import {self.family.pipeline_class}\n"
            "from hnkit.scaled.attach import attach\n\n"
            f"pipe = {self.family.pipeline_class}.from_pretrained({self.options.model_id!r})\n"
            "pipe = attach(pipe, adapter)\n"
            f"images = pipe(prompt, {arguments}).images"
        )

    def save_adapter(self, folder: Path) -> None:
        """Write the LoRA weights and what they belong to; `folder` must be new or empty."""
        write_adapter(folder, self._adapter())

    def load_adapter(self, folder: Path) -> None:
        """Read what `save_adapter` wrote, or an adapter in the layout of the paper's published one.

        Raises:
            InputError: the folder is damaged, or belongs to another base, rank, objective or layer set.
        """
        mine = self._adapter()
        adapter = read_adapter(folder, mine)
        if adapter.spec != mine.spec:
            self.hypernetwork = self._install(adapter.spec)
        load_lora(self._twin, adapter.weights)
        if isinstance(self.hypernetwork, HyperNetwork):
            self.hypernetwork.guidance = adapter.guidance

    @property
    def _twin(self) -> nn.Module:
        twin: nn.Module = self.hypernetwork.twin
        return twin

    def _adapter(self) -> Adapter:
        zero_base = self.family.last_layer if self.objective == "hypernoise" else None
        return Adapter(
            objective=self.objective,
            base_model=self.options.model_id,
            base=self._base,
            spec=self._spec,
            zero_base=zero_base,
            guidance=self.options.guidance,
            weights=lora_state(self._twin),
        )

    def _install(self, spec: LoraSpec) -> HyperNetwork | NoDelta:
        """Build the twin for `spec` and put it to work: as f, or in direct fine-tuning as the generator."""
        options = self.options
        self._spec = spec
        zero_base = self.family.last_layer if self.objective == "hypernoise" else None
        twin = make_twin(self._base, spec, zero_base=zero_base, seed=options.seed)
        if self.objective == "direct":
            setattr(self.pipeline, self.family.network, twin)
            memory.set_checkpointing(twin, options.generator_checkpointing)
            return NoDelta(twin)
        memory.set_checkpointing(twin, options.hypernetwork_checkpointing)
        advice = memory.advice(options)
        hypernetwork = HyperNetwork(self.family, self.pipeline, twin, options.guidance, advice)
        if options.compile != "no":
            noise = torch.zeros(1, *self.noise_shape, device=self.device)
            memory.compile_checked(hypernetwork, options.compile, noise, self.encode(["parity check"]))
        return hypernetwork

    def _cache_folder(self) -> Path | None:
        options = self.options
        if not options.cache_dir:
            return None
        root = cache_root() if options.cache_dir == "auto" else Path(options.cache_dir)
        settings = self.family.encode_arguments(options) | {"family": self.family.name, "dtype": options.dtype}
        return root / model_key(Path(self._encoder_pipe.config._name_or_path), settings)

    def _encode_now(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoders = [getattr(self._encoder_pipe, name) for name in self.family.encoders]
        # Never inference tensors, whatever mode the caller is in: they are saved for the backward pass of f.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            memory.explained(memory.advice(self.options)),
            _lent(encoders, self.device),
        ):
            encoded = self._encoder_pipe.encode_prompt(
                list(prompts), device=self.device, **self.family.encode_arguments(self.options)
            )
        return self.family.embeddings(encoded)

    def _check(self, noise: Tensor, condition: Condition, steps: int) -> None:
        if tuple(noise.shape[1:]) != self.noise_shape:
            raise InputError(f"noise of shape {tuple(noise.shape)}: {self.name} takes (n, {_show(self.noise_shape)})")
        if len(noise) != len(condition):
            raise InputError(f"{len(noise)} noises and {len(condition)} prompts given: one prompt per noise")
        if not 1 <= steps <= self.family.max_steps:
            raise InputError(f"{steps} steps: {self.name} takes 1 to {self.family.max_steps}")


def load_pipeline(family: Family, options: PipelineOptions) -> Any:
    """Load and freeze the pipeline that `options` name, on its device; text encoders stay on the CPU.

    Raises:
        InputError: the model is not there, is another pipeline's, or its files are damaged.
    """
    import diffusers
    import diffusers.utils.logging
    import transformers.utils.logging

    folder = find_model(options.model_id, options.local_files_only)
    _check_index(folder, family)
    bars = without_bars(diffusers.utils.logging, transformers.utils.logging)
    try:
        with bars, torch.random.fork_rng(devices=[]):  # models draw initial weights before the real ones are read
            pipe = getattr(diffusers, family.pipeline_class).from_pretrained(
                folder,
                dtype=_DTYPES[options.dtype],
                local_files_only=True,
                use_safetensors=True,
                **family.load_arguments,
            )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model {options.model_id!r} does not load from {folder}: {reason}") from error
    device = _device(options.device)
    for name, component in pipe.components.items():
        if name.startswith("tokenizer"):
            memory.drop_word_cache(component)
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
            if name not in family.encoders:
                with memory.explained(memory.advice(options)):
                    component.to(device)
    memory.apply_decoder_options(pipe.vae, options)
    memory.set_checkpointing(getattr(pipe, family.network), options.generator_checkpointing)
    return pipe


def find_model(model_id: str, local_files_only: bool = True) -> Path:
    """The folder of a model: `model_id` itself if it is one, else its snapshot in the local hub cache.

    Raises:
        InputError: it is neither, and downloading is off.
    """
    folder = local_folder(model_id)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if local_files_only:
            return Path(snapshot_download(model_id, local_files_only=True))
        from diffusers import DiffusionPipeline

        return Path(DiffusionPipeline.download(model_id, use_safetensors=True))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise missing_model("backend.model_id", model_id, error) from error


def _check_index(folder: Path, family: Family) -> None:
    try:
        found = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} has no readable model_index.json: give a folder in diffusers' format") from error
    if found != family.pipeline_class:
        raise InputError(f"{folder} holds a {found}: backend {family.name} needs a {family.pipeline_class}")


def _without_encoders(pipe: Any, family: Family) -> Any:
    """A second pipeline object over the same components, without text encoders: they may live elsewhere."""
    bare = copy.copy(pipe)
    for name in family.encoders:
        setattr(bare, name, None)
    bare.set_progress_bar_config(disable=True)
    return bare


@contextmanager
def _lent(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Have the text encoders on the accelerator only while they are needed."""
    homes = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"backend.device {name!r} cannot be used here: choose auto, cpu, or cuda") from error
    return device


def _show(shape: Sequence[int]) -> str:
    return ", ".join(str(side) for side in shape)
