"""Training with injected noise: what is learned, resumed, deployed and said of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hnkit import InputError, NoiseInjection, NoiseLoss
from hnkit.adapters import load_trained
from hnkit.backend import steer
from hnkit.config import RewardSpec, RunConfig, TrainConfig, resolve_config
from hnkit.training.export import export_adapter
from hnkit.training.run import train
from tests.hnkit.cli.test_app import run as command
from tests.hnkit.fake_backend import FakeFactory
from tests.hnkit.training.training_runs import (
    fake_config,
    outcome,
    quiet,
    records,
    resume,
    run,
    same_outcome,
    small,
    toy,
)

SHARE = 0.4


def optimum(backend, alpha):
    """`(K, c)` of the affine map that the loss is least at, from the reward's own derivatives at 0.

    Given x the loss is `|u - a x|^2 / (2 s) - E r(u + sqrt(s) eps) / alpha` in `u = a (x + f(x))`, and r is quadratic:
    `u = (I + s H)^-1 (a x + s b)`.
    """
    dim = backend.noise_shape[0]

    def reward(x):
        return backend.problem.reward(backend.problem.generate(x[None]))[0] / alpha

    zero = torch.zeros(dim, dtype=torch.float64)
    b = torch.autograd.functional.jacobian(reward, zero)
    H = -torch.autograd.functional.hessian(reward, zero)
    inverse = torch.linalg.inv(torch.eye(dim, dtype=torch.float64) + SHARE * H)
    return inverse, SHARE * inverse @ b / math.sqrt(1 - SHARE)


@pytest.mark.parametrize(
    ("gradient", "settings", "tolerance"),
    [
        ("pathwise", ("steps=400", "batch=256"), 1e-2),
        ("score-function", ("steps=400", "batch=256", "draws=8", "reward_gradient=score-function"), 0.08),
    ],
)
def test_the_loss_learns_its_own_law(tmp_path, gradient, settings, tolerance):
    config = toy(f"injection={SHARE}", "measure_samples=256", "schedule=cosine", *settings)
    report = run(config, tmp_path / "run").report
    backend, _ = load_trained("toy", tmp_path / "run")
    K, c = optimum(backend, config.train.alpha)
    layer = backend.hypernetwork.body[0]
    found = torch.eye(len(c), dtype=torch.float64) + layer.weight.detach()
    assert float((found - K).norm() / K.norm()) < tolerance
    assert float((layer.bias.detach() - c).norm() / c.norm()) < tolerance
    # the law that is reported is the deployed one
    law = (math.sqrt(1 - SHARE) * layer.bias.detach(), (1 - SHARE) * found @ found.mT + SHARE * torch.eye(len(c)))
    exact = report["closed_form"]["targets"]["exact"]
    z = torch.distributions.MultivariateNormal(*law)
    torch.manual_seed(0)
    sample = z.sample((20_000,))
    terms = z.log_prob(sample) - backend.problem.with_alpha(config.train.alpha).log_p0_star(sample)
    assert report["closed_form"]["affine"]
    assert abs(report["closed_form"]["nats"] - float(terms.mean())) < 4.9 * float(terms.std()) / 20_000**0.5 + 1e-9
    assert exact["covariance_error"] > 0
    # the bound of its KL is in the report, in words that say what it is
    injected = report["measurement"]["injected"]
    square = layer.weight.detach().square().sum() + layer.bias.detach().square().sum()
    expected = (1 - SHARE) / (2 * SHARE) * float(square)
    assert abs(injected["nats"] - expected) < 4.9 * injected["nats_stderr"]
    assert injected["certified"] > injected["nats"]
    page = (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    for text in (page, card):
        assert "KL of the deployed law" in text
        assert "mean is estimated" in text
    assert "x + f(x), not deployed" in card
    assert f"1 - a^2 = {SHARE}" in card
    assert report["measurement"]["gap"] is None
    assert "kl_bound" in records(tmp_path / "run")[0]


INJECTED = ("injection=0.5", "steps=12", "checkpoint_every=5")
SCORED = ("draws=2", "reward_gradient=score-function")


@pytest.mark.parametrize("more", [(), ("max_delta=0.3", *SCORED)])
def test_a_resumed_run_is_bit_equal(tmp_path, more, monkeypatch):
    config = small(*INJECTED, *more)
    run(config, tmp_path / "whole")
    calls = []

    def interrupted(session, sums):
        calls.append(session.step)
        if len(calls) == 8:
            raise OSError(28, "no space left on device")
        return update(session, sums)

    from hnkit.training.session import Session

    update = Session.update
    monkeypatch.setattr(Session, "update", interrupted)
    with pytest.raises(InputError):
        run(config, tmp_path / "cut")
    monkeypatch.undo()
    resume(config, tmp_path / "cut")
    assert same_outcome(tmp_path / "whole", tmp_path / "cut", "step-00000012")
    assert "report.json" in outcome(tmp_path / "cut")


@pytest.mark.parametrize("more", [(), SCORED])
def test_micro_batches_do_not_change_what_is_injected(tmp_path, more):
    run(small(*INJECTED, *more), tmp_path / "one")
    run(small(*INJECTED, *more, "accumulate=4"), tmp_path / "four")
    one, four = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("one", "four"))
    for key, value in one.items():
        torch.testing.assert_close(four[key], value, rtol=1e-10, atol=1e-12)


def test_adapters_of_a_run_and_of_its_checkpoints_are_deployed_as_trained(tmp_path):
    run(small(*INJECTED, "max_delta=2.0", "keep=9"), tmp_path / "run")
    export_adapter(str(tmp_path / "run" / "checkpoints" / "step-00000005"), out=str(tmp_path / "made"))
    for folder in (tmp_path / "run", tmp_path / "run" / "adapter", tmp_path / "made"):
        backend, _ = load_trained("toy", folder)
        assert backend.injection == NoiseInjection(0.5, 2.0)
        condition = backend.encode(["a", "a", "b"])
        x = torch.zeros(3, *backend.noise_shape, dtype=torch.float64)
        whole = steer(backend, x, condition)
        part = steer(backend, x[2:], condition.select(torch.tensor([2])))
        assert torch.equal(part.noise[0], whole.noise[2])
        centre = math.sqrt(0.5) * whole.delta
        assert not torch.allclose(whole.noise[0] - centre[0], whole.noise[1] - centre[1], atol=0.05)
    run(small("steps=5"), tmp_path / "plain")
    assert load_trained("toy", tmp_path / "plain")[0].injection is None


def test_a_run_of_several_draws_by_the_gradient_is_used_as_it_is_and_not_gone_on_with(tmp_path, monkeypatch, capsys):
    """Earlier versions took them: the run is made with today's record, its check left out."""
    with monkeypatch.context() as before:
        before.setattr(TrainConfig, "__post_init__", lambda self: None)
        before.setattr(NoiseLoss, "__post_init__", lambda self: None)
        config = small(*INJECTED, "draws=2")
        run(config, tmp_path / "old")
        text = (tmp_path / "old" / "config.toml").read_text()
    assert "draws = 2" in text
    with pytest.raises(InputError, match=r"train\.draws = 2 with train\.reward_gradient = 'pathwise'"):
        resolve_config(config_file=tmp_path / "old" / "config.toml")
    for folder in ("old", "old/adapter"):
        assert load_trained("toy", tmp_path / folder)[0].injection == NoiseInjection(0.5)
    assert resolve_config(resume=tmp_path / "old").train.draws == 1
    export_adapter(str(tmp_path / "old" / "checkpoints" / "step-00000010"), out=str(tmp_path / "made"))
    assert "draws = 2" in (tmp_path / "made" / "config.toml").read_text()
    assert load_trained("toy", tmp_path / "made")[0].injection == NoiseInjection(0.5)
    code, printed, said = command(capsys, "train", "--resume", str(tmp_path / "old"))
    assert (code, printed) == (2, "")
    assert "train.draws = 1 but the run has 2" in said
    assert "`hnkit export --checkpoint`" in said
    code, _, said = command(capsys, "train", "--resume", str(tmp_path / "old"), "--set", "train.draws=2")
    assert code == 2
    assert "leave it out" in said
    few = ("--base-samples", "16", "--samples", "2", "--out", str(tmp_path / "frontier"))
    code, _, _ = command(capsys, "frontier", "--backend", "toy", "--adapter", str(tmp_path / "old"), *few)
    assert code == 0


def parity(images, prompts):
    """A score with no gradient: whether the brightest pixel of an image is in an even column."""
    return (images.detach().flatten(1).argmax(1) % 2 == 0).double()


def test_a_reward_without_a_gradient_is_refused_by_name_and_trained_by_its_values(tmp_path, monkeypatch):
    import hnkit.training.session

    factory = FakeFactory(prepare_backend=lambda backend: setattr(backend, "records_injection", True))
    monkeypatch.setattr(hnkit.training.session, "backend_factory", lambda name: factory)
    rewards = {f"{__name__}:parity": RewardSpec(1.0)}
    base = {"steps": 4, "batch": 4, "measure_samples": 8, "validate_samples": 4, "lr": 0.05}
    with pytest.raises(InputError) as caught:
        train(
            RunConfig("fake", FakeFactory().options(), TrainConfig(**base), rewards),
            out=tmp_path / "a",
            console=quiet(),
        )
    assert "--set train.reward_gradient=score-function" in str(caught.value)
    assert "train.injection" in str(caught.value)
    settings = base | {"injection": 0.5, "draws": 4, "reward_gradient": "score-function"}
    config = RunConfig("fake", FakeFactory().options(), TrainConfig(**settings), rewards)
    result = train(config, out=tmp_path / "b", console=quiet())
    assert result.finished
    assert any(value.any() for value in load_file(tmp_path / "b" / "adapter" / "adapter.safetensors").values())


def test_a_backend_that_does_not_record_it_is_not_trained_with_it(tmp_path, monkeypatch):
    import hnkit.training.session

    monkeypatch.setattr(hnkit.training.session, "backend_factory", lambda name: FakeFactory())
    with pytest.raises(InputError, match="do not record injected noise"):
        train(fake_config(injection=0.5), out=tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # micro-batches take their rows by the same numbers as processes do
def test_two_processes_inject_the_same_noise_as_one(tmp_path):
    config = small(*INJECTED, *SCORED, "measure_every=0")
    run(config, tmp_path / "one")
    (tmp_path / "run.toml").write_text(config.to_toml())
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hnkit"),
        *("train", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "two")),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-10, atol=1e-12)


def test_the_configuration_comes_back(tmp_path):
    config = small(*INJECTED)
    file = tmp_path / "c.toml"
    file.write_text(config.to_toml())
    assert resolve_config(config_file=file) == config
    assert json.loads(json.dumps(config.to_dict()))["train"]["injection"] == 0.5


def test_a_gain_is_of_pairs_that_differ_by_the_delta_alone(tmp_path):
    """Next to no training: with fresh noise on one side only the gain of 64 pairs would have an error of its own."""
    report = run(small("injection=0.5", "steps=1", "lr=1e-12", "validate_samples=64"), tmp_path / "run").report
    score = report["validation"]["scores"]["reward"]
    assert abs(score["gain"]) < 1e-9
    assert score["gain_stderr"] < 1e-9
