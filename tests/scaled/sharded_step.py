"""Run by torchrun, `sharded_step.py NAME MODEL OUT`: one step of a sharded backend, of which the adapter is kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hnkit import InputError, NoiseLoss
from hnkit.backend import backend_factory
from hnkit.maps import ConditionedMap
from hnkit.scaled.lora.twin import lora_state
from hnkit.scaled.pipelines.sharding import shard
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, redness

ROWS = 4


def load(name: str, model: str, **changes: object):
    factory = backend_factory(name)
    savers = dict.fromkeys(("generator_checkpointing", "hypernetwork_checkpointing"), True)
    return factory.load(factory.options(**tiny.options(name, Path(model), **savers | changes)))


def gradients(backend, rows: list[int]) -> list[torch.Tensor]:
    """Of the mean loss over all rows, the share of these."""
    noise, condition = noise_for(backend, ROWS)[rows], backend.encode([tiny.PROMPTS[row] for row in rows])
    f = ConditionedMap(backend.hypernetwork, condition)
    terms = NoiseLoss()(f, noise, lambda x: backend.generate(x, condition), redness)
    (terms.total.sum() / ROWS).backward()
    return [parameter.grad for parameter in lora_state(backend._twin).values()]


def update(backend, found: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(lora_state(backend._twin).values(), found, strict=True):
            parameter.sub_(0.5 * gradient)
            parameter.grad = None


def local(network: torch.nn.Module) -> int:
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    return sum(getattr(parameter, "_local_tensor", parameter).nbytes for parameter in frozen)


def main(name: str, model: str, out: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    backend = load(name, model)
    perturb(backend)
    whole = local(backend._base)
    shard(backend)
    refused = []
    for refusal in (lambda: shard(backend), lambda: shard(load(name, model, quantize="fp8"))):
        try:
            refusal()
        except InputError as error:
            refused.append(str(error))
    found = gradients(backend, list(range(ROWS))[rank * ROWS // count : (rank + 1) * ROWS // count])
    for gradient in found:
        torch.distributed.all_reduce(gradient)
    if rank == 0:
        torch.save([gradient.clone() for gradient in found], f"{out}/gradients.pt")
    update(backend, found)
    if rank == 0:
        backend.save_adapter(f"{out}/adapter")
        sizes = {"whole": whole, "base": local(backend._base), "twin": local(backend._twin)}
        Path(out, "found.json").write_text(json.dumps({"refused": refused, **sizes}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
