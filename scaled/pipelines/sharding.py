"""The frozen network of a backend shared out over processes, for models that no single card holds.

Generator and twin are sharded each on its own, block by block, by torch's FSDP2, and keep the same shards: each process
holds 1 / W of the network, and a block is whole only while it runs. The LoRA weights stay whole in every process, so
that gradients are summed, steps taken and adapters and checkpoints written as without it, and a run goes on with
another number of processes.
"""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hnkit.errors import InputError
from hnkit.scaled.lora.base import remember
from hnkit.scaled.pipelines.loading import find_device, leave_out_cudnn_attention, waits_for_shards
from hnkit.scaled.pipelines.memory import SHARED_OUT, block_lists


def shard(backend: Any) -> None:
    """Share the frozen network of a backend, and that of its hypernetwork, out over the processes of torch.distributed.

    Every process has to run f and the generator as often as every other, since blocks are gathered from all of them: a
    delta that is not finite in one process comes back as NaN in all, so that all give up the same batch. An adapter of
    other layers is loaded before.

    Args:
        backend: a `PipelineBackend`, loaded in every process, with the same model and options.

    Raises:
        InputError: no process group is there, the backend was sharded before, its network is stored in few bits or
            compiled, or it is one of direct fine-tuning.
    """
    base, twin = backend._base, backend._twin
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise InputError("shard needs processes: start them by torchrun and call torch.distributed.init_process_group")
    if is_sharded(base):
        raise InputError(f"the network of backend {backend.name!r} is sharded already")
    backend.options.require_shardable()
    if backend.objective == "direct":
        raise InputError(
            "backend.shard: direct fine-tuning has no frozen generator beside the twin: shard a noise hypernetwork"
        )
    remember(base)  # by its whole weights, which a process that writes an adapter does not have
    device = find_device(backend.options.device)
    leave_out_cudnn_attention(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
    owners = {
        id(parameter): (module, name) for module in base.modules() for name, parameter in module._parameters.items()
    }
    shared = [
        (module, name, *owners[id(parameter)])
        for module in twin.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in owners and parameter is not None
    ]
    for blocks, copies in zip(block_lists(base), block_lists(twin), strict=True):
        for block, copied in zip(blocks, copies, strict=True):
            _shard_both(block, copied, mesh)
    _shard_both(base, twin, mesh)
    for module, name, owner, theirs in shared:  # the same shards for both, before FSDP2 first looks for them
        module._parameters[name] = owner._parameters[theirs]
    backend.hypernetwork.register_forward_hook(_finite_everywhere)


def is_sharded(network: nn.Module) -> bool:
    """Whether the network is shared out over processes."""
    return isinstance(network, FSDPModule)


def share_out(backend: Any) -> bool:
    """Shard a `PipelineBackend` whose options ask for it, and bring what it was loaded without to its device."""
    if not waits_for_shards(backend.options):
        return False
    shard(backend)
    for part in backend.pipeline.components.values():
        if isinstance(part, nn.Module) and not is_sharded(part):
            part.to(backend.device)
    return True


def _finite_everywhere(_: nn.Module, __: Any, delta: Tensor) -> Tensor:
    """The delta, or NaN in every process where one of them has values that are not finite."""
    broken = (~delta.detach().isfinite().all()).float()
    torch.distributed.all_reduce(broken, op=torch.distributed.ReduceOp.MAX)
    return delta * torch.nan if bool(broken) else delta


def _shard_both(base: nn.Module, twin: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a part of the network and the same part of the twin, which gets weights of its own for that.

    Sharding changes the tensors themselves: those that the two shared would be parts of one and wholes of the other.
    """
    shared = {id(parameter) for parameter in base.parameters()}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in shared:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    trained = {parameter for parameter in twin.parameters() if parameter.requires_grad}
    fully_shard(base, mesh=mesh)
    fully_shard(twin, mesh=mesh, ignored_params=trained)
    for part in (base, twin):
        setattr(part, SHARED_OUT, True)
