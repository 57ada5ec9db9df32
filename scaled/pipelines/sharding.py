"""The frozen network of a backend shared out over processes, for models that no single card holds.

Generator and twin are sharded each on its own, block by block, by torch's FSDP2: each process keeps 1 / W of both, and
a block is whole only while it runs. The LoRA weights stay whole in every process, so that gradients are summed, steps
taken and adapters and checkpoints written as without it, and a run goes on with another number of processes.
"""

from __future__ import annotations

import torch.distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hnkit.errors import InputError
from hnkit.scaled.lora.base import remember
from hnkit.scaled.lora.stored import is_stored
from hnkit.scaled.pipelines.backend import PipelineBackend


def shard(backend: PipelineBackend) -> None:
    """Share the frozen network of a backend, and that of its hypernetwork, out over the processes of torch.distributed.

    Every process has to run f and the generator as often as every other, since blocks are gathered from all of them.
    An adapter of other layers is loaded before.

    Args:
        backend: loaded in every process, with the same model and options.

    Raises:
        InputError: no process group is there, the backend was sharded before, its network is stored in few bits or
            compiled, or it is one of direct fine-tuning.
    """
    base, twin = backend._base, backend._twin
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise InputError("shard needs processes: start them by torchrun and call torch.distributed.init_process_group")
    if is_sharded(base):
        raise InputError(f"the network of backend {backend.name!r} is sharded already")
    if is_stored(base):
        raise InputError(
            f"backend.quantize {backend.options.quantize!r}: weights in few bits cannot be sharded, set it to no"
        )
    if backend.options.compile != "no":
        raise InputError(
            f"backend.compile {backend.options.compile!r}: a sharded network is not compiled, set it to no"
        )
    if backend.objective == "direct":
        raise InputError("direct fine-tuning has no frozen generator beside the twin: shard a noise hypernetwork")
    remember(base)  # by its whole weights, which a process that writes an adapter does not have
    mesh = init_device_mesh(backend.device.type, (torch.distributed.get_world_size(),))
    for blocks, copies in zip(_blocks(base), _blocks(twin), strict=True):
        for block, copied in zip(blocks, copies, strict=True):
            _shard_both(block, copied, mesh)
    _shard_both(base, twin, mesh)


def is_sharded(network: nn.Module) -> bool:
    """Whether the network is shared out over processes."""
    return isinstance(network, FSDPModule)


def _blocks(network: nn.Module) -> list[nn.ModuleList]:
    return [child for child in network.children() if isinstance(child, nn.ModuleList)]


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
