"""Memory and speed options of the pipelines: checkpointing, slicing, tiling, checked compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hnkit.errors import InputError
from hnkit.internal.values import reason_of
from hnkit.scaled.lora.stored import store

if TYPE_CHECKING:
    from hnkit.scaled.pipelines.options import PipelineOptions

SAVERS = {
    "vae_checkpointing": "decoder",
    "generator_checkpointing": "generator",
    "lora_autocast": "f",
    "hypernetwork_checkpointing": "f",
}
"""Options that save memory in training and change no result beyond rounding, with the part of a step that each changes.
"""
SHARED_OUT = "shared_out"
"""Attribute of a module whose weights are shared out over processes, and whole only while it runs."""
_SAVERS = (*SAVERS, "vae_slicing", "vae_tiling")
_PARITY = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


_VARIANTS = 64
"""Times that torch may compile one kind of block in a process; at its own limit of 8 it goes on uncompiled.

It counts all networks together: f and the generator, with and without gradients, for one row and for more are eight.
"""


def advice(options: PipelineOptions) -> str:
    """The options that would still reduce memory, as the end of a sentence."""
    unused = [f"backend.{name} = true" for name in _SAVERS if not getattr(options, name)]
    if options.dtype == "float32":
        unused.append('backend.dtype = "bfloat16"')
    return ", ".join([*unused, "a smaller batch, backend.size or backend.rank"])


@contextmanager
def explained(hint: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line that says what reduces it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"out of memory on the device: to reduce it, use {hint}") from error
    except UnboundLocalError as error:
        # diffusers' SANA pipelines turn a decoder's out-of-memory error into a warning, then miss the image.
        if "'image'" not in str(error):
            raise
        raise InputError(f"out of memory in the decoder: to reduce it, use {hint}") from error


def drop_word_cache(tokenizer: Any) -> None:
    """Let a fast tokenizer keep no cache of what it has split; slow ones have none.

    A tokenizer that does not split on spaces, as Gemma's, stores whole prompts, and tokenizers 0.23 does not free them
    with it. Prompts are encoded once here, so that cache is never read.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if resize := getattr(model, "_resize_cache", None):
        resize(0)


def apply_storage(network: nn.Module, options: PipelineOptions) -> None:
    """Store the frozen network's weights as the options say."""
    if options.quantize != "no":
        store(network, options.quantize)


def set_checkpointing(network: Any, enable: bool) -> None:
    """Whether a diffusers network's blocks are recomputed in the backward pass (without reentrant autograd).

    It is switched off too: the twin of a network that recomputes is a copy of it, and would recompute with it.
    """
    if enable:
        network.enable_gradient_checkpointing(_recomputed)
    elif network.is_gradient_checkpointing:
        network.disable_gradient_checkpointing()


def set_decoder_checkpointing(vae: Any, enable: bool) -> None:
    """Whether the blocks of a decoder are recomputed in the backward pass."""
    if vae._supports_gradient_checkpointing:
        set_checkpointing(vae, enable)
        return
    for block in vae.decoder.up_blocks:
        if enable:
            block.forward = _checkpointed(block.forward)
        else:
            vars(block).pop("forward", None)


def apply_decoder_options(vae: Any, options: PipelineOptions) -> None:
    """Switch on the decoder's checkpointing, row-wise decoding and tiling as the options say.

    The library's own slicing decodes row by row but keeps every row's activations for the backward pass.
    """
    if options.vae_checkpointing:
        set_decoder_checkpointing(vae, True)
    if options.vae_slicing:
        vae.decode = _row_by_row(vae.decode)
    if options.vae_tiling:
        vae.enable_tiling()


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network repeats: of the classes that diffusers names, else the entries of its own lists."""
    names = getattr(network, "_repeated_blocks", None) or ()
    named = [module for module in network.modules() if type(module).__name__ in names]
    return named or [block for blocks in block_lists(network) for block in blocks]


def block_lists(network: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks that a network runs one after the other."""
    return [child for child in network.children() if isinstance(child, nn.ModuleList)]


def compile_checked(network: nn.Module, backend: str, what: str, measure: Callable[[], list[Tensor]]) -> None:
    """Compile the repeated blocks of a network in place, after comparing values and gradients with eager mode.

    Compiled code has been seen to be wrong without any error, so it is used only once it has agreed. Blocks of one
    class share their compiled code, which is made once and not once a block.

    Args:
        network: f's or the generator's.
        backend: of torch.compile.
        what: is compiled, for messages.
        measure: values and gradients to compare, by the network.

    Raises:
        InputError: the backend is unknown or fails, its results differ, or the network repeats no blocks.
    """
    choices = torch.compiler.list_backends(exclude_tags=())
    if backend not in choices:
        raise InputError(f"backend.compile {backend!r}: choose no or one of {', '.join(choices)}")
    blocks = repeated_blocks(network)
    if not blocks:
        raise InputError(f"backend.compile {backend!r}: {type(network).__name__} repeats no blocks, set it to no")
    eager = measure()
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    try:
        for block in blocks:
            block.compile(backend=backend)
        with dynamo.patch(fail_on_recompile_limit_hit=True):  # else it runs uncompiled without a word
            compiled = measure()
    except Exception as error:  # whatever goes wrong in a compiler, its user can switch it off
        raise InputError(f"backend.compile {backend!r} failed on {what}: {reason_of(error)}; set it to no") from error
    worst = max(_distance(a, b) for a, b in zip(eager, compiled, strict=True))
    if not worst <= _PARITY[next(p.dtype for p in network.parameters() if not p.requires_grad)]:
        raise InputError(
            f"backend.compile {backend!r} disagrees with eager mode on {what} by a relative {worst:.1g}: set it to no"
        )


def values_and_gradients(function: Callable[[Tensor], Tensor], noise: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """A function's value at a random point like `noise`, and gradients in it and in the parameters."""
    x = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)).to(noise.device).requires_grad_()
    output = function(x)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [x, *parameters])]


@contextmanager
def moved_at_random(parameters: list[Tensor]) -> Iterator[None]:
    """Inside, the parameters are away from f = 0, where every wrong answer would agree."""
    start = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)


def _distance(reference: Tensor, other: Tensor) -> float:
    scale = reference.double().norm()
    return float((reference.double() - other.double()).norm() / scale) if scale > 0 else float(other.norm())


def _recomputed(module: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The module's result, whose activations are computed again in the backward pass, from the same arguments.

    Lists among them are caches that the module changes as it runs (the decoders of Wan and Qwen-Image keep their last
    features there): the second run is given them as the first found them.

    A module that is shared out over processes is recomputed inside of what gathers its weights and gives them back,
    which happens once a pass and not once more with the recomputation.
    """
    if getattr(module, SHARED_OUT, False):
        return _recomputed_inside(module, *arguments, **named)
    found = [(list(a) if isinstance(a, list) else a) for a in arguments]
    found_named = {name: list(a) if isinstance(a, list) else a for name, a in named.items()}
    ran = False

    def run() -> Any:
        nonlocal ran
        if not ran:
            ran = True
            return module(*arguments, **named)
        again = [(list(a) if isinstance(a, list) else a) for a in found]
        return module(*again, **{name: list(a) if isinstance(a, list) else a for name, a in found_named.items()})

    return checkpoint(run, use_reentrant=False, context_fn=_same_attention)


def _recomputed_inside(module: Any, *arguments: Any, **named: Any) -> Any:
    inner = module.forward
    module.forward = partial(_recomputed, inner)
    try:
        return module(*arguments, **named)
    finally:
        module.forward = inner


def _row_by_row(decode: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder's `decode`, one row at a time, each of them recomputed in the backward pass."""

    @wraps(decode)
    def run(latents: Tensor, *arguments: Any, **named: Any) -> Any:
        parts = [
            _recomputed(decode, row, *arguments, **named)
            if torch.is_grad_enabled()
            else decode(row, *arguments, **named)
            for row in latents.split(1)  # type: ignore[no-untyped-call]
        ]
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(entries) for entries in zip(*parts, strict=True))
        return type(parts[0])(sample=torch.cat([part.sample for part in parts]))

    return run


def _same_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of forward pass and recomputation: the second restores the first's choice of attention kernels.

    Losses that need derivatives of f record it with the mathematical attention; the backward pass may run outside.
    """
    flags: Any = torch.backends.cuda  # they hold for the CPU's kernels as well
    enabled = {
        SDPBackend.FLASH_ATTENTION: flags.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: flags.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: flags.cudnn_sdp_enabled(),
        SDPBackend.MATH: flags.math_sdp_enabled(),
    }
    return nullcontext(), _Attention([kernel for kernel, on in enabled.items() if on])


class _Attention(AbstractContextManager[None]):
    """`sdpa_kernel` that can be entered again: a second derivative recomputes once more."""

    def __init__(self, kernels: list[SDPBackend]) -> None:
        self._kernels = kernels
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(sdpa_kernel(self._kernels))
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*arguments: Any, **named: Any) -> Any:
        return (_recomputed if torch.is_grad_enabled() else lambda f, *a, **k: f(*a, **k))(forward, *arguments, **named)

    return run
