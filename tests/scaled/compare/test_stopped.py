"""A comparison that is stopped while it trains ends as the signal says, with everything kept and the way to go on."""

from __future__ import annotations

import shlex
import signal

import pytest

import hnkit.training.session
from hnkit.cli.app import describe_error
from hnkit.internal.files import resumable
from hnkit.scaled.compare.networks import trained
from tests.hnkit.fake_backend import FakeFactory
from tests.hnkit.training.training_runs import fake_config, interrupt_after

AGAIN = ["hnkit", "compare", "--backend", "fake", "--resume", "my run"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_every_signal_ends_with_its_exit_code_and_keeps_the_training(name, tmp_path, monkeypatch, capsys):
    signum = getattr(signal, name)
    monkeypatch.setattr(hnkit.training.session, "backend_factory", lambda _: FakeFactory())
    interrupt_after(monkeypatch, 3, signum)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended, resumable(*AGAIN):
        trained("hypernoise", fake_config(), tmp_path / "run")
    printed = capsys.readouterr().err
    if signum == signal.SIGINT:
        printed, code = describe_error(ended.value)
    else:
        code = ended.value.code
    assert code == 128 + signum
    assert shlex.split(printed.strip().splitlines()[-1].partition("go on with ")[2]) == AGAIN
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
