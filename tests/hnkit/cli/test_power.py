"""`hnkit compare --power`: on a finished comparison it reads, counts, and makes nothing."""

from __future__ import annotations

import json

import pytest
import torch

from hnkit.cli import compare
from hnkit.cli.app import app
from hnkit.internal.files import new_run_folder
from hnkit.internal.power import Components, components, detectable, needed_prompts


def command(*arguments: str, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        app(["compare", "--backend", "digits", *arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture
def finished(tmp_path):
    """A comparison of one method whose scores are known; its folder holds nothing that images could be made from."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(30, 4, generator=generator)
    method = base + 0.3 + 0.4 * torch.randn(30, 1, generator=generator) + 0.2 * torch.randn(30, 4, generator=generator)
    found = components(method, base)
    folder = new_run_folder(tmp_path / "run", "compare")
    rows = [
        {"method": "base", "components": {}},
        {"method": "hypernoise", "components": {"judge": found.to_json(), "reward": found.to_json()}},
    ]
    document = {"table_1": rows, "settings": {"backend": "digits"}}
    (folder / "report.json").write_text(json.dumps(document))
    return folder, found


def test_the_numbers_are_those_of_the_components(finished, capsys, monkeypatch):
    monkeypatch.setattr(compare, "comparison_runner", lambda _: pytest.fail)  # which would fail if it were called
    folder, found = finished
    before = sorted(path.name for path in folder.iterdir())
    code, out, _ = command("--resume", str(folder), "--power", "0.05", "--json", capsys=capsys)
    assert code == 0
    entries = json.loads(out)["power"]
    assert [(entry["method"], entry["score"]) for entry in entries] == [
        ("hypernoise", "judge"),
        ("hypernoise", "reward"),
    ]
    for need in entries[0]["needs"]:
        assert need["prompts"] == needed_prompts(0.05, found.variance(need["seeds"]))
        assert need["images"] == 2 * need["prompts"] * need["seeds"]
    assert Components(**entries[0]["components"]) == found
    assert entries[0]["detectable"] == pytest.approx(detectable(found.variance(4), 30))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_table_and_sentences_are_shown(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    folder, found = finished
    code, out, _ = command("--resume", str(folder), "--power", "0.05", capsys=capsys)
    assert code == 0
    assert f"{needed_prompts(0.05, found.variance(1)):,} (" in out
    assert "80 % probability" in out.replace("\n", " ")
    assert f"these 30 prompts of 4 find {detectable(found.variance(4), 30):.3g}" in out.replace("\n", " ")


def test_an_interval_that_has_no_end_is_shown(tmp_path, capsys, monkeypatch):
    """Two prompts leave the variance open by a factor of a thousand: the number is told, and that its interval is."""
    monkeypatch.setenv("COLUMNS", "120")
    found = components(torch.tensor([[0.0], [2.0]]), torch.zeros(2, 1))
    folder = new_run_folder(tmp_path / "run", "compare")
    document = {
        "table_1": [{"method": "x", "components": {"reward": found.to_json()}}],
        "settings": {"backend": "digits"},
    }
    (folder / "report.json").write_text(json.dumps(document))
    code, out, _ = command("--resume", str(folder), "--power", "0.001", "--json", capsys=capsys)
    (need,) = json.loads(out)["power"][0]["needs"]
    assert code == 0
    assert need["prompts"] == needed_prompts(0.001, 2.0)
    assert need["most"] is None
    code, out, _ = command("--resume", str(folder), "--power", "0.001", capsys=capsys)
    assert (code, "to more than 10^9)" in out.replace("\n", " ")) == (0, True)


@pytest.mark.parametrize(
    ("power", "message"), [("0", "--power 0: give a difference"), ("nan", "--power nan"), ("-1", "--power -1")]
)
def test_differences_that_are_none(power, message, finished, capsys):
    code, out, err = command("--resume", str(finished[0]), "--power", power, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_comparison_without_variances(finished, capsys):
    folder, _ = finished
    report = json.loads((folder / "report.json").read_text())
    report["table_1"][1]["components"] = {}
    (folder / "report.json").write_text(json.dumps(report))
    code, _, err = command("--resume", str(folder), "--power", "0.1", capsys=capsys)
    assert code == 2
    assert "needs a method beside the base, and two prompts or more" in err
    report["settings"]["backend"] = "sana"
    (folder / "report.json").write_text(json.dumps(report))
    code, _, err = command("--resume", str(folder), "--power", "0.1", capsys=capsys)
    assert (code, "compares backend 'sana', not 'digits'" in err) == (2, True)


def test_one_that_is_not_finished_is_gone_on_with(tmp_path):
    folder = new_run_folder(tmp_path / "run", "compare")
    assert compare.finished_comparison(folder, "digits") is None
    (folder / "report.json").write_text("{}")
    assert compare.finished_comparison(folder, "digits") is None
    (folder / "report.json").write_text('{"table_1": [{"method": "base"}], "settings": {"backend": "digits"}}')
    assert compare.finished_comparison(folder, "digits") is None
