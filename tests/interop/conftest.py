"""The tiny checkpoints of `tests/scaled`, for formats that are tried end to end, and a command that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hnkit.cli.app import app
from tests.scaled.conftest import checkpoint

__all__ = ["checkpoint", "refused"]


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[..., str]:
    """`refused(layout)`: the one line of `hnkit generate` on prompts that a layout cannot hold; nothing is written."""

    def run(layout: str) -> str:
        file = tmp_path / "prompts.txt"
        file.write_text("a three\n")
        arguments = ["generate", "--backend", "digits", "--prompts", str(file), "--layout", layout]
        with pytest.raises(SystemExit) as caught:
            app([*arguments, "--out", str(tmp_path / "run")])
        assert caught.value.code == 2
        assert [entry.name for entry in tmp_path.iterdir()] == ["prompts.txt"]
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run
