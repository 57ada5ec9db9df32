"""What the three real backends share: one diffusers pipeline, frozen, and the twin of its network as hypernetwork.

A `Family` says what is particular to a pipeline class (a screenful each, in sana.py, sd_turbo.py, flux.py); everything
else is here once. No sampler is written: `generate` is the pipeline's own `__call__`, without its `no_grad`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hnkit.backend import BackendBase
from hnkit.errors import InputError
from hnkit.maps import Condition
from hnkit.scaled.lora.adapter import Adapter, read_adapter, write_adapter
from hnkit.scaled.lora.base import BaseFiles
from hnkit.scaled.lora.twin import LoraSpec, load_lora, lora_state, lora_targets, make_twin
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.embeddings import EmbeddingCache, cache_root, embedding_key
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.hypernetwork import HyperNetwork, NoDelta
from hnkit.scaled.pipelines.identity import files_digest, stored_precision, weights_variant
from hnkit.scaled.pipelines.loading import without_encoders
from hnkit.scaled.pipelines.options import PipelineOptions


class PipelineBackend(BackendBase):
    """A frozen diffusers pipeline with a noise hypernetwork.

    Attributes:
        name: the name of the backend, for reports.
        noise_shape: the shape of one sample.
        hypernetwork: `f(x | c)`, zero at the start; its parameters that require gradients are the LoRA weights.
        pipeline: the unmodified diffusers pipeline that makes the images (its text encoders are kept apart).
        options: as loaded.
        objective: `"hypernoise"`, or `"direct"` when the LoRA is on the generator itself.
        injection: how the hypernetwork is deployed, kept in its adapters.
    """

    records_injection = True

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
        self.pipeline = without_encoders(pipe, family)
        self._cache = cache or EmbeddingCache(self._encode_now, self._cache_folder())
        spec = LoraSpec(options.rank, options.lora_alpha, lora_targets(self._base))
        self.hypernetwork = self._install(spec)

    @property
    def max_steps(self) -> int:  # type: ignore[override]
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
            condition: the condition of the n rows.
            steps: the steps of the sampler.
            generator: the generator of the noise that a sampler of several steps adds; `None`: one for each row, from
                the seed of its image and `options.seed`, so that an image is the same in every batch, and base and
                steered ones share that noise.

        Raises:
            InputError: shapes do not match, or the scheduler refuses that number of steps.
        """
        self._check(noise, condition, steps)
        if generator is None:
            generator = condition.generators("sampler", self.options.seed)
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

    def model_digest(self) -> str | None:
        """SHA-256 of the files that the model was loaded from: configurations, tokenizers, weights.

        `None` for a model that was made in memory. Files of more than a megabyte are read once, and known again by the
        identity of the file.
        """
        return self._digest

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

    def save_adapter(self, folder: str | Path) -> None:
        """Write the LoRA weights and what they belong to; `folder` must be new or empty."""
        write_adapter(folder, self._adapter())

    def load_adapter(self, folder: str | Path) -> None:
        """Read what `save_adapter` wrote, or an adapter in the layout of the paper's published one.

        Raises:
            InputError: the folder is damaged, or belongs to another base, rank, objective or layer set.
        """
        mine = self._adapter()
        adapter = read_adapter(folder, mine)
        if adapter.spec != mine.spec:
            self.hypernetwork = self._install(adapter.spec)
        load_lora(self._twin, adapter.weights)
        self.injection = adapter.injection
        if isinstance(self.hypernetwork, HyperNetwork):
            self.hypernetwork.guidance = adapter.guidance

    @property
    def _twin(self) -> nn.Module:
        return cast(nn.Module, self.hypernetwork.twin)

    def _adapter(self) -> Adapter:
        zero_base = self.family.last_layer if self.objective == "hypernoise" else None
        return Adapter(
            objective=self.objective,
            base_model=self.options.model_id,
            base=self._base,
            spec=self._spec,
            zero_base=zero_base,
            guidance=getattr(self.hypernetwork, "guidance", self.options.guidance),
            weights=lora_state(self._twin),
            conditioning={name: getattr(self.options, name) for name in self.family.conditioning},
            injection=self.injection,
            base_files=self._base_files,
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
        if root is None or self._folder is None:
            return None
        settings = self.family.encode_arguments(options) | {"family": self.family.name, "dtype": options.dtype}
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        text = [name for name in self._encoder_pipe.components if name.startswith(("text_encoder", "tokenizer"))]
        return root / embedding_key(self._folder, text, settings | {"device": device})

    @property
    def _folder(self) -> Path | None:
        """Where the model was loaded from; `None` for one that was made in memory."""
        folder = Path(str(self._encoder_pipe.config.get("_name_or_path")))
        return folder if folder.is_dir() else None

    @cached_property
    def _digest(self) -> str | None:
        if self._folder is None:
            return None
        variant = weights_variant(self._folder / self.family.network)
        return files_digest(self._folder, self._encoder_pipe.components, variant)

    @property
    def _base_files(self) -> BaseFiles | None:
        if self._folder is None or self._digest is None:
            return None
        variant = weights_variant(self._folder / self.family.network)
        return BaseFiles(self._digest, stored_precision(self._folder, self.family.network, variant))

    def _encode_now(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoders = [getattr(self._encoder_pipe, name) for name in self.family.encoders]
        # Never inference tensors, whatever mode the caller is in: they are saved for the backward pass of f.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            memory.explained(memory.advice(self.options)),
            _lent(encoders, self.device),
        ):
            rows = [
                self.family.embeddings(
                    self._encoder_pipe.encode_prompt(
                        [prompt], device=self.device, **self.family.encode_arguments(self.options)
                    )
                )
                for prompt in prompts  # one by one: in a batch, the others would change the rounding
            ]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    def _check(self, noise: Tensor, condition: Condition, steps: int) -> None:
        if tuple(noise.shape[1:]) != self.noise_shape:
            raise InputError(f"noise of shape {tuple(noise.shape)}: {self.name} takes (n, {_show(self.noise_shape)})")
        if len(noise) != len(condition):
            raise InputError(f"{len(noise)} noises and {len(condition)} prompts given: one prompt per noise")
        if not 1 <= steps <= self.family.max_steps:
            raise InputError(f"{steps} steps: {self.name} takes 1 to {self.family.max_steps}")


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


def _show(shape: Sequence[int]) -> str:
    return ", ".join(str(side) for side in shape)
