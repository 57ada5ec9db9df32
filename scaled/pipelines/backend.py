"""Any distilled pipeline of diffusers as a backend: the pipeline, frozen, and the twin of its network as hypernetwork.

A `Family` says in a few values what is particular to a pipeline class; everything else is found at load. No sampler is
written: `generate` is the pipeline's own `__call__`, without its `no_grad`, and f is the same call with the twin in the
place of the network, stopped at its first network call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hnkit.backend import BackendBase
from hnkit.errors import InputError
from hnkit.internal.values import reason_of
from hnkit.maps import Condition, ConditionedMap, NoiseMap
from hnkit.scaled.lora.adapter import Adapter, read_adapter, write_adapter
from hnkit.scaled.lora.base import BaseFiles
from hnkit.scaled.lora.twin import LoraSpec, load_lora, lora_state, lora_targets, make_twin, share_weights
from hnkit.scaled.pipelines import memory
from hnkit.scaled.pipelines.calls import PipelineCall, call_arguments, encoder_names, without_encoders
from hnkit.scaled.pipelines.conditions import LONG, TextLayout, find_text_layout
from hnkit.scaled.pipelines.embeddings import EmbeddingCache, cache_root, embedding_key, joined
from hnkit.scaled.pipelines.families.family import Family
from hnkit.scaled.pipelines.hypernetwork import FirstStep, HyperNetwork, NoDelta
from hnkit.scaled.pipelines.identity import files_digest, stored_precision, weights_variant
from hnkit.scaled.pipelines.layout import Layout
from hnkit.scaled.pipelines.loading import find_device, waits_for_shards
from hnkit.scaled.pipelines.options import RECORDED, PipelineOptions
from hnkit.scaled.pipelines.parts import parts_digest
from hnkit.scaled.pipelines.selfcheck import check, find_last_layer
from hnkit.scaled.pipelines.usage import attach_code, direct_code


@dataclass(frozen=True)
class Known:
    """What is found at load, where nothing can be: for a backend without weights.

    Attributes:
        cache: embeddings of the right shapes, in the place of an `EmbeddingCache`.
        texts: how they are laid out.
        layout: the layouts of the noise at the size of the options.
    """

    cache: Any
    texts: TextLayout
    layout: Layout


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
        known: Known | None = None,
    ) -> None:
        self.name = name
        self.options = options
        self.objective: Literal["hypernoise", "direct"] = "hypernoise"
        self.family = family
        self._network = family.network_of(pipe)
        self._encoder_pipe = pipe
        self._require_size()
        self._base: nn.Module = getattr(pipe, self._network)
        self.pipeline = without_encoders(pipe)
        self._cache: Any = known.cache if known else EmbeddingCache(self._encode_now, self._cache_folder())
        if known is not None:
            self._texts = known.texts
        with memory.explained(memory.advice(options)), self._first_calls():
            self.first_step = FirstStep(family, pipe, self._texts, options)
            if known is not None:
                self.first_step.know(options.sides, known.layout)
            self.noise_shape = self.first_step.layout(options.sides, self.any_condition).shape
            self.last_layer = family.last_layer or find_last_layer(self._base, self.first_step, self.any_condition)
            self.hypernetwork = self._install(self._own_spec())
            self._compile_generator(self._base)
            if options.self_check and known is None and not waits_for_shards(options):
                check(self)

    @property
    def max_steps(self) -> int:  # type: ignore[override]
        """The most sampler steps that the pipeline's scheduler takes."""
        config = self.pipeline.scheduler.config
        return int(self.options.schedule or config.get("num_train_timesteps", 1000))

    @property
    def device(self) -> torch.device:
        """Where noise, conditions and images live."""
        return next(self._base.parameters()).device

    @property
    def lora(self) -> LoraSpec:
        """Rank, alpha and layers of the trained LoRA."""
        return self._spec

    @property
    def network(self) -> nn.Module:
        """The generator's network: the frozen one, or in direct fine-tuning the one with the LoRA."""
        network: nn.Module = getattr(self.pipeline, self._network)
        return network

    def pack(self, noise: Tensor) -> Tensor:
        """The noise as the argument `latents` of the pipeline takes it."""
        return self.first_step.layout(self.options.sides, self.any_condition).pack(noise)

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

    def share_out(self) -> bool:
        """Share the frozen network out over the processes of `torch.distributed`, where `options.shard` asks for it.

        Raises:
            InputError: it is one of direct fine-tuning, or the self-check, which is made only now, fails.
        """
        from hnkit.scaled.pipelines.sharding import share_out  # FSDP2 takes a second to import

        shared = share_out(self)
        if shared and self.options.self_check:
            self.__dict__.pop("any_condition", None)  # it was made where the network was loaded
            check(self)
        return shared

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
        images = self.sample(noise, condition, steps, generator)
        if tuple(images.shape[-2:]) != self.options.sides:
            raise InputError(
                f"backend.size {_by(self.options.sides)}: {type(self.pipeline).__name__} paints "
                f"{_by(tuple(images.shape[-2:]))}: give that size"
            )
        return images

    def sample(
        self,
        noise: Tensor,
        condition: Condition,
        steps: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """What `generate` returns, at any `size` (height, width)."""
        if generator is None:
            generator = condition.generators("sampler", self.options.seed)
        height, width = size or self.options.sides
        arguments = call_arguments(self.family, self.pipeline, self.options, steps, self.options.guidance)
        arguments |= {"height": height, "width": width, "output_type": "pt"}
        layout = self.first_step.layout((height, width), condition)
        parts, order = [], []
        with memory.explained(memory.advice(self.options)):
            for rows in self._texts.groups(condition.tensors):
                whole = len(rows) == len(condition)
                part = condition if whole else condition.select(rows)
                texts = self._texts.texts(part.tensors, self.device)
                call = PipelineCall(self.pipeline, self._network, arguments | {"prompt": list(part.prompts)}, texts)
                mine = [generator[i] for i in rows.tolist()] if isinstance(generator, list) else generator
                x = noise if whole else noise[rows.to(noise.device)]
                images = call.run(latents=layout.pack(x), generator=mine)[0]
                if images.ndim == 5 and images.shape[1] != 1:
                    raise InputError(
                        f"{type(self.pipeline).__name__} makes {images.shape[1]} frames where one is asked for: "
                        "hypernetworks are trained on images"
                    )
                parts.append((images if images.ndim == 4 else images[:, 0]).float())  # the only frame of a video
                order.append(rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.argsort(torch.cat(order)).to(noise.device)]

    def map_for(self, prompts: Sequence[str]) -> NoiseMap:
        """The hypernetwork as a map of the noise alone, not compiled: compiled code has first derivatives only."""
        f = self.hypernetwork
        if self.options.compile != "no" and isinstance(f, HyperNetwork):
            f = HyperNetwork(self.first_step, share_weights(self._twin), f.guidance, memory.advice(self.options))
        return ConditionedMap(f, self.encode(prompts))

    def direct(self) -> PipelineBackend:
        """The direct fine-tuning twin of this backend: the same LoRA, on the generator itself, and no noise map."""
        other = copy.copy(self)
        other.objective = "direct"
        other.pipeline = without_encoders(self._encoder_pipe)
        other.hypernetwork = other._install(self._own_spec())
        return other

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
            return direct_code(self.name, self._spec.rank, self._spec.alpha)
        variant = weights_variant(self._folder / self._network) if self._folder is not None else None
        return attach_code(self.family, self.pipeline, self._network, self.options, variant)

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
        zero_base = self.last_layer if self.objective == "hypernoise" else None
        return Adapter(
            objective=self.objective,
            base_model=self.options.model_id,
            base=self._base,
            spec=self._spec,
            zero_base=zero_base,
            guidance=getattr(self.hypernetwork, "guidance", self.options.guidance),
            weights=lora_state(self._twin),
            conditioning=self._conditioning(),
            injection=self.injection,
            base_files=self._base_files,
            pipeline_class=type(self.pipeline).__name__,
        )

    def _own_spec(self) -> LoraSpec:
        targets = lora_targets(self._base, self.options.lora_layers, self.last_layer)
        return LoraSpec(self.options.rank, self.options.lora_alpha, targets)

    def _install(self, spec: LoraSpec) -> HyperNetwork | NoDelta:
        """Build the twin for `spec` and put it to work: as f, or in direct fine-tuning as the generator."""
        options = self.options
        self._spec = spec
        zero_base = self.last_layer if self.objective == "hypernoise" else None
        twin = make_twin(self._base, spec, zero_base=zero_base, seed=options.seed, autocast=options.lora_autocast)
        trained: list[Tensor] = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        if self.objective == "direct":
            setattr(self.pipeline, self._network, twin)
            memory.set_checkpointing(twin, options.generator_checkpointing)
            self._compile_generator(twin, trained)
            return NoDelta(twin)
        memory.set_checkpointing(twin, options.hypernetwork_checkpointing)
        advice = memory.advice(options)
        hypernetwork = HyperNetwork(self.first_step, twin, options.guidance, advice)
        self._compile(twin, "f", hypernetwork, trained)
        return hypernetwork

    def _compile_generator(self, network: nn.Module, trained: Sequence[Tensor] = ()) -> None:
        options = self.options

        def predicted(x: Tensor, condition: Condition) -> Tensor:
            return self.first_step.output(network, x, condition, options.guidance, options.sides).float()

        self._compile(network, "the generator", predicted, trained)

    def _compile(
        self, network: nn.Module, what: str, run: Callable[[Tensor, Condition], Tensor], trained: Sequence[Tensor]
    ) -> None:
        """Compile a network's blocks if the options say so; `run` is what is compared, with its gradients."""
        if self.options.compile == "no":
            return
        noise, one = self._any_row()
        weights = list(trained)
        with memory.moved_at_random(weights):
            memory.compile_checked(
                network,
                self.options.compile,
                what,
                lambda: memory.values_and_gradients(lambda x: run(x, one), noise, weights),
            )

    def _any_row(self) -> tuple[Tensor, Condition]:
        one = self.any_condition.select(torch.zeros(1, dtype=torch.long))
        return torch.zeros(1, *self.noise_shape, device=self.device), one

    def _cache_folder(self) -> Path | None:
        options = self.options
        if not options.cache_dir:
            return None
        root = cache_root() if options.cache_dir == "auto" else Path(options.cache_dir)
        if root is None or self._folder is None:
            return None
        called = call_arguments(self.family, self._encoder_pipe, options, options.schedule or 1, options.guidance)
        settings = {name: called.get(name) for name in ("max_sequence_length", *self.family.text_arguments)}
        settings |= {"family": self.family.pipeline_class, "dtype": options.dtype, "guidance": options.guidance}
        where = find_device(options.device) if waits_for_shards(options) else self.device
        device = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
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
        variant = weights_variant(self._folder / self._network)
        return parts_digest(files_digest(self._folder, self._encoder_pipe.components, variant), self.options)

    @property
    def _base_files(self) -> BaseFiles | None:
        if self._folder is None or self._digest is None:
            return None
        variant = weights_variant(self._folder / self._network)
        return BaseFiles(self._digest, stored_precision(self._folder, self._network, variant))

    def _conditioning(self) -> dict[str, Any]:
        """What an adapter records: the family's own options, and the others that are not at their defaults."""
        options, defaults = self.options, PipelineOptions()
        names = [name for name in RECORDED if getattr(options, name) != getattr(defaults, name)]
        own = [name for name in self.family.conditioning if hasattr(options, name)]
        values = {name: getattr(options, name) for name in dict.fromkeys(("size", *own, *names))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @cached_property
    def _texts(self) -> TextLayout:
        """How the pipeline's encoded texts are laid out."""
        return find_text_layout(self._encoded_texts, self.family.embeddings)

    @cached_property
    def any_condition(self) -> Condition:
        """Two rows under some prompt, for finding out what does not depend on it."""
        return PipelineBackend.encode(self, [LONG, LONG])

    def _encoded_texts(self, prompts: Sequence[str]) -> list[Any]:
        with self._encoders_lent():
            return self._encoded_where_they_are(prompts)

    def _encoders_lent(self) -> AbstractContextManager[None]:
        pipe = self._encoder_pipe
        return _lent([getattr(pipe, name) for name in encoder_names(pipe)], self.device)

    def _encoded_where_they_are(self, prompts: Sequence[str]) -> list[Any]:
        pipe = self._encoder_pipe
        arguments = call_arguments(self.family, pipe, self.options, self.options.schedule or 1, self.options.guidance)
        arguments |= {"height": self.options.sides[0], "width": self.options.sides[1], "prompt": list(prompts)}
        arguments["generator"] = torch.Generator().manual_seed(0)  # noise that is drawn on the way is not used
        # Never inference tensors, whatever mode the caller is in: they are saved for the backward pass of f.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            memory.explained(memory.advice(self.options)),
        ):
            return PipelineCall(pipe, self._network, arguments).encoded()

    def _encode_now(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        # One by one: in a batch, the others would change a prompt's length, or its rounding.
        texts = self._texts
        with self._encoders_lent():
            alone = [texts.rows(self._encoded_where_they_are([prompt]), 1) for prompt in prompts]
        return {key: joined([row[key][0] for row in alone]) for key in alone[0]}

    @contextmanager
    def _first_calls(self) -> Iterator[None]:
        """One line for whatever goes wrong in a library's code when its model is first called."""
        try:
            yield
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of a model that nobody has tried: any
            raise InputError(
                f"model {self.options.model_id!r}: its {type(self.pipeline).__name__} cannot be run on images of "
                f"{_by(self.options.sides)}: {type(error).__name__}: {reason_of(error)}: give the backend.size that it "
                "was made for; if that is it, no hypernetwork can be made of this class"
            ) from error

    def _require_size(self) -> None:
        multiple = self.family.side_multiple(self._encoder_pipe)
        for name, side in zip(("height", "width"), self.options.sides, strict=True):
            if side % multiple:
                asked = name if getattr(self.options, name) else "size"
                raise InputError(f"backend.{asked} {side}: {self.name} takes a multiple of {multiple}")

    def _check(self, noise: Tensor, condition: Condition, steps: int) -> None:
        if tuple(noise.shape[1:]) != self.noise_shape:
            raise InputError(f"noise of shape {tuple(noise.shape)}: {self.name} takes (n, {_show(self.noise_shape)})")
        if len(noise) != len(condition):
            raise InputError(f"{len(noise)} noises and {len(condition)} prompts given: one prompt per noise")
        schedule = self.options.schedule
        if schedule and steps != schedule:
            kind = "timesteps" if self.options.timesteps else "sigmas"
            raise InputError(f"{steps} steps: backend.{kind} is a schedule of {schedule}: ask for {schedule}")
        if not 1 <= steps <= self.max_steps:
            raise InputError(f"{steps} steps: {self.name} takes 1 to {self.max_steps}")


@contextmanager
def _lent(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Have the text encoders on the accelerator only while they are needed."""
    modules = [module for module in modules if module is not None]
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


def _by(sides: Sequence[int]) -> str:
    return " x ".join(str(side) for side in sides)
