"""Run by torchrun, `sharded_step.py NAME MODEL OUT [ROWS [OPTION ...]]`: a step of a sharded backend, its adapter kept.

Options are switches of the backend that are on. What the processes have to agree on is asked of them as well.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnkit import InputError, NoiseLoss
from hnkit.backend import backend_factory
from hnkit.maps import ConditionedMap
from hnkit.scaled.lora.twin import lora_state
from hnkit.scaled.pipelines.memory import block_lists
from hnkit.scaled.pipelines.sharding import shard
from hnkit.training.processes import Processes, SameEverywhere
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, redness

ROWS = 4
LOSS = NoiseLoss()
"""One for all steps: it tries a network when it first meets it, and never again."""


def load(name: str, model: str, **changes: object):
    factory = backend_factory(name)
    savers = dict.fromkeys(("generator_checkpointing", "hypernetwork_checkpointing"), False)
    return factory.load(factory.options(**tiny.options(name, Path(model), **savers | changes)))


def gradients(backend, rows: list[int], of: int = ROWS) -> list[torch.Tensor]:
    """Of the mean loss over so many rows, the share of these."""
    noise, condition = noise_for(backend, of)[rows], backend.encode([tiny.PROMPTS[row] for row in rows])
    f = ConditionedMap(backend.hypernetwork, condition)
    terms = LOSS(f, noise, lambda x: backend.generate(x, condition), redness)
    (terms.total.sum() / of).backward()
    return [parameter.grad for parameter in lora_state(backend._twin).values()]


def update(backend, found: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(lora_state(backend._twin).values(), found, strict=True):
            parameter.sub_(0.5 * gradient)
            parameter.grad = None


def broken_in_the_other(backend) -> list[bool]:
    """Whether each process sees a delta that is not finite where only the last one's is."""
    noise, condition = noise_for(backend, 1), backend.encode(tiny.PROMPTS[:1])
    if torch.distributed.get_rank() == 1:
        noise[0, 0] = torch.inf
    found = Processes().gather(bool(backend.hypernetwork(noise, condition).isfinite().all()))
    return [not finite for finite in found]


def of_the_main_process(backend) -> bool:
    """Whether value, gradient and derivative of the map that is measured are everywhere the main process's."""
    processes = Processes()
    x = noise_for(backend, 1, seed=processes.index).requires_grad_()  # another in each
    f = ConditionedMap(SameEverywhere(backend.hypernetwork, processes), backend.encode(tiny.PROMPTS[:1]))
    delta = f(x)
    direction = noise_for(backend, 1, seed=10 + processes.index)
    (gradient,) = torch.autograd.grad(delta, x, direction)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x.detach(), direction))).tangent
    seen = [value.detach() for value in (delta, gradient, tangent)]
    everyone = processes.gather(seen)
    alike = all(torch.equal(one, other) for one, other in zip(*everyone, strict=True))
    return alike and all(bool(value.any()) for value in seen)


def local(network: torch.nn.Module) -> int:
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    return sum(getattr(parameter, "_local_tensor", parameter).nbytes for parameter in frozen)


def first_layer(network: torch.nn.Module) -> torch.nn.Module:
    """The first linear layer of the first block."""
    return next(module for module in block_lists(network)[0][0].modules() if isinstance(module, torch.nn.Linear))


def both(backend) -> int:
    """Bytes of the frozen weights that base and twin hold here in all."""
    frozen = [p for network in (backend._base, backend._twin) for p in network.parameters() if not p.requires_grad]
    held = [getattr(parameter, "_local_tensor", parameter).untyped_storage() for parameter in frozen]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def runs_of_a_step(backend, mine: list[int], rows: int) -> dict[str, int]:
    """How often f and the generator run in a step of networks that the loss knows."""
    for parameter in lora_state(backend._twin).values():
        parameter.grad = None
    seen = Counter[str]()
    for what, network in (("f", backend._twin), ("generator", backend._base)):
        first_layer(network).register_forward_hook(lambda *_, what=what: seen.update([what]))
    gradients(backend, mine, rows)
    return dict(seen)


def main(name: str, model: str, out: str, of: str = str(ROWS), *on: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows, backend = int(of), load(name, model, **dict.fromkeys(on, True))
    perturb(backend)
    whole = local(backend._base)
    shard(backend)
    refused = []
    for refusal in (lambda: shard(backend), lambda: shard(load(name, model, quantize="fp8"))):
        try:
            refusal()
        except InputError as error:
            refused.append(str(error))
    mine = list(range(rows))[rank * rows // count : (rank + 1) * rows // count]
    found = [gradient.clone() for gradient in gradients(backend, mine, rows)]
    runs = runs_of_a_step(backend, mine, rows)
    for gradient in found:
        torch.distributed.all_reduce(gradient)
    if rank == 0:
        torch.save([gradient.clone() for gradient in found], f"{out}/gradients.pt")
    update(backend, found)
    if rank == 0:
        backend.save_adapter(f"{out}/adapter")
    sizes = {"whole": whole, "base": local(backend._base), "twin": local(backend._twin), "both": both(backend)}
    agreed = {"broken": broken_in_the_other(backend), "alike": of_the_main_process(backend)}
    if rank == 0:
        Path(out, "found.json").write_text(json.dumps({"refused": refused, "runs": runs, **sizes, **agreed}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
