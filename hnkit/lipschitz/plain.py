"""Whether a module computes what its type says: the premise of every rule of `hnkit.lipschitz.rules`.

A rule proves something about the `forward` of a type. Hooks, instances, classes, modes and parametrisations can each
put another computation in its place; all of them are looked for, and refused by name. What remains believed: torch's
own kernels, rules that others register, and the declarations of modules of one's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_state
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from hnkit.errors import InputError

_CALLING = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattribute__", "__getattr__", "__iter__")
_CALL = {name: getattr(nn.Module, name) for name in ("__call__", "_wrapped_call_impl", "_call_impl")}
# Private to torch, which has no other name for their types; each is a function of the stored tensors in eval mode.
_PURE = (parametrizations._SpectralNorm, parametrizations._WeightNorm, parametrizations._Orthogonal)

_METHODS: dict[type, list[tuple[Any, str, Any]]] = {}


def remember(kind: type[nn.Module]) -> None:
    """Note the methods that a call of a module of this type runs, and torch's functions in them."""
    found: list[tuple[Any, str, Any]] = [(kind, name, getattr(kind, name)) for name in _CALLING if hasattr(kind, name)]
    pending, seen = ["forward"], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        method = getattr(kind, name)
        found.append((kind, name, method))
        for used in getattr(getattr(method, "__code__", None), "co_names", ()):
            if inspect.isfunction(getattr(kind, used, None)):
                pending.append(used)
            found += [
                (space, used, getattr(space, used)) for space in (F, torch) if callable(getattr(space, used, None))
            ]
    _METHODS[kind] = found


def require_plain_calls() -> None:
    """Refuse what, at this moment, changes the call of every module.

    Raises:
        InputError: the message names it.
    """
    if module_state._global_forward_hooks or module_state._global_forward_pre_hooks:
        raise InputError("global forward hooks are registered, which may change what any module computes: remove them")
    if any(getattr(nn.Module, name) is not method for name, method in _CALL.items()):
        raise InputError("the call of torch.nn.Module itself was replaced")
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [mode for mode in stack if not isinstance(mode, DeviceContext)]
    if modes or is_in_torch_dispatch_mode():
        raise InputError("a torch function or dispatch mode is active, which may change what torch computes: leave it")
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise InputError("autocast is on, which rounds the weights at each call: certify outside it")
    if parametrize._cache_enabled:
        raise InputError("parametrised weights are cached, and may be out of date: leave parametrize.cached()")


def require_plain_instance(module: nn.Module) -> None:
    """Refuse hooks, and methods that were replaced on the instance.

    Raises:
        InputError: the message names it.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        raise InputError("it has forward hooks, which may change what it computes: remove them")
    replaced = [name for name in vars(module) if inspect.isroutine(inspect.getattr_static(type(module), name, None))]
    if replaced:
        raise InputError(f"its {replaced[0]} was replaced on the instance")
    if module._compiled_call_impl is not None:
        raise InputError("its call was compiled or replaced (_compiled_call_impl): certify it before")


def require_plain_parts(module: nn.Module) -> None:
    """`require_plain_instance` of everything below a module.

    Raises:
        InputError: the message names the part.
    """
    for name, part in module.named_modules():
        if part is not module:
            try:
                require_plain_instance(part)
            except InputError as refusal:
                raise InputError(f"its part '{name}': {refusal}") from None


def require_plain_type(module: nn.Module, kind: type) -> None:
    """Refuse a module whose methods are not those of its type when the rule of that type was registered.

    Raises:
        InputError: the message names the method.
    """
    for space, name, method in _METHODS[kind]:
        if getattr(type(module) if space is kind else space, name, None) is not method:
            raise InputError(f"{getattr(space, '__name__', space)}.{name} was replaced since its rule was registered")
    if parametrize.is_parametrized(module):
        _require_pure(module)


def _require_pure(module: nn.Module) -> None:
    """Refuse parametrisations that may return other weights at the next call."""
    lists = list(module.parametrizations.values())  # type: ignore[operator]
    parts = [part for pieces in lists for part in pieces.modules()]
    if module.training or any(part.training for part in parts):
        raise InputError(
            "it is parametrised and in training mode, so its weights may change between calls: call eval()"
        )
    for part in parts:
        kind = type(part).__name__
        if type(part) not in (parametrize.ParametrizationList, *_PURE):
            raise InputError(
                f"its parametrisation {kind} may return other weights at each call: fix them with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        try:
            require_plain_instance(part)
        except InputError as refusal:
            raise InputError(f"its parametrisation {kind}: {refusal}") from None


def plain_tensor(value: object, name: str) -> Tensor:
    """A tensor of a layer as float64 on the CPU.

    Raises:
        InputError: it is missing, of another kind than torch's own dense real tensors, without data, or not finite.
    """
    if (
        not isinstance(value, Tensor)
        or type(value) not in (Tensor, nn.Parameter)
        or value.layout != torch.strided
        or value.is_quantized
    ):
        raise InputError(f"its {name} is a {type(value).__name__} of another kind than torch's dense tensors")
    if value.is_meta:
        raise InputError(f"its {name} has no values (device meta): load it first")
    if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        raise InputError(f"its {name} is not real and finite")
    return value.detach().double().cpu()


def declaration(owner: object, name: str) -> Callable[[], Any] | None:
    """The method by which an object declares a property of its map, or `None`.

    It is looked up without `__getattr__`: a wrapper that passes unknown attributes on to what it wraps does not speak
    of itself. An inherited method speaks of the map that its class knew.

    Raises:
        InputError: the map was overridden below the class that declares.
    """
    if inspect.getattr_static(owner, name, None) is None:
        return None
    method = getattr(owner, name)
    if not callable(method):
        return None
    if name not in getattr(owner, "__dict__", {}):
        call, base = ("forward", nn.Module) if isinstance(owner, nn.Module) else ("__call__", object)
        lines = type(owner).__mro__
        declared = next(place for place, line in enumerate(lines) if name in vars(line))
        maps = [place for place, line in enumerate(lines) if call in vars(line) and line is not base]
        if maps and maps[0] < declared <= maps[-1]:
            older, newer = lines[declared].__name__, lines[maps[0]].__name__
            raise InputError(f"its {name}() is {older}'s, whose {call} {newer} overrides: declare {name}() there too")
    return method  # type: ignore[no-any-return]
