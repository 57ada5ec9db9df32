"""`hnkit frontier`: from a table of rewards, and on the bundled miniature."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal

import pytest

import hnkit.frontier
import hnkit.internal.files
from hnkit.cli.app import app
from hnkit.frontier import page


def command(*arguments: str, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        app(list(arguments))
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture
def scores(tmp_path):
    draw = random.Random(0)
    rows = ["prompt,method,reward,nats"]
    for prompt in range(6):
        base = [draw.gauss(prompt, 1) for _ in range(60)]
        rows += [f"p{prompt},base,{value}," for value in base]
        rows += [f"p{prompt},ours,{draw.gauss(prompt + 0.5, 1)},0.4" for _ in range(6)]
        rows += [f"p{prompt},theirs,{draw.gauss(prompt + 1, 1)}," for _ in range(6)]
    path = tmp_path / "scores.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_table_becomes_a_report(scores, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out"
    code, shown, _ = command("frontier", "--rewards", str(scores), "--out", str(out), capsys=capsys)
    assert code == 0
    assert max(len(line) for line in shown.splitlines() if not line.startswith("report:")) <= 80
    assert "% of what they could buy" not in shown  # that the card says, and it is said once
    assert re.search(r"^ours +gain .* of what they buy *$", shown, re.MULTILINE)
    assert "Its nats are not" in shown
    assert shown.splitlines()[3].split()[0] == "ours"  # the methods before the frontier they are held against
    document = json.loads((out / "report.json").read_text())
    assert document["methods"]["theirs"]["efficiency"] is None
    assert 0 < document["methods"]["ours"]["efficiency"] < 1.5
    assert {path.name for path in out.iterdir()} >= {"report.html", "report.json", "frontier.png", "provenance.json"}


def test_a_method_of_the_table_that_is_also_computed_is_told_apart(scores, tmp_path, capsys):
    theirs = scores.read_text().replace(",theirs,", ",best-of-2,")
    scores.write_text(theirs)
    out = tmp_path / "out"
    code, shown, _ = command("frontier", "--rewards", str(scores), "--out", str(out), capsys=capsys)
    assert code == 0
    rows = [re.split(" {2,}", line.strip())[0] for line in shown.splitlines()]
    table = [row for row in rows[: rows.index("frontier")] if row.startswith("best-of-")]
    assert table[:3] == ["best-of-2", "best-of-2 of the base", "best-of-4"]
    assert "best-of-2 of the base" in (out / "report.html").read_text()


def test_one_of_several_processes_reads_a_table(scores, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "out"
    assert command("frontier", "--rewards", str(scores), "--out", str(out), capsys=capsys) == (0, "", "")
    assert not out.exists()


def test_json_alone_on_stdout(scores, tmp_path, capsys):
    code, out, _ = command("frontier", "--rewards", str(scores), "--json", "--out", str(tmp_path / "o"), capsys=capsys)
    document = json.loads(out)
    assert code == 0
    nats = [point["nats"] for point in document["frontier"]]
    assert nats[0] == 0.01
    assert nats == sorted(nats)
    assert [entry["n"] for entry in document["best_of"]][:2] == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --rewards FILE.csv, or --backend"),
        (("--rewards", "absent.csv"), "cannot be read"),
        (("--rewards", "{}", "--base", "plain"), "'plain', which is to be the base"),
        (("--rewards", "{}", "--alpha", "1"), "--alpha with --rewards"),
        (("--rewards", "{}", "--backend", "digits"), "one of the two"),
        (("--backend", "digits"), "without --adapter"),
        (("--backend", "digits", "--adapter", "absent", "--base-samples", "3"), "--base-samples 3: give 8 or more"),
        (("--backend", "digits", "--adapter", "absent"), "not a folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, scores, tmp_path, capsys):
    out = tmp_path / "out"
    filled = [argument.format(scores) for argument in arguments]
    code, shown, err = command("frontier", *filled, "--out", str(out), capsys=capsys)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not shown
    assert not out.exists()


def test_the_miniature(tmp_path, capsys):
    """Two steps of training: f is nearly zero, so are its nats and its gain; the frontier is what best-of-2 shows."""
    run = tmp_path / "run"
    options = ["steps=2", "batch=4", "measure_samples=2", "validate_samples=2", "checkpoint_every=2"]
    settings = [part for option in options for part in ("--set", f"train.{option}")]
    assert command("train", "--backend", "digits", *settings, "--out", str(run), capsys=capsys)[0] == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\na blue seven\n")
    code, out, _ = command(
        "frontier", "--backend", "digits", "--adapter", str(run), "--prompts", str(prompts), "--base-samples", "32",
        "--samples", "2", "--json", "--out", str(tmp_path / "out"), capsys=capsys,
    )  # fmt: skip
    document = json.loads(out)
    assert code == 0
    network, method = document["network"], document["methods"]["hypernetwork"]
    assert document["prompts"] == 2
    assert method["nats"] == pytest.approx(network["kl"])
    assert abs(network["kl"]) < 0.05
    assert network["gap_lower_bound"] >= 0
    assert document["best_of"][0]["gain"] > 0
    assert "L2 term" in network["l2_verdict"]["text"]
    assert network["injective"] == "unknown"
    assert network["folds"] == {"negative": 0, "samples": 4}
    assert document["verdict"] == json.loads(json.dumps(page.card(document).to_json()))
    assert [line["label"] for line in document["verdict"]["lines"]][:4] == ["KL", "L2 term", "injective", "local norm"]
    assert method["gap"]["lower"] == network["gap_lower_bound"]


@pytest.mark.parametrize("full_at", range(5))
def test_a_full_disk_loses_nothing_that_was_measured(full_at, scores, tmp_path, capsys, monkeypatch):
    plain, writes, out = hnkit.internal.files.atomic_write, iter(range(100)), tmp_path / "o"

    def full(path, content):
        if next(writes) >= full_at:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        plain(path, content)

    for module in ("hnkit.internal.files", "hnkit.output.page"):
        monkeypatch.setattr(f"{module}.atomic_write", full)
    code, printed, err = command("frontier", "--rewards", str(scores), "--json", "--out", str(out), capsys=capsys)
    document = json.loads(printed)
    assert code == 2
    assert "no space left on device" in err.lower()
    assert set(document["methods"]) >= {"ours", "theirs"}
    assert document["finished"] is False
    assert document["run_folder"] == (str(out) if out.exists() else None)
    assert not (out / "report.json").exists()
    if full_at == 4:
        code, printed, _ = command("frontier", "--rewards", str(scores), "--out", str(tmp_path / "p"), capsys=capsys)
        assert code == 2
        assert re.search(r"^ours +gain", printed, re.MULTILINE)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_it_in_one_line(name, scores, tmp_path, capsys, monkeypatch):
    signum, plain = getattr(signal, name), hnkit.frontier.methods_on_frontier

    def interrupted(*given, **named):
        os.kill(os.getpid(), signum)
        return plain(*given, **named)

    monkeypatch.setattr(hnkit.frontier, "methods_on_frontier", interrupted)
    shown = command("frontier", "--rewards", str(scores), "--out", str(tmp_path / "o"), capsys=capsys)
    assert shown == (128 + signum, "", f"hnkit: stopped by {name}\n")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("table", "answer"), [("rewards", "give --reward mine:f=WEIGHT"), ("heldout", "no adapter")])
def test_a_run_with_a_function_of_its_users_asks_for_no_flag_that_is_not_there(table, answer, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(f'[backend]\nname = "digits"\n[{table}]\n"mine:f" = 1.0\n')
    given = ("--backend", "digits", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    code, _, err = command("frontier", *given, capsys=capsys)
    assert code == 2
    assert answer in err
    assert "--heldout" not in err


@pytest.mark.parametrize("allowed", [False, True])
def test_one_switch_for_the_model_and_the_rewards(allowed, tmp_path, capsys, monkeypatch):
    """A reward that is not here: refused with the switch named, and asked of the hub once the switch is given."""
    from hnkit.backend import backend_factory
    from hnkit.scaled.internal import hub

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    asked: list[bool] = []

    def download(source: str, filename: str, *, local_files_only: bool) -> str:
        asked.append(local_files_only)
        raise OSError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    factory = backend_factory("digits")
    factory.load(factory.options(rank=2)).save_adapter(tmp_path / "adapter")
    switch = ["--set", "backend.local_files_only=false"] if allowed else []
    code, _, err = command(
        "frontier", "--backend", "digits", "--adapter", str(tmp_path / "adapter"), "--reward", "hpsv2=1", *switch,
        "--out", str(tmp_path / "out"), capsys=capsys,
    )  # fmt: skip
    assert code == 2
    assert asked == [not allowed]
    assert ("--set backend.local_files_only=false" in err) is not allowed
    assert not (tmp_path / "out").exists()
