"""A comparison that ends early keeps what it has found, says in its last line how it goes on, and ends as undisturbed.

It is a comparison on a backend of a few numbers, by the command line; the line is split as a shell does and run.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hnkit.training.session
from hnkit.cli import app as cli
from hnkit.config import RewardSpec
from hnkit.internal.files import resumable
from hnkit.internal.values import number_of
from hnkit.rewards import CallableReward, RewardSum
from hnkit.scaled.compare import COMPARISON
from hnkit.scaled.compare import run as run_module
from hnkit.scaled.compare.networks import trained
from tests.hnkit.fake_backend import FakeFactory
from tests.hnkit.training.training_runs import fake_config, interrupt_after

AGAIN = ["hnkit", "compare", "--backend", "fake", "--resume", "my run"]
SMALL = (
    "compare.best_of=2", "compare.steps=[1]", "compare.diversity_prompts=1", "compare.diversity_seeds=2",
    "compare.measure_samples=2", "compare.grid=1", "compare.train_steps=2", "compare.ranks=[]", "compare.losses=[]",
    "train.batch=2", "train.measure_samples=2", "train.validate_samples=2",
)  # fmt: skip
COMMAND = (
    "compare", "--backend", "fake", "--methods", "base,hypernoise,best-of-n", "--seeds", "2",
    *(word for override in SMALL for word in ("--set", override)),
)  # fmt: skip
TIMED = ("seconds", "seconds_per_image")
"""Keys of a document that time changes."""


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeFactory]:
    factory = FakeFactory()
    with pytest.MonkeyPatch.context() as patch:
        # pictures are made, and not drawn, which is most of the time
        patch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.draw", lambda canvas: canvas.get_renderer())
        here = ("hnkit.backend", "hnkit.adapters", "hnkit.training.session")
        for module in (*here, *(f"hnkit.scaled.compare.{name}" for name in ("run", "settings", "networks"))):
            patch.setattr(f"{module}.backend_factory", lambda _: factory)
        patch.setattr("hnkit.cli.compare.comparison_runner", lambda _: COMPARISON)
        yield factory


@pytest.fixture
def faulty(fake) -> Iterator[SimpleNamespace]:
    """What happens at every call of the trained reward and of one that is held out, which nothing is trained on."""
    faults = SimpleNamespace(trained=lambda: None, held_out=lambda: None)

    def trained_on(_: int, scores: torch.Tensor) -> torch.Tensor:
        faults.trained()
        return scores

    def held_out(images: torch.Tensor, _: object) -> torch.Tensor:
        faults.held_out()
        return images.amin((1, 2, 3))

    fake.prepare_backend = lambda backend: setattr(backend.default_reward, "fault", trained_on)
    plain = run_module.load_rewards

    def load(specs: dict[str, RewardSpec], default: object, *rest: object, **named: object) -> RewardSum:
        return plain(specs, default, *rest, **named) if default else RewardSum([CallableReward("held", 1.0, held_out)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_rewards", load)
        yield faults
    fake.prepare_backend = lambda _: None


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    with pytest.raises(SystemExit) as ended:
        cli.app(list(arguments))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def timeless(document: object) -> object:
    if isinstance(document, dict):
        return {key: timeless(value) for key, value in document.items() if key not in TIMED}
    return [timeless(entry) for entry in document] if isinstance(document, list) else document


def found(folder: Path) -> object:
    """What a finished comparison says, without times; the logs of its trainings."""
    logs = {path.parent.name: path.read_text() for path in folder.glob("runs/*/metrics.jsonl")}
    return timeless(json.loads((folder / "report.json").read_text())), logs


@pytest.fixture(scope="module")
def whole(fake, tmp_path_factory) -> object:
    """What the undisturbed comparison says; `faulty` adds a held-out score."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.raises(SystemExit) as ended:
        cli.app([*COMMAND, "--out", str(folder)])
    assert ended.value.code == 0
    document, logs = found(folder)
    return without_held(document), logs


def test_parts_of_another_run_or_of_another_method_are_made_again(whole, fake, tmp_path, capsys):
    """They are whole and sealed, of the same prompts, and under the names of ours."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert run(capsys, *COMMAND, "--out", str(ours))[0] == 0
    assert run(capsys, *COMMAND, "--set", "compare.seed=1", "--out", str(theirs))[0] == 0
    parts = {path.relative_to(ours / "parts"): path for path in (ours / "parts").rglob("*.json")}
    assert len(parts) > 8
    code, _, err = run(capsys, "compare", "--resume", str(ours))
    assert (code, "made again" in err) == (0, False), err
    taken = [ours / "parts" / name for name in parts if (theirs / "parts" / name).exists()]
    for other in (lambda path: theirs / "parts" / path.relative_to(ours / "parts"), _of_another_method):
        before = {path: path.read_bytes() for path in taken}
        swapped = {path: other(path).read_bytes() for path in taken}
        assert swapped != before
        for path, content in swapped.items():
            path.write_bytes(content)
        code, _, err = run(capsys, "compare", "--resume", str(ours))
        assert code == 0, err
        count = sum(before[path] != content for path, content in swapped.items())
        assert err.count(f"hnkit: {number_of(count, 'part')} in {ours / 'parts'} made for something else") == 1, err
        document, logs = found(ours)
        assert (without_held(document), logs) == whole


def test_a_comparison_leaves_the_global_generators_as_they_were(faulty, tmp_path, capsys):
    def draw() -> None:
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 - as a reward may

    faulty.trained = draw
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:]  # noqa: NPY002
    code, _, err = run(capsys, *COMMAND, "--methods", "base", "--out", str(tmp_path / "run"))
    assert code == 0, err
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:]  # noqa: NPY002
    assert torch.equal(after[0], before[0])
    assert after[1] == before[1]
    assert all(np.array_equal(*pair) for pair in zip(after[2], before[2], strict=True))


def test_a_comparison_that_is_gone_on_with_needs_no_backend_named(fake, tmp_path, capsys):
    code, _, err = run(capsys, "compare", "--resume", str(tmp_path / "gone"))
    assert (code, "no run is there" in err) == (2, True), err


def _of_another_method(path: Path) -> Path:
    there = path.with_name(path.name.replace("base", "best-of-n").replace("hypernoise", "base"))
    return there if there.exists() else path


def without_held(document: object) -> object:
    if isinstance(document, dict):
        return {key: without_held(value) for key, value in document.items() if key != "held"}
    return [without_held(entry) for entry in document] if isinstance(document, list) else document


def goes_on_as_printed(said: str, capsys) -> None:
    """Run the command at the end of the last line, as it is pasted into a shell."""
    words = shlex.split(said.strip().splitlines()[-1].rpartition("go on with ")[2])
    assert words[:4] == AGAIN[:4], said
    code, _, err = run(capsys, *words[1:])
    assert code == 0, err


def at(call: int, act: Callable[[], None]) -> Callable[[], None]:
    calls = iter(range(1, 10**6))

    def perhaps() -> None:
        if next(calls) == call:
            act()

    return perhaps


def refuse() -> None:
    raise ConnectionError("the scorer's service is gone")


def send(name: str) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), getattr(signal, name))


WAYS = {
    "training": ("trained", 3),  # the rehearsal is its first call
    "evaluation": ("trained", 14),
    "held out": ("held_out", 3),
}


ALL = [(where, name) for where in ("training", "evaluation") for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")]
PLAIN = (("training", "SIGUSR1"), ("evaluation", "SIGTERM"))


@pytest.mark.parametrize(
    ("where", "name"), [pytest.param(*way, marks=() if way in PLAIN else pytest.mark.slow) for way in ALL]
)
def test_a_signal_ends_a_comparison_that_goes_on_as_it_says(where, name, faulty, whole, tmp_path, capsys):
    reward, call = WAYS[where]
    setattr(faulty, reward, at(call, send(name)))
    before = signal.getsignal(getattr(signal, name))
    code, _, err = run(capsys, *COMMAND, "--out", str(tmp_path / "my run"))
    assert code == 128 + getattr(signal, name), err
    assert signal.getsignal(getattr(signal, name)) is before
    assert "hnkit train" not in err, "one command goes on"
    kept = sorted((tmp_path / "my run" / "parts").glob("*"))
    assert bool(kept) is (where == "evaluation")
    times = {path: path.stat().st_mtime_ns for path in kept if path.is_file()}
    faulty.trained = lambda: None
    goes_on_as_printed(err, capsys)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "a part is not made twice"
    document, logs = found(tmp_path / "my run")
    assert (without_held(document), logs) == whole


@pytest.mark.parametrize("where", [pytest.param("training", marks=pytest.mark.slow), "evaluation", "held out"])
def test_a_reward_that_raises_in_a_comparison_loses_nothing(where, faulty, whole, tmp_path, capsys):
    reward, call = WAYS[where]
    setattr(faulty, reward, at(call, refuse))
    code, _, err = run(capsys, *COMMAND, "--out", str(tmp_path / "my run"))
    said = [line for line in err.splitlines() if line.startswith("hnkit: ")]
    assert (code, len(said)) == (2, 1), err
    assert "raised ConnectionError: the scorer's service is gone" in said[0]
    assert said[0].count("go on with") == 1
    faulty.trained = faulty.held_out = lambda: None
    goes_on_as_printed(err, capsys)
    document, logs = found(tmp_path / "my run")
    assert (without_held(document), logs) == whole


@pytest.mark.parametrize("where", [pytest.param("training", marks=pytest.mark.slow), "evaluation"])
def test_a_limit_on_the_size_of_files_ends_a_comparison_that_goes_on(where, faulty, whole, tmp_path, capsys):
    """As after `ulimit -f`, by the system itself; the first file that is too large is a network's or a part."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    faulty.trained = at(WAYS[where][1], lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1])))
    try:
        code, _, err = run(capsys, *COMMAND, "--out", str(tmp_path / "my run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2, err
    assert "file too large" in err.lower()
    assert ("/parts/" in err) is (where == "evaluation")
    faulty.trained = lambda: None
    goes_on_as_printed(err, capsys)
    document, logs = found(tmp_path / "my run")
    assert (without_held(document), logs) == whole


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_every_signal_ends_with_its_exit_code_and_keeps_the_training(name, tmp_path, monkeypatch, capsys):
    signum = getattr(signal, name)
    monkeypatch.setattr(hnkit.training.session, "backend_factory", lambda _: FakeFactory())
    interrupt_after(monkeypatch, 3, signum)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended, resumable(*AGAIN):
        trained("hypernoise", fake_config(), tmp_path / "run")
    printed = capsys.readouterr().err
    if signum == signal.SIGINT:
        printed, code = cli.describe_error(ended.value)
    else:
        code = ended.value.code
    assert code == 128 + signum
    assert shlex.split(printed.strip().splitlines()[-1].partition("go on with ")[2]) == AGAIN
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
