"""One switch, `backend.local_files_only`, says of prompts too whether they may be downloaded, in every command."""

from __future__ import annotations

import pytest

from hnkit.backend import backend_factory
from tests.hnkit.cli.test_app import run
from tests.hnkit.test_prompts import hub

__all__ = ["hub"]

COMMANDS = ("train", "generate", "compare", "verify-bound", "frontier")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "adapter"
    backend_factory("digits").load(None).save_adapter(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_prompts_are_downloaded_where_the_one_switch_says_so_and_not_else(
    command, adapter, hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    arguments = [command, "--backend", "digits", "--prompts", "hf:missing/one", "--out", out]
    arguments += ["--adapter", adapter] if command in ("verify-bound", "frontier") else []
    for allowed in (False, True):
        switch = ["--set", "backend.local_files_only=false"] if allowed else []
        code, _, err = run(capsys, *arguments, *switch)
        (line,) = err.splitlines()
        assert code == 2
        assert ("no such data set" in line) == allowed
        assert ("--set backend.local_files_only=false" in line) != allowed
        assert hub.asked[-1] == ("missing/one", "train", not allowed)
        assert not out.exists()
