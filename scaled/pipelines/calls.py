"""A pipeline's own `__call__`, run as it is: to its end, or to the first call of its network.

It runs without its `no_grad`, and with texts that are already encoded. Nothing of a sampler is written here: what the
network is given in its first call (timestep, masks, pooled embeddings, positions, guidance, the scaling of the noise)
is what the library's code gives it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from torch import Tensor

from hnkit.errors import InputError
from hnkit.internal.values import reason_of
from hnkit.scaled.pipelines.families.family import Family

AS_WRITTEN: Mapping[str, Any] = {"use_pe": False, "enable_prompt_rewrite": False}
"""Arguments without which a language model of the pipeline writes every prompt anew, and otherwise each time."""
SHARED: Mapping[str, Any] = {
    "return_dict": False,
    "use_resolution_binning": False,
    "true_cfg_scale": 1.0,
    "pag_scale": 0.0,  # perturbed attention is guidance, too
    "num_frames": 1,
    "frames": 1,
    **AS_WRITTEN,
}
"""Arguments that are passed wherever a pipeline takes them: one image, one pass through the network."""


class StandIn:
    """What a pipeline finds in the place of its network: everything of the network but its call."""

    def __init__(self, network: Any, called: Callable[..., Any]) -> None:
        self._network = network
        self._called = called

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the replacement returns."""
        return self._called(*args, **kwargs)


class _ReachedError(Exception):
    """The pipeline has come to the first call of its network; `result` is what came of it."""

    def __init__(self, result: Any) -> None:
        super().__init__("the first network call")
        self.result = result


def view(pipe: Any, plain_class: type[Any] | None = None, **changes: Any) -> Any:
    """A second pipeline object over the same components, with some attributes changed on it alone."""
    seen: Any = copy.copy(pipe) if plain_class is None else object.__new__(plain_class)
    seen.__dict__.update(pipe.__dict__)
    seen.__dict__.update(changes)
    seen.set_progress_bar_config(disable=True)
    return seen


def without_encoders(pipe: Any) -> Any:
    """A second pipeline object over the same components, without text encoders: they may live elsewhere."""
    return view(pipe, **dict.fromkeys(encoder_names(pipe)))


def encoder_names(pipe: Any) -> tuple[str, ...]:
    """Names of the components that encode text."""
    return tuple(name for name in pipe.components if name.startswith("text_encoder"))


def call_arguments(family: Family, pipe: Any, options: Any, steps: int, guidance: float) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call that say how it samples: steps, schedule, guidance, prompt length.

    Raises:
        InputError: the class takes no `timesteps` or `sigmas`, and some are asked for.
    """
    accepted = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    for name in ("timesteps", "sigmas"):
        if getattr(options, name) and name not in accepted:
            raise InputError(f"backend.{name}: {type(pipe).__name__} takes no {name}: leave them out")
    asked: dict[str, Any] = {
        **SHARED,
        "num_inference_steps": steps,
        family.guidance: guidance,
        **{name: list(getattr(options, name)) for name in ("timesteps", "sigmas") if getattr(options, name)},
        **({"max_sequence_length": options.max_sequence_length} if options.max_sequence_length else {}),
        **family.arguments,
        **family.varying(options, steps),
    }
    return accepted_by(pipe, asked)


def accepted_by(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the pipeline's call takes."""
    accepted = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    if "kwargs" in accepted and "args" in accepted:  # of a steered pipeline, whose class is behind it
        accepted = inspect.signature(inspect.unwrap(type(pipe).__mro__[2].__call__)).parameters
    return {name: value for name, value in arguments.items() if name in accepted}


def plain_arguments(family: Family, pipe: Any, options: Any) -> dict[str, Any]:
    """Keyword arguments of a user's plain call that match `options`: those that differ from the call's defaults."""
    parameters = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    arguments = call_arguments(family, pipe, options, options.schedule or 1, options.guidance)
    arguments |= {"height": options.sides[0], "width": options.sides[1]}
    kept = ("num_inference_steps", "height", "width", family.guidance)
    return {
        name: value
        for name, value in arguments.items()
        if name != "return_dict" and (name in kept or parameters[name].default != value)
    }


def text_arguments(family: Family, pipe: Any, options: Any) -> dict[str, Any]:
    """Those arguments of a call by which prompts reach f as they did in training."""
    asked = {"max_sequence_length": options.max_sequence_length} if options.max_sequence_length else {}
    varying = family.varying(options, options.schedule or 1)
    asked |= {**AS_WRITTEN, **{name: varying[name] for name in family.text_arguments}}
    return accepted_by(pipe, asked)


def text_to_image_class(family: Family) -> Any:
    """The class of diffusers whose call f was trained in."""
    import diffusers

    return getattr(diffusers, family.pipeline_class)


@dataclass(frozen=True)
class PipelineCall:
    """One call of a pipeline's own `__call__`, without its `no_grad`: differentiable where its parts are.

    Attributes:
        pipe: the pipeline.
        network: the name of the component that is its network.
        arguments: arguments of the call.
        texts: what `encode_prompt` answers, call by call; `None`: what it really does.
    """

    pipe: Any
    network: str
    arguments: Mapping[str, Any]
    texts: Sequence[Any] | None = None

    def run(self, **more: Any) -> Any:
        """What the call returns, with `more` arguments.

        Raises:
            InputError: the pipeline refuses an argument, or encodes more texts than there are answers.
        """
        return self._run(self.pipe, more)

    def first(self, network: Callable[..., Any], **more: Any) -> Any:
        """What `network` returns for the arguments of the pipeline's first network call; the pipeline stops there.

        Raises:
            InputError: as `run`, or the pipeline ends without calling its network.
        """

        def called(*args: Any, **kwargs: Any) -> Any:
            raise _ReachedError(network(*args, **kwargs))

        pipe = view(self.pipe, None, **{self.network: StandIn(getattr(self.pipe, self.network), called)})
        try:
            self._run(pipe, more)
        except _ReachedError as reached:
            return reached.result
        raise InputError(f"{self._who} never calls its {self.network}: no hypernetwork can be made of it")

    def encoded(self) -> list[Any]:
        """What `encode_prompt` returned, call by call, inside this call of the pipeline.

        Raises:
            InputError: the class has no `encode_prompt`, or does not call it before its network.
        """
        if not hasattr(self.pipe, "encode_prompt"):
            raise InputError(f"{self._who} has no encode_prompt: no hypernetwork can be made of it")
        encode, returned = self.pipe.encode_prompt, []

        def noted(*args: Any, **kwargs: Any) -> Any:
            returned.append(encode(*args, **kwargs))
            return returned[-1]

        replace(self, pipe=view(self.pipe, encode_prompt=noted)).first(lambda *_, **__: None)
        if not returned:
            raise InputError(f"{self._who} does not call its encode_prompt: no hypernetwork can be made of it")
        return returned

    @property
    def _who(self) -> str:
        return type(self.pipe).__name__

    def _run(self, pipe: Any, more: Mapping[str, Any]) -> Any:
        sample: Any = inspect.unwrap(type(pipe).__call__)
        if self.texts is not None:
            pipe = view(pipe, encode_prompt=self._replay(self.texts))
        try:
            return sample(pipe, **self.arguments, **more)
        except (ValueError, TypeError, LookupError, NotImplementedError) as error:
            said = ("num_inference_steps", "timesteps", "sigmas", "height", "width")
            given = ", ".join(f"{name} {self.arguments[name]}" for name in said if name in self.arguments)
            cure = ": give the backend.size that the model was made for" if isinstance(error, LookupError) else ""
            own = next((name for name in ("timesteps", "sigmas") if name in self.arguments), None)
            if own and "custom" in str(error):  # the library's line is long, and names no way out
                raise InputError(
                    f"backend.{own} {list(self.arguments[own])}: {type(pipe.scheduler).__name__} takes none from "
                    "outside: name another by backend.scheduler (LCMScheduler, EulerDiscreteScheduler take timesteps)"
                ) from error
            raise InputError(f"{self._who} refused a call with {given}: {reason_of(error)}{cure}") from error

    def _replay(self, texts: Sequence[Any]) -> Callable[..., Any]:
        answers = iter(texts)

        def answer(*_: Any, **__: Any) -> Any:
            try:
                return next(answers)
            except StopIteration:
                raise InputError(
                    f"{self._who} encodes more texts in this call than it did before: set backend.guidance to a value "
                    "without classifier-free guidance (1, or 0)"
                ) from None

        return answer


def drawing(pipe: Any, draw: Callable[..., Tensor], plain_class: type | None = None) -> Callable[..., Any]:
    """The pipeline's `prepare_latents` with `draw` in the place of the library's `randn_tensor`.

    It is that of `plain_class`, where one is given. The function is rebuilt over a copy of its module's names, so that
    nothing outside this object changes.
    """
    function: Any = inspect.unwrap((plain_class or type(pipe)).prepare_latents)  # type: ignore[attr-defined]
    names = {**function.__globals__, "randn_tensor": draw}
    rebuilt = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    bound: Callable[..., Any] = rebuilt.__get__(pipe)
    return bound
