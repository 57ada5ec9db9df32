"""The trainer: what each loss learns, resuming to the bit, many processes, faults, and what is refused."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import hnkit.config
import hnkit.training.recorder
import hnkit.training.run
import hnkit.training.session
from hnkit import InputError
from hnkit.backend import backend_factory
from hnkit.config import resolve_config
from hnkit.internal.folders import run_lock
from hnkit.maps import ConditionedMap
from hnkit.training import checkpoint
from hnkit.training.processes import Processes
from hnkit.training.report import model_card
from hnkit.training.run import train
from hnkit.training.session import Session, _chosen_prompts
from hnkit.training.view import TrainView
from tests.hnkit.fake_backend import FakeBackend, FakeFactory
from tests.hnkit.training.training_runs import (
    fake_config,
    interrupt_after,
    outcome,
    quiet,
    records,
    resume,
    run,
    same_outcome,
    small,
    toy,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


# --- item e ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "nats", "tolerance"),
    [("l2", 0.896261, 1e-4), ("second-order", 0.105856, 5e-3), ("exact", 0.0, 1e-3), ("arnoldi", 0.0, 1e-3)],
)
def test_each_loss_learns_its_own_law(tmp_path, kl, nats, tolerance):
    """Distances from the tilted law in closed form; the Monte Carlo gap agrees within five standard errors."""
    config = toy(f"kl={kl}", "steps=400", "batch=256", "measure_samples=512")
    report = run(config, tmp_path / "run").report
    law = report["closed_form"]
    assert law["affine"]
    assert law["nats"] == pytest.approx(nats, abs=tolerance)
    own = law["targets"]["exact" if kl == "arnoldi" else kl]
    assert own["mean_error"] < 0.02
    assert own["covariance_error"] < 0.03
    others = [target for name, target in law["targets"].items() if target is not own]
    assert all(target["covariance_error"] > 0.05 for target in others)
    measured = report["measurement"]
    assert abs(measured["gap"] - law["nats"]) < 5 * measured["gap_stderr"] + 1e-3
    assert measured["injective"] == "certified"


# --- resuming --------------------------------------------------------------------------------------------------


VARIANTS = [
    ("kl=exact", "ema=0.9"),
    ("kl=second-order", "optimizer=sgd", "momentum=0.9", "nesterov=true", "lr=0.01", "noise=fixed"),
    ("kl=l2", "accumulate=2", "warmup=5", "keep=1", "reward_clip=0.5"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_ends_bit_identical(tmp_path, monkeypatch, variant):
    config = small(*variant)
    run(config, tmp_path / "whole")
    for step, signum, code in ((4, signal.SIGINT, 130), (12, signal.SIGTERM, 143), (15, signal.SIGTERM, 143)):
        interrupt_after(monkeypatch, step, signum)
        part = resume(config, tmp_path / "cut") if step > 4 else run(config, tmp_path / "cut")
        assert (part.step, part.finished, part.exit_code) == (step, False, code)
        monkeypatch.undo()
    whole = resume(config, tmp_path / "cut")
    assert (whole.step, whole.finished, whole.exit_code) == (20, True, 0)
    assert same_outcome(tmp_path / "whole", tmp_path / "cut", "step-00000020")


def test_a_damaged_checkpoint_is_named_and_the_older_one_leads_to_the_same_end(tmp_path, monkeypatch, capsys):
    config = small()
    run(config, tmp_path / "whole")
    interrupt_after(monkeypatch, 14, signal.SIGTERM)
    run(config, tmp_path / "cut")
    monkeypatch.undo()
    newest = tmp_path / "cut/checkpoints/step-00000014/tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    resume(config, tmp_path / "cut")
    assert "step-00000014 is damaged" in capsys.readouterr().err
    for name in ("metrics.jsonl", "report.json", "adapter/adapter.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_left_alone(tmp_path):
    config = small()
    run(config, tmp_path / "run")
    before = outcome(tmp_path / "run")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = resume(config, tmp_path / "run")
    assert (again.finished, again.step, again.exit_code) == (True, 20, 0)
    assert again.report["step"] == 20
    assert outcome(tmp_path / "run") == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name != ".lock")


def test_steps_may_grow_and_nothing_else_may_change(tmp_path):
    config = small("schedule=constant")
    run(config, tmp_path / "run")
    for change in ("lr=0.5", "seed=3", "kl=exact", "steps=10"):
        with pytest.raises(InputError, match=f"train.{change.split('=')[0]} = "):
            resume(small("schedule=constant", change), tmp_path / "run")
    longer = small("schedule=constant", "steps=30")
    assert resume(longer, tmp_path / "run").step == 30
    assert resolve_config(resume=tmp_path / "run") == longer
    run(longer, tmp_path / "at-once")
    name = "adapter/adapter.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()


def test_a_decaying_rate_does_not_grow(tmp_path):
    run(small(), tmp_path / "run")
    with pytest.raises(InputError, match="steps may grow, and only where"):
        resume(small("steps=30"), tmp_path / "run")


def test_folders_that_are_no_run_or_in_use_or_taken(tmp_path):
    with pytest.raises(InputError, match="no run is there"):
        resume(small(), tmp_path)
    with pytest.raises(InputError, match="never overwritten"):
        run(small(), tmp_path)
    run(small(), tmp_path / "run")
    with run_lock(tmp_path / "run"), pytest.raises(InputError, match="in use by another process"):
        resume(small(), tmp_path / "run")


# --- faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch, code):
    config = small()
    run(config, tmp_path / "whole")
    save, calls = hnkit.training.recorder.save_checkpoint, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) >= 2:
            raise OSError(code, os.strerror(code), str(tmp_path / "run"))
        return save(*arguments)

    monkeypatch.setattr(hnkit.training.recorder, "save_checkpoint", failing)
    with pytest.raises(InputError, match="older checkpoints are intact") as raised:
        run(config, tmp_path / "run")
    assert os.strerror(code) in str(raised.value)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000006"]
    resume(config, tmp_path / "run")
    for name in ("metrics.jsonl", "report.json", "adapter/adapter.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_non_finite_batches_are_skipped_and_counted(tmp_path, fake):
    def broken(call: int, scores: torch.Tensor) -> torch.Tensor:
        return scores * math.nan if call in (3, 4) else scores

    fake.prepare_backend = lambda backend: setattr(backend.default_reward, "fault", broken)
    result = run(fake_config(steps=8), tmp_path / "run")
    assert result.skipped == 2
    steps = [record for record in records(tmp_path / "run") if "loss" in record]
    assert [record["skipped"] for record in steps] == [False, False, True, True, False, False, False, False]
    assert steps[2]["loss"] is None
    assert result.report["skipped"] == 2
    weights = load_file(tmp_path / "run/adapter/adapter.safetensors")
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())


def test_a_skipped_batch_leaves_network_and_optimizer_alone(tmp_path, fake):
    config = fake_config(steps=3, optimizer="sgd", momentum=0.9)
    seen: list[torch.Tensor] = []

    def spy(call: int, scores: torch.Tensor) -> torch.Tensor:
        if call:
            seen.append(fake.loaded[-1].hypernetwork.bias.detach().clone())
        return scores * math.inf if call == 2 else scores

    fake.prepare_backend = lambda backend: setattr(backend.default_reward, "fault", spy)
    run(config, tmp_path / "run")
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


def test_too_many_non_finite_batches_stop_the_run_after_a_checkpoint(tmp_path, fake):
    fake.prepare_backend = lambda backend: setattr(
        backend.default_reward, "fault", lambda call, scores: scores * math.nan if call > 2 else scores
    )
    with pytest.raises(InputError, match="3 batches in a row had no finite loss and gradient"):
        run(fake_config(max_skipped=3), tmp_path / "run")
    found = checkpoint.newest_checkpoint(tmp_path / "run", pytest.fail)
    assert found is not None
    assert found.state["skipped"] == 3


def test_out_of_memory_names_what_helps(tmp_path, fake):
    def full(_: int, __: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    fake.prepare_backend = lambda backend: setattr(backend.default_reward, "fault", full)
    with pytest.raises(InputError, match=r"train\.accumulate"):
        run(fake_config(), tmp_path / "run")


# --- batches, rewards, prompts ---------------------------------------------------------------------------------


def test_micro_batches_change_nothing(tmp_path):
    for accumulate in (1, 4):
        run(small("kl=second-order", f"accumulate={accumulate}"), tmp_path / str(accumulate))
    one, four = (load_file(tmp_path / name / "adapter/adapter.safetensors") for name in ("1", "4"))
    for name, value in one.items():
        assert float((value - four[name]).abs().max()) < 1e-12


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_of_a_step_bounds_each_sample_s_reward(tmp_path, accumulate):
    """Against the chain rule by hand: the reward's gradient of one row at a time, cut, then through the network."""
    bound = 6.0
    settings = ("batch=8", "clip=0", "alpha=0.7", f"reward_clip={bound}", f"accumulate={accumulate}")
    session = Session(toy(*settings), Processes("cpu"), TrainView(quiet(), quiet=True))
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.add_(0.1)
    session.gradients()
    found = {name: parameter.grad.clone() for name, parameter in session.parameters.items()}
    batch = session.stream.rows(0, 0, 8)
    condition = session.backend.encode(batch.prompts)
    f = ConditionedMap(session.network, condition)
    cut, expected = 0, {name: torch.zeros_like(p) for name, p in session.parameters.items()}
    for row in range(8):
        delta = f(batch.noise)[row]
        moved = (batch.noise[row] + delta).detach().requires_grad_()
        outputs = session.backend.generate(moved[None], condition.select(torch.tensor([row])), 1)
        (slope,) = torch.autograd.grad(session.rewards(outputs, batch.prompts[row : row + 1]).sum(), moved)
        cut += float(slope.norm()) > bound
        slope = slope * min(1.0, bound / float(slope.norm()))
        total = (delta.square().sum() / 2 - (delta * slope).sum() / 0.7) / 8
        shares = torch.autograd.grad(total, list(session.parameters.values()))
        for name, share in zip(expected, shares, strict=True):
            expected[name] += share
    assert 0 < cut < 8
    for name, gradient in found.items():
        assert float((gradient - expected[name]).abs().max()) < 1e-12 * max(1.0, float(gradient.abs().max()))


def test_two_processes_train_as_one(tmp_path):
    """The same global batch, split over two processes: equal parameters, metrics and skipped batches."""
    options = ["steps=8", "batch=8", "kl=second-order", "ema=0.5", "accumulate=2", "measure_samples=8", "clip=0.5"]
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, io\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from hnkit.config import resolve_config\nfrom hnkit.training.run import train\n"
        f"c = resolve_config(backend='toy', preset='item-e', overrides=[f'train.{{o}}' for o in {options!r}])\n"
        "train(c, out=Path(sys.argv[1]), console=Console(file=io.StringIO()))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "2", str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run(toy(*options), tmp_path / "one")
    one, two = (load_file(tmp_path / name / "adapter/adapter.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert float(value.abs().max()) > 1e-3
        assert float((value - two[name]).abs().max()) < 1e-12
    for left, right in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        if "loss" in left:
            assert left == pytest.approx(right, rel=1e-10)


def test_batches_that_do_not_divide(tmp_path, fake, monkeypatch):
    class Three(hnkit.training.run.Processes):
        def __init__(self, device) -> None:
            super().__init__(device)
            self.count = 3

        def require_same(self, facts) -> None:
            pass

    monkeypatch.setattr(hnkit.training.run, "Processes", Three)
    with pytest.raises(InputError, match="give a multiple of 3"):
        run(fake_config(), tmp_path / "run")


def test_held_out_prompts_scores_and_images(tmp_path, fake):
    result = run(fake_config(steps=40, validate_every=20, measure_every=20), tmp_path / "run")
    backend = fake.loaded[0]
    assert set(backend.prepared) == {*backend.prompts()[0], *backend.prompts()[1]}
    entries = [record["validation"] for record in records(tmp_path / "run") if "validation" in record]
    assert len(entries) == 2
    scores = entries[-1]["scores"]
    assert scores["reward"]["role"] == "trained"
    assert scores["judge"]["role"] == "judge"
    assert scores["reward"]["gain"] == pytest.approx(scores["reward"]["steered"] - scores["reward"]["base"], abs=1e-6)
    assert scores["reward"]["gain"] > 5 * scores["reward"]["gain_stderr"]
    with Image.open(tmp_path / "run" / entries[-1]["images"]) as image:
        assert image.size == (4 * 6, 2 * 6)
    trained_on = {prompt for batch in backend.seen for prompt in batch} & set(backend.prompts()[0])
    assert trained_on == set(backend.prompts()[0])
    card = (tmp_path / "run/adapter/README.md").read_text()
    for text in (
        "fake",
        "brightness (weight 2)",
        "40 steps of 4 samples",
        "effective alpha = 1",
        "KL (Stein form):",
        "L2 term:",
        "## Use",
    ):
        assert text in card
    assert ModelCard(card).data.to_dict() == {
        "library_name": "hnkit",
        "pipeline_tag": "text-to-image",
        "tags": ["noise-hypernetwork", "arxiv:2508.09968"],
    }
    page = (tmp_path / "run/report.html").read_text()
    assert "How close L2 stays" in page
    assert "Base and steered outputs" in page
    assert result.report["validation"] == entries[-1]


def test_prompt_files_are_split_and_guarded(tmp_path, fake):
    training, evaluation = tmp_path / "train.txt", tmp_path / "held.txt"
    training.write_text("\n".join(f"a {k}" for k in range(10)))
    evaluation.write_text("A  3\nsomething else\n")
    with pytest.raises(InputError, match="1 evaluation prompts are in the training set"):
        run(fake_config(prompts=str(training), validation_prompts=str(evaluation)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(fake_config(prompts=str(training), validation_share=0.3, steps=4), tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    held = set(report["validation"]["prompts"])
    assert len(held) == 3
    assert held < {f"a {k}" for k in range(10)}


@pytest.mark.parametrize(
    ("count", "share", "trained", "held_out"), [(30, 0.0, 30, False), (1, 0.1, 1, False), (30, 0.1, 27, True)]
)
def test_only_prompts_that_are_not_trained_on_are_called_held_out(tmp_path, fake, count, share, trained, held_out):
    prompts = tmp_path / "train.txt"
    prompts.write_text("\n".join(f"a {k}" for k in range(count)))
    run(fake_config(prompts=str(prompts), validation_share=share, steps=2), tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["validation"]["held_out"] is held_out
    config = fake_config(prompts=str(prompts), validation_share=share)
    training, validation = _chosen_prompts(config, fake.load(config.options))
    assert len(training) == trained
    assert set(training).isdisjoint(validation) is held_out
    page = (tmp_path / "run/report.html").read_text()
    assert ("Means over held-out prompts" in page) is held_out
    assert ("Means over the training prompts" in page) is not held_out


def test_changed_prompts_are_refused(tmp_path, fake):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\nfour")
    config = fake_config(prompts=str(file), steps=2)
    run(config, tmp_path / "run")
    file.write_text("one\ntwo\nthree\nfive")
    longer = fake_config(prompts=str(file), steps=3)
    with pytest.raises(InputError, match="prompts have changed"):
        resume(longer, tmp_path / "run")
    file.write_text("one\ntwo\nthree\nfour")
    assert resume(longer, tmp_path / "run").step == 3


def test_the_code_of_a_model_card_loads_the_adapter(tmp_path, monkeypatch):
    run(toy("steps=2", "batch=4", "measure_samples=8"), tmp_path / "run")
    card = (tmp_path / "run/adapter/README.md").read_text()
    monkeypatch.chdir(tmp_path / "run/adapter")
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    saved = load_file(tmp_path / "run/adapter/adapter.safetensors")
    loaded = names["backend"].hypernetwork.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


@pytest.mark.parametrize(
    ("prompts", "said", "data_sets"),
    [
        ("", "the backend's own", None),
        ("/home/me/secret/prompts.txt", "prompts.txt", None),
        ("hf:org/name:test:caption", "the data set org/name:test:caption", ["org/name"]),
    ],
)
def test_a_model_card_says_where_the_prompts_are_from_and_no_folder(prompts, said, data_sets):
    config = resolve_config(backend="toy", overrides=[f"train.prompts={prompts}"])
    backend = backend_factory("toy").load(backend_factory("toy").options())
    report = {"rewards": {}, "step": 1, "skipped": 0, "temperature": "t", "measurement": None}
    card = ModelCard(model_card(config, backend, report))
    assert f"- Prompts: {said}\n" in card.text
    assert card.data.datasets == data_sets
    assert "secret" not in str(card)


def test_direct_fine_tuning_uses_the_same_trainer(tmp_path, fake):
    report = run(fake_config(objective="direct", steps=10), tmp_path / "run").report
    assert report["measurement"] is None
    assert report["validation"]["scores"]["reward"]["gain"] > 0
    assert float(load_file(tmp_path / "run/adapter/adapter.safetensors")["tuned"]) > 0
    assert "no KL term" in report["temperature"]


def test_direct_needs_a_backend_that_offers_it(tmp_path):
    with pytest.raises(InputError, match="no direct fine-tuning"):
        run(small("objective=direct"), tmp_path / "run")


def test_rewards_of_the_users_own(tmp_path, fake, monkeypatch):
    (tmp_path / "mine_reward.py").write_text(
        "def bright(images, prompts):\n    return images.mean((1, 2, 3))\n"
        "def wrong(images, prompts):\n    return images.mean()\nvalue = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = resolve_config(
        backend="fake",
        overrides=["train.steps=2", "train.batch=4", "train.measure_samples=8"],
        rewards=["mine_reward:bright=0.5"],
    )
    assert run(config, tmp_path / "run").report["rewards"] == {"mine_reward:bright": 0.5}
    for flag, message in (
        ("mine_reward:wrong", "returned"),
        ("mine_reward:value", "is a int"),
        ("mine_reward:nothing", "has no nothing"),
        ("not_there_at_all:f", "importing not_there_at_all failed"),
        ("brightness", "unknown reward"),
    ):
        with pytest.raises(InputError, match=message):
            run(resolve_config(backend="fake", rewards=[flag]), tmp_path / message)


def test_mean_reduction_says_what_it_aims_at(tmp_path, fake):
    report = run(fake_config(reduction="mean"), tmp_path / "run").report
    assert "effective alpha = 0.0208333 = 1 / 48" in report["temperature"]


def test_trackers(tmp_path, fake):
    pytest.importorskip("tensorboard")
    run(fake_config(steps=2, trackers=("tensorboard",)), tmp_path / "run")
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    with pytest.raises(InputError, match="pip install wandb"):
        run(fake_config(trackers=("wandb",)), tmp_path / "other")


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(tmp_path, fake):
    for terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=120)
        train(fake_config(), out=tmp_path / str(terminal), console=console)
        text = stream.getvalue()
        assert "effective alpha = 1" in text
        assert ("\x1b[" in text) == terminal
        assert ("step 3/6" in text) == (not terminal)


def test_measurements_leave_training_alone(tmp_path):
    for every in (0, 3):
        run(small("kl=arnoldi", f"measure_every={every}", f"validate_every={every}"), tmp_path / str(every))
    name = "adapter/adapter.safetensors"
    assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_the_backend_protocol_is_met_by_the_fake():
    from hnkit.backend import Backend

    assert isinstance(FakeBackend(FakeFactory().options()), Backend)
