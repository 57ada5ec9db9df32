"""Several processes of one run: started alike or refused, one run on a machine without GPU, a stopped one noticed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hnkit import InputError
from hnkit.internal.stops import advised
from hnkit.training import processes

ROOT = Path(__file__).parents[3]

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
import hnkit.training.processes as processes
import hnkit.training.session as session
from datetime import timedelta
from hnkit import InputError
from hnkit.config import RunConfig, TrainConfig
import hnkit.training.run as run
from hnkit.training.run import train
from tests.hnkit.fake_backend import FakeFactory, Options

torch.set_num_threads(1)
processes._SILENCE, processes._BEAT = timedelta(seconds=4), 0.2
factory = FakeFactory()
session.backend_factory = lambda name: factory
work = Path(sys.argv[1])

def settings(**changes):
    return TrainConfig(**{"steps": 6, "batch": 4, "measure_samples": 8, "validate_samples": 4, "lr": 0.05} | changes)

def attempt(out, config, options=Options()):
    try:
        result = train(RunConfig("fake", options, config), out=out)
        return f"finished {result.step}" if result.finished else f"stopped {result.step}"
    except InputError as error:
        return str(error)

def different(rank):
    return attempt(work / "different", settings(lr=0.05 + rank))

def automatic(rank):
    return attempt(work / f"automatic-{rank}", settings(), Options(device="auto"))

def stopped(rank):
    def fault(call, scores):
        if call == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return scores
    factory.prepare_backend = lambda backend: setattr(backend.default_reward, "fault", fault)
    return attempt(work / "stopped", settings(accumulate=2))

def raising(rank):
    def fault(call, scores):
        if call == 4 and rank == 1:
            raise ValueError("of process 1")
        return scores
    factory.prepare_backend = lambda backend: setattr(backend.default_reward, "fault", fault)
    return attempt(work / "raising", settings())

def killed(rank):  # and the other is asked to stop, as by torchrun, when it has just seen that
    def fault(call, scores):
        if call == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores
    def lost(error):
        os.kill(os.getpid(), signal.SIGTERM)
        return known(error)
    known, run.connection_lost = run.connection_lost, lost
    processes._BEAT = 60.0  # so that it is not the heartbeat that sees it
    factory.prepare_backend = lambda backend: setattr(backend.default_reward, "fault", fault)
    return attempt(work / "killed", settings())

def two(name, port):
    children, codes = {}, {}
    for rank in (0, 1):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
            said = globals()[name](rank)
            (work / f"{name}-{rank}.json").write_text(json.dumps(said))
            os._exit(0)
        children[child] = rank
    while len(codes) < 2:
        child, status = os.wait()
        codes[children[child]] = os.waitstatus_to_exitcode(status)
        if name == "stopped" and len(codes) == 1:
            for other in set(children) - {child}:
                os.kill(other, signal.SIGKILL)
    (work / f"{name}-codes.json").write_text(json.dumps(codes))

pairs = list(zip(sys.argv[2::2], sys.argv[3::2]))
for chain in (pairs[:1], pairs[1:]):  # the first one waits, and the others meanwhile go on
    if not os.fork():
        for name, port in chain:
            two(name, port)
        os._exit(0)
assert [os.wait()[1], os.wait()[1]] == [0, 0]
"""


SCENARIOS = ("stopped", "different", "automatic", "raising", "killed")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """All scenarios on two ranks each, forked from one process that has imported everything."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    for name in SCENARIOS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            command += [name, str(free.getsockname()[1])]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stderr").write_text(done.stderr)
    return folder


def ended(work: Path, name: str) -> tuple[list[str | None], list[int]]:
    """What each rank said, if it came to that, and how each ended."""
    files = [work / f"{name}-{rank}.json" for rank in (0, 1)]
    codes = json.loads((work / f"{name}-codes.json").read_text())
    return [json.loads(file.read_text()) if file.exists() else None for file in files], [codes["0"], codes["1"]]


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").iterdir()]


def test_ranks_with_different_settings_are_refused_by_all(work):
    said, _ = ended(work, "different")
    for line in said:
        assert line is not None
        assert "process 1 has train.lr = 1.05 where process 0 has 0.05" in line
    assert not (work / "different").exists()


def test_device_auto_without_a_gpu_is_one_run_not_two(work):
    assert ended(work, "automatic")[0] == ["finished 6", "finished 6"]
    assert (work / "automatic-0" / "report.json").exists()
    assert not (work / "automatic-1").exists()


def test_a_rank_whose_reward_raises_ends_both_and_loses_no_step(work):
    said, codes = ended(work, "raising")
    assert codes[1] == 0
    assert said[1] is not None
    assert "reward 'brightness' raised ValueError: of process 1" in said[1]
    assert checkpoints(work / "raising") == ["step-00000003"]


def test_a_stopped_rank_is_noticed_and_the_main_process_leaves_a_checkpoint(work):
    """With the silence that is borne cut from 45 to 4 seconds. Rank 1 stops in its second micro-batch of step 2."""
    said, codes = ended(work, "stopped")
    assert codes == [2, -signal.SIGKILL]
    assert said == [None, None]
    assert "another process has not been heard of for 4 s; " in (work / "stderr").read_text()
    assert f"go on with hnkit train --resume {work / 'stopped'}" in (work / "stderr").read_text()
    assert checkpoints(work / "stopped") == ["step-00000001"]


def test_a_killed_rank_is_one_line_of_the_other_though_it_is_asked_to_stop_as_well(work):
    said, codes = ended(work, "killed")
    assert codes == [0, -signal.SIGKILL]
    assert said[0] is not None
    assert said[0].startswith("another process has gone; go on with hnkit train --resume ")
    assert checkpoints(work / "killed") == ["step-00000003"]


@pytest.mark.parametrize("collective", ["gather", "on_main"])
def test_an_evaluation_whose_other_process_is_gone_is_one_line_with_the_way_on(collective, monkeypatch):
    def failing(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(
        processes, "PartialState", lambda **_: SimpleNamespace(num_processes=2, process_index=1, device="cpu")
    )
    monkeypatch.setattr(processes.torch.distributed, "all_gather_object", failing)
    monkeypatch.setattr(processes.torch.distributed, "barrier", failing)
    monkeypatch.setattr(processes.Processes, "require_same", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    workers = processes.evaluation_workers("toy", (), {})
    said = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:50883. This is typically ..."
    with advised("go on with hnkit generate --resume x"), pytest.raises(InputError) as ended:
        getattr(workers, collective)(lambda: None)
    assert str(ended.value) == "another process has gone; go on with hnkit generate --resume x"
    said = "an error of another kind"
    with pytest.raises(RuntimeError, match="of another kind"):
        getattr(workers, collective)(lambda: None)


def test_processes_that_cannot_find_each_other_are_refused(monkeypatch):
    """As where accelerate starts no process group: N independent runs would follow."""
    monkeypatch.setattr(processes, "PartialState", lambda **_: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes were started"):
        processes.Processes("auto")


@pytest.mark.parametrize(
    "flags", [["backend.shard=true"], ["backend.shard = true"], ["backend.shard=false", "backend.shard= true"]]
)
def test_evaluation_shares_no_network_out_however_the_flag_is_written(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"^backend\.shard: only hnkit train shares a network out"):
        processes.evaluation_workers(None, flags, {})
