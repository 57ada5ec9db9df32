"""Every way out that Python can see leaves a checkpoint of the last whole step, and the run goes on from it."""

from __future__ import annotations

import errno
import io
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import hnkit.training.recorder
import hnkit.training.session
import hnkit.training.watch
from hnkit import InputError
from hnkit.internal.folders import open_to_append
from hnkit.training.checkpoint import newest_checkpoint
from hnkit.training.run import train
from hnkit.training.signals import StopSignals
from tests.hnkit.training.training_runs import fake_config, records, resume, run, same_outcome, small


def saved_step(folder: Path) -> int:
    found = newest_checkpoint(folder, pytest.fail)
    assert found is not None
    return found.step


def with_fault(fake, fault) -> None:
    fake.prepare_backend = lambda backend: setattr(backend.default_reward, "fault", fault)


def raise_at(call: int, error: BaseException):
    def fault(number: int, scores: torch.Tensor) -> torch.Tensor:
        if number == call:
            raise error
        return scores

    return fault


class Odd(BaseException):
    """What a library may raise that is no `Exception`."""


@pytest.mark.parametrize("error", [ConnectionError("service gone"), SystemExit(0), KeyboardInterrupt(), Odd("gone")])
def test_a_reward_that_raises_in_training_loses_no_step(tmp_path, fake, error):
    run(fake_config(), tmp_path / "whole")
    with_fault(fake, raise_at(4, error))
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3; go on with hnkit train --resume"):
            run(fake_config(), tmp_path / "run")
    else:
        with pytest.raises(
            InputError, match=r"reward 'brightness' raised .* after step 3; go on with hnkit train --res"
        ):
            run(fake_config(), tmp_path / "run")
    assert saved_step(tmp_path / "run") == 3
    with_fault(fake, lambda _, scores: scores)
    assert resume(fake_config(), tmp_path / "run").finished
    assert same_outcome(tmp_path / "whole", tmp_path / "run", "step-00000006")


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
def test_a_disk_that_takes_no_more_lines_ends_the_run_with_the_command_that_goes_on(name, tmp_path, fake, monkeypatch):
    class Full(io.FileIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path):
        return io.BufferedRandom(Full(path, "a+")) if path.name == name else open_to_append(path)

    run(fake_config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        for module in ("checkpoint", "recorder"):
            patch.setattr(f"hnkit.training.{module}.open_to_append", opened)
        with pytest.raises(InputError, match=r"No space left on device; .* go on with hnkit train --resume"):
            run(fake_config(), tmp_path / "run")
    assert resume(fake_config(), tmp_path / "run").finished
    assert same_outcome(tmp_path / "whole", tmp_path / "run", "step-00000006")


def test_a_reward_that_raises_in_the_last_validation_loses_nothing(tmp_path, fake):
    config = fake_config(validate_every=3)
    run(config, tmp_path / "whole")
    with_fault(fake, raise_at(9, ValueError("no")))
    with pytest.raises(InputError, match="after step 6; go on"):
        run(config, tmp_path / "run")
    assert saved_step(tmp_path / "run") == 6
    with_fault(fake, lambda _, scores: scores)
    assert resume(config, tmp_path / "run").finished
    assert same_outcome(tmp_path / "whole", tmp_path / "run", "step-00000006")


@pytest.mark.parametrize("name", ["measure", "validate"])
def test_a_run_that_ends_between_a_step_and_its_measurement_makes_it_later(tmp_path, monkeypatch, name):
    config = small("validate_every=5", "checkpoint_every=1")
    run(config, tmp_path / "whole")
    plain = getattr(hnkit.training.recorder.Evaluator, name)

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *arguments)

    monkeypatch.setattr(hnkit.training.recorder.Evaluator, name, interrupted)
    result = run(config, tmp_path / "run")
    assert (result.step, result.exit_code) == (5, 130)
    assert not [record for record in records(tmp_path / "run") if "loss" not in record]
    monkeypatch.undo()
    assert resume(config, tmp_path / "run").finished
    assert same_outcome(tmp_path / "whole", tmp_path / "run", "step-00000020")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGTERM", "SIGINT"])
def test_every_signal_of_schedulers_and_terminals_leaves_a_checkpoint(tmp_path, fake, name):
    signum = getattr(signal, name)
    previous = signal.getsignal(signum)

    def fault(call: int, scores: torch.Tensor) -> torch.Tensor:
        if call == 3:
            os.kill(os.getpid(), signum)
        return scores

    with_fault(fake, fault)
    result = run(fake_config(), tmp_path / "run")
    assert (result.step, result.finished, result.exit_code) == (3, False, 128 + signum)
    assert saved_step(tmp_path / "run") == 3
    assert signal.getsignal(signum) is previous


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path, fake):
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with_fault(fake, lambda _, scores: (os.kill(os.getpid(), signal.SIGHUP), scores)[1])
        assert run(fake_config(steps=2), tmp_path / "run").finished
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_the_model_loads_ends_at_once(tmp_path, fake, signum, raised):
    def load(_):
        os.kill(os.getpid(), signum)
        time.sleep(60)

    fake.prepare_backend = load
    begun = time.monotonic()
    with pytest.raises(raised) as caught:
        run(fake_config(), tmp_path / "run")
    assert time.monotonic() - begun < 20
    assert not (tmp_path / "run").exists()
    if raised is SystemExit:
        assert caught.value.code == 143


def test_a_second_signal_gives_up_the_step(tmp_path, fake):
    def hangs(call: int, scores: torch.Tensor) -> torch.Tensor:
        while call == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return scores

    with_fault(fake, hangs)
    result = run(fake_config(), tmp_path / "run")
    assert (result.step, result.exit_code) == (2, 130)
    assert saved_step(tmp_path / "run") == 2


def test_a_hung_reward_is_named_and_given_up_after_sigterm(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setattr(hnkit.training.watch, "PATIENCE", 0.3)
    monkeypatch.setattr(hnkit.training.watch, "GRACE", 0.5)

    def hangs(call: int, scores: torch.Tensor) -> torch.Tensor:
        if call == 3:
            threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            time.sleep(600)
        return scores

    with_fault(fake, hangs)
    begun = time.monotonic()
    result = run(fake_config(), tmp_path / "run")
    assert time.monotonic() - begun < 60
    assert (result.step, result.exit_code) == (2, 143)
    assert saved_step(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "step 3 has taken" in said
    assert "in the reward 'brightness', in hangs (" in said
    assert "SIGTERM received" in said


STUCK = """
import ctypes, os, signal, sys, threading, torch
import hnkit.training.watch as watch
watch.GRACE = watch.LAST_GRACE = 0.5
from pathlib import Path
from hnkit.config import RunConfig, TrainConfig
import hnkit.config, hnkit.training.session
from hnkit.training.run import train
from tests.hnkit.fake_backend import FakeFactory
factory = FakeFactory()
hnkit.training.session.backend_factory = lambda name: factory
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
def stuck(call, scores):
    if call == 3:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        lock(mutex), lock(mutex)  # the second never returns, and no signal handler of the interpreter can run
    return scores
factory.prepare_backend = lambda backend: setattr(backend.default_reward, "fault", stuck)
settings = TrainConfig(steps=6, batch=4, measure_samples=8, validate_samples=4, lr=0.05)
train(RunConfig("fake", factory.options(), settings), out=Path(sys.argv[1]))
"""


def test_a_process_stuck_in_a_foreign_function_still_leaves_its_checkpoint(tmp_path, fake):
    run(fake_config(), tmp_path / "whole")
    command = [sys.executable, "-c", STUCK, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert done.returncode == 143, done.stderr
    assert "in the reward 'brightness', in stuck (" in done.stderr
    assert saved_step(tmp_path / "run") == 2
    assert resume(fake_config(), tmp_path / "run").finished
    assert same_outcome(tmp_path / "whole", tmp_path / "run", "step-00000006")


def test_no_signal_interrupts_an_update_or_a_write():
    with StopSignals() as stop:
        with stop.deferred(), stop.masked():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.received, stop.count) == (signal.SIGTERM, 3)


def test_an_optimizer_step_that_raises_is_not_saved_half_done(tmp_path, fake, monkeypatch):
    class Broken(torch.optim.SGD):
        calls = 0

        def step(self):
            super().step()
            Broken.calls += 1
            if Broken.calls == 3:
                raise RuntimeError("half of the parameters are moved")

    monkeypatch.setattr(hnkit.training.session, "build_optimizer", lambda _, parameters: Broken(parameters, lr=0.1))
    with pytest.raises(RuntimeError, match="half of the parameters"):
        run(fake_config(checkpoint_every=2), tmp_path / "run")
    assert saved_step(tmp_path / "run") == 2


class Gone(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes > 3:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)

    flush = write_nothing = lambda self: None


@pytest.mark.parametrize("terminal", [False, True])
def test_output_that_nobody_reads_any_more_is_dropped(tmp_path, fake, terminal):
    stream = Gone()
    console = Console(file=stream, force_terminal=terminal, width=120)
    assert train(fake_config(), out=tmp_path / "run", console=console).finished
    assert stream.writes > 3
    assert console.file is stream


def test_the_callers_generators_are_given_back(tmp_path, fake):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    run(fake_config(), tmp_path / "run")
    assert (random.random(), np.random.rand(), torch.rand(())) == expected  # noqa: NPY002


# --- rewards that train nothing --------------------------------------------------------------------------------


@torch.no_grad()
def without_gradient(images, prompts):
    return images.mean((1, 2, 3))


def constant(images, prompts):
    return torch.ones(len(images))


def integers(images, prompts):
    return (images * 255).to(torch.uint8).float().mean((1, 2, 3))


def through_numpy(images, prompts):
    return torch.from_numpy(images.detach().numpy().mean((1, 2, 3)))


def flat(images, prompts):
    return (images * 255).round().mean((1, 2, 3))


def plain(images, prompts):
    return images.mean((1, 2, 3))


def raises(images, prompts):
    raise FileNotFoundError("weights")


def of_a_wrong_shape(images, prompts):
    return images


def not_finite(images, prompts):
    return images.mean((1, 2, 3)) * math.nan


HERE = __name__


@pytest.mark.parametrize("beside", [{}, {f"{HERE}:plain": 1.0}])
@pytest.mark.parametrize("name", ["without_gradient", "constant", "integers", "through_numpy"])
def test_a_reward_without_a_gradient_is_refused_before_anything_is_written(tmp_path, fake, name, beside):
    with pytest.raises(InputError, match=f"reward '.*:{name}' passes no gradient to the images"):
        run(fake_config(beside | {f"{HERE}:{name}": 1.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_such_a_reward_may_be_reported(tmp_path, fake):
    report = run(fake_config(heldout={f"{HERE}:without_gradient": 1.0}), tmp_path / "run").report
    assert report["validation"]["scores"][f"{HERE}:without_gradient"]["role"] == "held out"


def test_a_batch_on_which_the_reward_is_constant_ends_no_run(tmp_path, fake):
    """As of a detector that finds nothing; a run that ended there would end there whenever it is resumed."""
    with_fault(fake, lambda call, scores: torch.zeros(len(scores)) if call == 4 else scores)
    assert run(fake_config(), tmp_path / "run").finished
    rewards = [record["reward"] for record in records(tmp_path / "run") if "reward" in record]
    assert rewards.count(0) == 1


def test_a_run_whose_reward_never_had_a_gradient_is_not_finished_though_its_penalty_trains(tmp_path, fake):
    run(fake_config(), tmp_path / "first")
    with_fault(fake, lambda call, scores: scores if call == 0 else torch.ones(len(scores)))
    with pytest.raises(InputError, match="every one of the 6 batches had a reward whose gradient is zero"):
        run(fake_config(from_adapter=str(tmp_path / "first")), tmp_path / "run")
    assert any(record.get("grad_norm", 0) > 0 for record in records(tmp_path / "run"))


@pytest.mark.parametrize("name", ["raises", "of_a_wrong_shape"])
@pytest.mark.parametrize("table", ["rewards", "heldout"])
def test_every_reward_is_tried_before_the_first_step(tmp_path, fake, table, name):
    with pytest.raises(InputError, match=f"reward '.*:{name}' "):
        run(fake_config(**{table: {f"{HERE}:{name}": 1.0}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_flat_reward_is_named_and_a_run_that_it_alone_steered_is_not_finished(tmp_path, fake):
    stream = io.StringIO()
    with pytest.raises(InputError, match="every one of the 6 batches had a reward whose gradient is zero"):
        train(fake_config({f"{HERE}:flat": 1.0}), out=tmp_path / "run", console=Console(file=stream, width=300))
    assert "flat' has the gradient zero at all of 2 base outputs" in stream.getvalue()
    assert not (tmp_path / "run" / "report.json").exists()
    assert saved_step(tmp_path / "run") == 6


def test_a_run_whose_every_batch_was_skipped_is_not_finished(tmp_path, fake):
    for attempt in (lambda: run(fake_config({f"{HERE}:not_finite": 1.0}), tmp_path / "run"),
                    lambda: resume(fake_config({f"{HERE}:not_finite": 1.0}), tmp_path / "run")):  # fmt: skip
        with pytest.raises(InputError, match="every one of the 6 batches was skipped"):
            attempt()
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_generator_that_is_not_differentiable_is_refused(tmp_path, fake):
    def cut(backend):
        plain_generate = backend.generate
        backend.generate = lambda *arguments: plain_generate(*arguments).detach()

    fake.prepare_backend = cut
    with pytest.raises(InputError, match="do not depend on their noise"):
        run(fake_config(), tmp_path / "run")


# --- values that are not finite --------------------------------------------------------------------------------


def test_scores_that_are_not_finite_are_shown(tmp_path, fake):
    name = f"{HERE}:not_finite"
    stream = io.StringIO()
    config = fake_config(heldout={name: 1.0}, validate_every=2)
    report = train(config, out=tmp_path / "run", console=Console(file=stream, width=300)).report
    score = report["validation"]["scores"][name]
    assert (score["base"], score["gain"], score["non_finite"]) == (None, None, {"base": 4, "steered": 4})
    assert report["validation"]["scores"]["reward"]["non_finite"] == {"base": 0, "steered": 0}
    assert "not finite (4 of 4)" in (tmp_path / "run" / "report.html").read_text()
    assert f"{name} not finite (4 of 4) -> not finite (4 of 4)" in stream.getvalue()
    assert resume(config, tmp_path / "run").finished


# --- the best adapter ------------------------------------------------------------------------------------------


def test_the_adapter_with_the_lowest_held_out_loss_is_kept(tmp_path, fake):
    """The trained reward turns after step 4, so that the loss of the validations falls and then rises."""

    def turning(call: int, scores: torch.Tensor) -> torch.Tensor:
        training = scores.requires_grad
        return -3 * scores if training and fake.loaded[-1].default_reward.steps > 4 else scores

    def prepare(backend):
        reward = backend.default_reward
        reward.steps = 0

        def fault(call: int, scores: torch.Tensor) -> torch.Tensor:
            reward.steps += bool(scores.requires_grad and call)
            return turning(call, scores)

        reward.fault = fault

    fake.prepare_backend = prepare
    settings = {"steps": 10, "validate_every": 2, "checkpoint_every": 2, "keep": 9, "optimizer": "sgd", "lr": 0.01}
    report = run(fake_config(**settings), tmp_path / "run").report
    losses = {r["step"]: r["validation"]["loss"] for r in records(tmp_path / "run") if "validation" in r}
    best = min(losses, key=losses.get)
    assert best == 4
    assert report["best"] == {"step": 4, "loss": losses[4]}
    kept = load_file(tmp_path / "run/best/adapter.safetensors")
    then = load_file(tmp_path / "run/checkpoints/step-00000004/tensors.safetensors")
    assert all(torch.equal(then[f"network/{name}"], kept[name]) for name in ("weight", "bias"))
    assert "4 steps of 4 samples" in (tmp_path / "run/best/README.md").read_text()
    assert "The lowest held-out loss was that of step 4" in (tmp_path / "run/report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "run/best").iterdir() if path.name[0] != ".") == [
        "README.md", "adapter.safetensors",
    ]  # fmt: skip


def test_the_validation_loss_is_the_l2_loss_on_held_out_samples(tmp_path):
    """On the linear-Gaussian toy, against the closed form of a map that is known: here f = 0, so -E r / alpha."""
    report = run(small("lr=1e-12", "steps=2", "validate_samples=64"), tmp_path / "run").report
    scores = report["validation"]["scores"]["reward"]
    assert report["validation"]["loss"] == pytest.approx(-scores["base"] / small().train.alpha, rel=1e-6)
