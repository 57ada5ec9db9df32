"""A backend that is shared out over two processes takes the step of one process, and its adapter goes on in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hnkit import InputError
from hnkit.scaled.lora.twin import lora_state
from hnkit.scaled.pipelines.sharding import shard
from tests.scaled import sharded_step
from tests.scaled.conftest import perturb

SCRIPT = Path(sharded_step.__file__)


def distance(one, other):
    one, other = (torch.cat([tensor.detach().flatten() for tensor in tensors]) for tensors in (one, other))
    return float((one - other).norm() / other.norm())


RECOMPUTED = ("hypernetwork_checkpointing", "generator_checkpointing")


@pytest.mark.slow  # its share of the plain suite is in test_sharded_training.py
@pytest.mark.parametrize(
    ("name", "rows", "on"),
    [
        *((name, 4, ()) for name in ("sana", "flux")),
        *((name, rows, RECOMPUTED) for name in ("sana", "flux") for rows in (2, 4)),
        ("sd-turbo", 2, RECOMPUTED),
        ("flux", 2, (*RECOMPUTED, "lora_autocast")),
    ],
)
def test_two_processes_take_the_step_of_one_and_one_goes_on(name, rows, on, checkpoint, tmp_path):
    """Blocks are recomputed with one row a process, too, and the step is that of a network that keeps what it needs."""
    model = str(checkpoint(name))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), name, model]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path), str(rows), *on],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["base"] <= found["whole"] / 2 + 4096  # first dimensions that 2 does not divide are padded
    assert found["twin"] <= found["whole"] / 2 + 4096
    assert found["both"] <= found["whole"] / 2 + 8192  # generator and hypernetwork keep the same shards
    assert found["broken"] == [True, True]
    assert found["alike"]
    if name != "sd-turbo":  # whose attention blocks the library never recomputes
        assert found["runs"] == dict.fromkeys(("f", "generator"), 2 if on else 1)
    assert "is sharded already" in found["refused"][0]
    assert "backend.quantize 'fp8': weights in few bits cannot be sharded" in found["refused"][1]

    kept = dict.fromkeys(set(on) - set(RECOMPUTED), True)
    one = sharded_step.load(name, model, **kept)
    perturb(one)
    expected = [gradient.clone() for gradient in sharded_step.gradients(one, list(range(rows)), rows)]
    assert distance(torch.load(tmp_path / "gradients.pt", weights_only=True), expected) < 1e-5
    sharded_step.update(one, expected)
    resumed = sharded_step.load(name, model, **kept)
    resumed.load_adapter(tmp_path / "adapter")
    for backend in (one, resumed):
        sharded_step.update(backend, sharded_step.gradients(backend, list(range(rows)), rows))
    assert distance(lora_state(resumed._twin).values(), lora_state(one._twin).values()) < 1e-5


def test_without_processes_there_is_nothing_to_share_out(make_backend):
    with pytest.raises(InputError, match="shard needs processes: start them by torchrun"):
        shard(make_backend("sana"))
