"""The command line: exit codes, one line per error, JSON on stdout, nothing overwritten, fast help."""

from __future__ import annotations

import dataclasses
import errno
import html
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

import pytest
import typer
from rich.cells import cell_len
from torch.distributed import TCPStore

from hnkit.cli import app as cli
from hnkit.cli import backends, compare, export, frontier, generate, push, train, verify_bound
from hnkit.cli.app import describe_error
from hnkit.cli.folders import resumed_folder
from hnkit.cli.options import NEWEST, command, command_line
from hnkit.config import GenerateSettings, resolve_config, resume_command
from hnkit.errors import InputError
from hnkit.internal import workers
from hnkit.internal.values import CONTROL, described, field_types, setting, shortened
from hnkit.kl.divergence import METHODS
from hnkit.output.layouts import LAYOUTS
from hnkit.training.plan.cards import CARDS

MAPS = """
import torch
from torch import nn

def good(x): return 0.2 * torch.sin(x)
def twisted(x): return 0.3 * torch.sin(x) + 0.1 * x.roll(1, -1)
def reshaped(x): return x[:, :1]
def flat(x): return x.flatten(1)[:, 0]
def couples(x): return 0.1 * (x - x.mean(0))
def not_a_number(x): return x / 0
def partly_nan(x): return torch.where(x > 1.5, torch.nan, 0.1 * x)
def detached(x): return x.detach().round()
def through_numpy(x): return torch.from_numpy(x.detach().numpy() * 0.5)
def random(x): return 0.1 * torch.randn_like(x) * x
def raises(x): raise RuntimeError("first line\\nsecond line")
def returns_none(x): return None
def integer(x): return x.long()
def score(outputs, prompts): return outputs.flatten(1).mean(1)
def look(outputs, prompts): return outputs.flatten(1).amax(1)
def fails_to_build(): raise ValueError("no weights here")
def builds_nothing(): return None
number = 5
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    def forward(self, x): return 0.1 * self.body(x)
def make(): return Net()
net = Net()
class Needs(nn.Module):
    def __init__(self, width): super().__init__()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a module of maps in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mymaps.py").write_text(MAPS)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "syntax.py").write_text("def f(x:\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("kept")
    yield tmp_path
    for name in ("mymaps", "broken", "syntax"):
        sys.modules.pop(name, None)


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.app([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


MAP = ("verify-bound", "--shape", "3", "--samples", "8", "--map")

BAD = [
    ("frobnicate",),
    ("verify-bound", "--nope"),
    ("verify-bound", "--samples"),
    ("verify-bound", "--samples", "many"),
    ("verify-bound", "--samples", "0"),
    ("verify-bound", "--samples", "-3"),
    ("verify-bound", "--seed", "-1"),
    ("verify-bound", "--seed", "1.5"),
    ("verify-bound", "--toy", "nonesuch"),
    ("verify-bound", "--method", "guess"),
    ("verify-bound", "--toy", "linear-gaussian", "--alpha", "0"),
    ("verify-bound", "--toy", "linear-gaussian", "--alpha", "-1"),
    ("verify-bound", "--toy", "linear-gaussian", "--alpha", "nan"),
    ("verify-bound", "--toy", "linear-gaussian", "--out", "taken"),
    ("verify-bound", "--toy", "linear-gaussian", "--out", "mymaps.py"),
    ("verify-bound", "--toy", "linear-gaussian", "--out", "mymaps.py/below"),
    ("verify-bound", "--toy", "linear-gaussian", "--map", "mymaps:good", "--shape", "3"),
    ("verify-bound", "--shape", "3"),
    ("verify-bound", "--adapter", "taken"),
    ("verify-bound", "--prompts", "mymaps.py"),
    ("verify-bound", "--set", "backend.problem=folding"),
    ("verify-bound", "--map", "mymaps:good"),
    ("verify-bound", "--map", "mymaps:good", "--shape", ""),
    ("verify-bound", "--map", "mymaps:good", "--shape", "3,x"),
    ("verify-bound", "--map", "mymaps:good", "--shape", "3,,4"),
    ("verify-bound", "--map", "mymaps:good", "--shape", "0"),
    ("verify-bound", "--map", "mymaps:good", "--shape=-3"),
    ("verify-bound", "--map", "mymaps:good", "--shape", "99999999999"),
    (*MAP, "mymaps"),
    (*MAP, ":good"),
    (*MAP, "mymaps:"),
    (*MAP, "mymaps:absent"),
    (*MAP, "no_such_module:f"),
    (*MAP, "broken:f"),
    (*MAP, "syntax:f"),
    (*MAP, "mymaps:number"),
    (*MAP, "mymaps:reshaped"),
    (*MAP, "mymaps:flat"),
    (*MAP, "mymaps:couples"),
    (*MAP, "mymaps:not_a_number"),
    ("verify-bound", "--shape", "3", "--samples", "64", "--map", "mymaps:partly_nan"),
    (*MAP, "mymaps:detached"),
    (*MAP, "mymaps:through_numpy"),
    (*MAP, "mymaps:random"),
    (*MAP, "mymaps:raises"),
    (*MAP, "mymaps:returns_none"),
    (*MAP, "mymaps:integer"),
    (*MAP, "mymaps:fails_to_build"),
    (*MAP, "mymaps:builds_nothing"),
    (*MAP, "mymaps:Needs"),
    (*MAP, "mymaps:good", "--alpha", "1"),
    (*MAP, "mymaps:good", "--method", "arnoldi", "--budget", "0"),
    (*MAP, "mymaps:good", "--method", "arnoldi", "--rel-error", "0"),
    (*MAP, "mymaps:good", "--method", "arnoldi", "--rel-error", "-0.1"),
    (*MAP, "mymaps:good", "--method", "arnoldi", "--probes", "0"),
    (*MAP, "mymaps:good", "--method", "arnoldi", "--steps", "0"),
    (*MAP, "mymaps:good", "--rel-error", "0.1"),
    ("verify-bound", "--backend", "nonesuch", "--adapter", "taken"),
    ("verify-bound", "--backend", "toy"),
    ("verify-bound", "--backend", "toy", "--adapter", "absent"),
    ("verify-bound", "--backend", "toy", "--adapter", "taken"),
    ("train",),
    ("train", "--backend", "nonesuch"),
    ("train", "--backend", "toy", "--kl", "guess"),
    ("train", "--backend", "toy", "--alpha", "0"),
    ("train", "--backend", "toy", "--steps", "0"),
    ("train", "--backend", "toy", "--steps", "x"),
    ("train", "--backend", "toy", "--config", "absent.toml"),
    ("train", "--backend", "toy", "--config", "mymaps.py"),
    ("train", "--backend", "toy", "--config", "taken"),
    ("train", "--backend", "toy", "--set", "train.nonsense=1"),
    ("train", "--backend", "toy", "--set", "nonsense"),
    ("train", "--backend", "toy", "--preset", "nonesuch"),
    ("train", "--backend", "toy", "--reward", "nonesuch=1"),
    ("train", "--backend", "toy", "--reward", "mymaps:absent=1"),
    ("train", "--backend", "toy", "--out", "taken"),
    ("train", "--backend", "toy", "--resume"),
    ("train", "--backend", "toy", "--resume", "absent"),
    ("train", "--backend", "toy", "--resume", "taken"),
    ("train", "--resume", "taken", "--out", "elsewhere"),
    ("generate",),
    ("generate", "--backend", "nonesuch"),
    ("generate", "--backend", "toy"),
    ("generate", "--backend", "toy", "--count", "0"),
    ("generate", "--backend", "toy", "--batch", "0"),
    ("generate", "--backend", "toy", "--steps", "0"),
    ("generate", "--backend", "toy", "--layout", "nonesuch"),
    ("generate", "--backend", "toy", "--prompts", "absent.txt"),
    ("generate", "--backend", "toy", "--prompts", "mymaps.py"),
    ("generate", "--backend", "toy", "--prompt", " "),
    ("generate", "--backend", "toy", "--prompt", "a", "--prompts", "absent.txt"),
    ("generate", "--backend", "toy", "--out", "taken"),
    ("generate", "--backend", "toy", "--adapter", "absent"),
    ("compare",),
    ("compare", "--backend", "nonesuch"),
    ("compare", "--backend", "toy"),
    ("backends", "--nope"),
]


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_line_and_exit_2(arguments, here, capsys):
    before = sorted(here.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("[")]  # progress of what ran before
    assert len(lines) == 1, err
    assert lines[0].startswith("hnkit: ")
    assert "internal error" not in err
    assert len(lines[0]) < 600
    left = [path for path in sorted(here.rglob("*")) if "__pycache__" not in path.parts and path not in before]
    assert left == []
    assert (here / "taken" / "precious").read_text() == "kept"


def test_bad_toml_names_the_file_and_the_key(here, capsys):
    (here / "a.toml").write_text("[train]\nstepz = 3\n")
    code, _, err = run(capsys, "train", "--backend", "toy", "--config", "a.toml")
    assert code == 2
    assert "stepz" in err
    assert "a.toml" in err
    (here / "a.toml").write_text("[train\n")
    assert run(capsys, "train", "--backend", "toy", "--config", "a.toml")[0] == 2


def test_map_report(here, capsys):
    code, out, _ = run(
        capsys, "verify-bound", "--map", "mymaps:twisted", "--shape", "4", "--samples", "32", "--out", "run", "--json"
    )
    assert code == 0
    document = json.loads(out)
    assert document["ok"] is True
    assert document["config"]["shape"] == [4]
    names = {figure["name"] for figure in document["figures"]}
    assert {"KL (Stein form)", "L2 term", "symmetry index", "Theorem 7 estimate", "Stein residual z"} <= names
    by_name = {check["name"]: check for check in document["checks"]}
    assert by_name["theorem-7"]["verdict"] == "not certified"
    saved = json.loads((here / "run" / "report.json").read_text())
    assert saved == {key: value for key, value in document.items() if key != "run_folder"}
    assert sorted(path.name for path in (here / "run").iterdir()) == sorted(
        [".hnkit-run", ".lock", "config.json", "provenance.json", "report.json", "report.html", "verify.json"]
        + document["plots"]
    )


@pytest.mark.parametrize("name", ["net", "make", "Net"])
def test_modules_and_factories_are_maps_in_eval_mode(name, here, capsys):
    code, out, err = run(capsys, *MAP, f"mymaps:{name}", "--json")
    assert code == 0, err
    assert json.loads(out)["ok"]


def test_text_fits_80_columns(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "verify-bound", "--toy", "rotation", "--toy", "extremal", "--samples", "16", "-v")
    assert code == 0
    assert max(map(cell_len, out.splitlines())) <= 80  # columns: the hat of an x takes none
    assert "theorem-7" in out
    assert "report: runs/verify-" in out
    code, out, _ = run(capsys, *MAP, "mymaps:good")
    assert max(cell_len(line) for line in out.splitlines() if not line.startswith("report:")) <= 80
    assert "KL (Stein form)" in out


@pytest.mark.parametrize(
    "arguments",
    [
        (*MAP, "mymaps:good"),
        ("verify-bound", "--toy", "extremal", "--samples", "16"),
        ("verify-bound", "--toy", "extremal", "--toy", "fold", "--samples", "16"),
    ],
)
def test_the_answer_is_in_the_last_ten_lines(arguments, here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, *arguments, "--out", "run")
    assert code == 0
    card = json.loads(Path("run/report.json").read_text())["verdict"]
    last = " ".join(" ".join(out.splitlines()[-10:]).split())
    assert card["sentence"] in last
    assert all(line["value"] in last for line in card["lines"])
    page = re.sub("</?span[^>]*>", "", html.unescape(Path("run/report.html").read_text()))
    assert page.index(card["sentence"]) < page.index("<nav>")


def test_same_seed_same_report(here, capsys):
    texts = [
        run(capsys, *MAP, "mymaps:good", "--out", f"run{k}", "--json", "--method", "arnoldi")[1].replace(f"run{k}", "")
        for k in (1, 2)
    ]
    assert texts[0] == texts[1]


def test_estimates_carry_error_bars(here, capsys):
    arguments = (*MAP, "mymaps:twisted", "--method", "arnoldi", "--probes", "4", "--json")
    figures = {figure["name"]: figure for figure in json.loads(run(capsys, *arguments)[1])["figures"]}
    assert figures["KL (Stein form)"]["stderr"] > 0
    one = json.loads(
        run(capsys, "verify-bound", "--map", "mymaps:twisted", "--shape", "3", "--samples", "1", "--json")[1]
    )
    figures = {figure["name"]: figure for figure in one["figures"]}
    assert figures["KL (Stein form)"]["stderr"] is None  # one sample says nothing about its own error
    assert {check["name"]: check["verdict"] for check in one["checks"]}["stein-identity"] == "not applicable"


def test_train_verify_resume(here, capsys):
    train = ("train", "--backend", "toy", "--steps", "30", "--batch", "16", "--lr", "0.05", "--out", "run")
    code, out, err = run(capsys, *train, "--set", "train.measure_samples=32", "--kl", "exact", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["finished"]
    assert document["report"]["config"]["train"]["kl"] == "exact"
    code, _, _ = run(capsys, *train)
    assert code == 2  # the folder exists
    code, out, err = run(capsys, "train", "--resume", "run")
    assert code == 0, err
    for adapter in ("run", "run/adapter"):
        code, out, err = run(
            capsys, "verify-bound", "--backend", "toy", "--adapter", adapter, "--samples", "32", "--json"
        )
        assert code == 0, err
        figures = {figure["name"]: figure for figure in json.loads(out)["figures"]}
        assert figures["optimality gap"]["value"] > 0
        assert figures["Lipschitz, certified"]["value"] > 0
    assert run(capsys, "verify-bound", "--backend", "digits", "--adapter", "run")[0] == 2


QUICK_RUN = (
    "--set",
    "train.schedule=constant",
    "--set",
    "train.batch=4",
    "--set",
    "train.measure_samples=4",
    "--set",
    "train.validate_samples=4",
)
CODE = ("--reward", "mymaps:score=0.5", "--heldout", "mymaps:look=2")


def test_a_run_with_code_is_resumed_by_the_hint_and_its_adapter_is_used_without_the_code(here, capsys, monkeypatch):
    train = ("train", "--backend", "toy", *QUICK_RUN)
    code, out, err = run(capsys, *train, "--steps", "2", *CODE, "--out", "my run", "--json")
    assert code == 0, err
    report = json.loads(out)["report"]
    code, _, err = run(capsys, "train", "--resume", "my run", "--steps", "3")
    assert code == 2
    assert "give --reward mymaps:score=WEIGHT" in err
    hint = resume_command(resolve_config(resume="my run", rewards=[CODE[1]], heldout=[CODE[3]]), Path("my run"))
    hint = shlex.split(hint)[1:]  # without the program's name
    code, out, err = run(capsys, *hint, "--steps", "3", "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 3
    assert json.loads(out)["report"]["config"]["heldout"] == report["config"]["heldout"] != {}
    for flag in ("--heldout", "--reward"):  # another weight is another run
        code, _, err = run(capsys, *hint, flag, "mymaps:look=3", "--steps", "4")
        assert code == 2
    again = ("--config", "my run/config.toml", *CODE, "--steps", "2", "--out", "again", "--json")
    code, out, err = run(capsys, "train", *again)
    assert code == 0, err
    assert json.loads(out)["report"]["config"]["rewards"] == report["config"]["rewards"]
    sys.modules.pop("mymaps")
    (here / "mymaps.py").unlink()  # the code is gone, and nobody asks for it
    code, out, err = run(capsys, "verify-bound", "--backend", "toy", "--adapter", "my run", "--samples", "8", "--json")
    assert code == 0, err
    assert json.loads(out)["figures"]


def test_a_folder_is_a_string_or_a_path_everywhere(here):
    from hnkit.adapters import load_trained
    from hnkit.toy.backend import ToyBackend, adapter_options
    from hnkit.training.run import train as run_training
    from hnkit.verify import verify_bound as verify

    overrides = [f"train.{key}={value}" for key, value in (("steps", 1), ("batch", 4), ("measure_samples", 4))]
    config = resolve_config(backend="toy", overrides=overrides)
    assert run_training(config, out="run").folder == Path("run")
    assert run_training(resolve_config(resume="run"), resume="run").finished
    backend = ToyBackend(adapter_options("run/adapter"))
    backend.load_adapter("run/adapter")
    backend.save_adapter("copy")
    for folder in ("run", "copy", Path("copy")):
        assert load_trained("toy", folder)[0].name == "toy"
    (here / "report").mkdir()
    verify(lambda x: 0.1 * x, (2,), samples=4).write("report")
    assert (here / "report" / "report.json").is_file()


@pytest.mark.parametrize("command", ["train", "generate", "verify-bound"])
def test_a_foreign_folder_is_no_run_whatever_its_files_say(command, here, capsys):
    """Nothing is asked for what its configuration names, before it is known to be a run."""
    config = resolve_config(backend="toy", rewards=[CODE[1]])
    (here / "theirs").mkdir()
    (here / "theirs" / "config.toml").write_text(config.to_toml())
    code, _, err = run(capsys, command, "--resume", "theirs")
    assert code == 2
    assert err.startswith("hnkit: --resume theirs: no run is there (.hnkit-run is missing)")


def test_stopping_prints_the_command_that_goes_on(here, capsys, monkeypatch):
    """The whole line, as it stands on the terminal, is what a shell takes."""
    from hnkit.training.signals import StopSignals

    monkeypatch.setattr(StopSignals, "agreed", lambda *_: 2)
    arguments = ("train", "--backend", "toy", *QUICK_RUN, "--steps", "2", *CODE, "--out", "a; b")
    code, _, err = run(capsys, *arguments)
    assert code == 130
    monkeypatch.undo()
    monkeypatch.chdir(here)
    printed = " ".join(err.split()).partition("go on with hnkit ")[2]
    code, out, err = run(capsys, *shlex.split(printed), "--json")
    assert code == 0, err
    assert json.loads(out)["finished"]


def test_the_newest_run_is_the_one_that_was_begun_last(here):
    names = ["train-20260101-000000", "train-20260102-000000", "train-20260102-000000-2", "train-20260102-000000-10"]
    for name in [*names, "train-of-my-own", "train-20270101-000000-empty", "train-20280101-000000"]:
        (here / "runs" / name).mkdir(parents=True)
    (here / "runs" / "train-20290101-000000").symlink_to("nowhere")
    for age, name in enumerate([*names, "train-of-my-own"]):
        (here / "runs" / name / "config.toml").touch()
        os.utime(here / "runs" / name, (10**9 - age, 10**9 - age))  # looked at in the wrong order
    assert resumed_folder(NEWEST, None, "train", "config.toml") == Path("runs") / names[-1]
    with pytest.raises(InputError, match="no run under runs/"):
        resumed_folder(NEWEST, None, "compare", "plan.json")


@pytest.mark.parametrize("full", [OSError(errno.ENOSPC, "No space left on device", "x"), InputError("no such place")])
def test_what_was_verified_is_printed_even_where_it_cannot_be_written(full, here, capsys, monkeypatch):
    def fail(*_):
        raise full

    monkeypatch.setattr("hnkit.checks.report.Report.write", fail)
    code, out, err = run(capsys, *MAP, "mymaps:good", "--json")
    assert (code, err.count("\n")) == (2, 1)
    document = json.loads(out)
    assert document["finished"] is False
    assert Path(document["run_folder"]).is_dir(), "what was begun there can be gone on with"
    assert document["figures"]
    code, out, _ = run(capsys, *MAP, "mymaps:good")
    assert code == 2
    assert "KL (Stein form)" in out


NASTY = "\x1b]0;owned\x07\x1b[2Jclear\x9b31m\u202ereversed"


def test_little_memory_is_named_however_it_is_met():
    def wrapped(error):  # as a library does that imports lazily
        try:
            raise error
        except ImportError as cause:
            try:
                raise RuntimeError("Failed to import a.b (look up to see its traceback)") from cause
            except RuntimeError as outer:
                return outer

    library = ImportError("libx.so: failed to map segment from shared object")
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), library,
                  OSError(errno.ENOMEM, "Cannot allocate memory"), wrapped(library)):  # fmt: skip
        line, code = describe_error(error)
        assert code == 2
        assert line.startswith("out of memory: "), line
    assert describe_error(wrapped(ImportError("no module named x")))[0].startswith("internal error, RuntimeError")


def test_of_several_processes_that_see_the_same_bad_input_the_first_says_it(capsys, monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(workers, "_LONGEST_WAIT", 0.2)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    def said(rank, *arguments):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            cli.app(list(arguments))
        assert ended.value.code == 2
        return capsys.readouterr().err

    same = ("train", "--backend", "none-such")
    assert "none-such" in said("1", *same), "the first one has not said it"
    assert "none-such" in said("0", *same)
    assert said("1", *same) == ""
    assert "no-flag" in said("1", "train", "--no-flag"), "which the first one has not seen"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "none-such" in said("1", *same), "the first one of an earlier attempt"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert "none-such" in said("1", *same), "nobody keeps a store"


def test_a_limit_on_the_size_of_files_is_named():
    """A write names no file, which would leave a user with "file too large" and no idea of which."""
    line, code = describe_error(OSError(errno.EFBIG, "File too large", "runs/a/report.json"))
    assert code == 2
    assert line.startswith("file too large at runs/a/report.json: allow larger files (ulimit -f)")


def test_what_comes_from_files_cannot_drive_the_terminal(here, capsys, monkeypatch):
    (here / "a.toml").write_text(f"[train]\n{json.dumps(NASTY)} = 1\n", encoding="utf-8")
    code, _, err = run(capsys, "train", "--backend", "toy", "--config", "a.toml")
    assert code == 2
    assert not CONTROL.search(err)
    assert "owned" in err
    assert not CONTROL.search(describe_error(InputError(NASTY))[0])
    assert not CONTROL.search(describe_error(OSError(errno.EACCES, "denied", NASTY))[0])
    from hnkit.output import terminal

    terminal.print_json({"prompt": NASTY})
    out = capsys.readouterr().out
    assert not CONTROL.search(out)
    assert json.loads(out) == {"prompt": NASTY}
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = terminal.console()
    screen.print(terminal.simple_table(["name"], [[NASTY]]))
    screen.print(f"[bold]{NASTY}")
    screen.print("plain", style="bold")
    out = capsys.readouterr().out
    assert "\x1b[1m" in out  # the styles of hnkit itself stay
    assert not CONTROL.search(re.sub(r"\x1b\[[0-9;]*m", "", out))
    assert r"\x1b]0;owned" in out


def test_long_lines_are_cut_between_words():
    words = " ".join(f"word{k}" for k in range(1000))
    line, _ = describe_error(InputError(words))
    assert len(line) <= 600
    beginning, end = line.split(" ... ")
    assert words.startswith(f"{beginning} ")
    assert words.endswith(f" {end}")
    huge, _ = describe_error(InputError(f"--shape {'7' * 5000}: write positive integers"))
    assert huge.startswith("--shape 777")
    assert huge.endswith(": write positive integers")
    assert len(huge) <= 600
    for longest in range(20, 200, 7):
        assert len(shortened(words, longest)) <= longest
    assert shortened("short", 5) == "short"


def test_backends_lists_what_is_installed(here, capsys):
    code, out, _ = run(capsys, "backends", "--json")
    assert code == 0
    document = json.loads(out)
    assert "toy" in [entry["name"] for entry in document["backends"]]
    code, out, _ = run(capsys, "backends")
    assert code == 0
    assert "toy" in out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("a\nb"), 2, "a b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "no space left on device at /x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "permission denied at /x"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "read-only file system"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate: not enough memory"), 2, "out of memory"),
        (BrokenPipeError(), 2, "reader"),
        (ZeroDivisionError("oops"), 2, "internal error, ZeroDivisionError: oops"),
    ],
)
def test_every_error_becomes_one_line(error, code, words, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("hnkit.cli.verify_bound.loaded_subject", fail)
    found, out, err = run(capsys, "verify-bound")
    assert found == code
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


def test_debug_shows_the_traceback(here, capsys):
    code, _, err = run(capsys, *MAP, "mymaps:raises", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "mymaps.py" in err


def test_failing_check_is_exit_1(monkeypatch, here, capsys):
    from hnkit.checks import maps as map_checks

    wrong = map_checks.theorem7_bound
    monkeypatch.setattr(map_checks, "theorem7_bound", lambda dim, L: 1e-3 * wrong(dim, L))
    code, out, _ = run(capsys, "verify-bound", "--toy", "extremal", "--samples", "16")
    assert code == 1
    assert "✗ theorem-7" in out
    assert "1 fail" in out
    last = " ".join(" ".join(out.splitlines()[-10:]).split())
    assert "1 check fails, so that no figure of this run is to be trusted" in last


def hnkit(*arguments, **extra):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **extra}
    return subprocess.run(
        [sys.executable, "-m", "hnkit", *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


def test_help_imports_no_torch():
    for arguments in (["--help"], ["verify-bound", "--help"], ["train", "--help"], ["--version"], []):
        code = (
            f"import sys; sys.argv = ['hnkit', *{arguments!r}]\n"
            "from hnkit.cli import main\n"
            "try: main()\n"
            "except SystemExit as ended: assert not ended.code\n"
            "heavy = {'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


COMMANDS = {
    "verify-bound": verify_bound, "train": train, "generate": generate, "compare": compare, "frontier": frontier,
    "export": export, "push": push, "backends": backends,
}  # fmt: skip


def test_every_command_is_tried_here():
    assert set(COMMANDS) == set(typer.main.get_command(cli.app).commands)


def test_the_cards_of_a_plan_are_named_in_the_help():
    """The record of the command is read without the module of the cards, which takes long to import."""
    named = described(train.Options)["card"].partition("one of ")[2].partition(";")[0]
    assert named.split(", ") == [*CARDS]
    assert described(train.Options)["card"].split()[-1].rstrip(".") == train.CARD


def test_a_newcomer_is_told_where_to_start(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert out.rstrip().endswith("Start with: hnkit verify-bound, then hnkit train --backend digits")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_choices_defaults_and_an_example_and_no_python_types(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert f"Example: {COMMANDS[name].EXAMPLE}" in out  # whole on one line, to paste
    for word in ("<bool>", "<int>", "<str>", "<path>", "list["):
        assert word not in out
    text = " ".join(out.replace("│", " ").split())
    for record, item in offered(COMMANDS[name].Options):
        kind = field_types(record)[item.name]
        for choice in typing.get_args(next((k for k in (kind, *typing.get_args(kind)) if is_literal(k)), None)):
            assert choice in text
        if type(item.default) in (int, float):
            assert f"default: {item.default}" in text, item.name
        assert described(record)[item.name].split()[1].strip("`.,;") in text


def is_literal(kind):
    return typing.get_origin(kind) is Literal


def offered(record):
    """The settings that a command offers, with the record that declares them."""
    for item in dataclasses.fields(record):
        inner = item.metadata.get("record")
        if inner is None:
            yield record, item
        else:
            yield from ((inner, part) for part in dataclasses.fields(inner) if part.metadata.get("flags") is not None)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_each_command_is_one_that_it_takes(name, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(COMMANDS[name], "run", lambda options: seen.append(options) or 0)
    program, command, *arguments = shlex.split(COMMANDS[name].EXAMPLE)
    assert (program, command) == ("hnkit", name)
    assert run(capsys, command, *arguments)[0] == 0
    assert isinstance(seen[0], COMMANDS[name].Options)


def test_a_flag_is_one_field_of_a_record(capsys):
    """The name, the default, the help, the choices and the value of a flag all come from the one field."""

    @dataclass(frozen=True)
    class Options:
        """Bake.

        Attributes:
            oven_heat: how hot the `oven` is.
            shape: of the loaf.
            seed: a seed
                (repeatable).
        """

        oven_heat: int = setting(200, least=50)
        shape: Literal["round", "long"] | None = setting(None, flags=("--shape", "-s"))
        seed: tuple[str, ...] = setting(())

    seen = []
    module = SimpleNamespace(Options=Options, EXAMPLE="", run=lambda options: seen.append(options) or 3)
    app = typer.Typer(add_completion=False)
    app.command()(command(module))
    for arguments, wanted in (
        ([], Options()),
        (["--oven-heat", "9", "-s", "long"], Options(9, "long")),
        (["--seed", "rye", "--seed", "oat"], Options(seed=("rye", "oat"))),
    ):
        with pytest.raises(SystemExit) as ended:
            app(arguments)
        assert ended.value.code == 3
        assert seen.pop() == wanted
    with pytest.raises(SystemExit) as ended:
        app(["--shape", "square"])
    assert ended.value.code == 2
    with pytest.raises(SystemExit):
        app(["--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "How hot the oven is; at least 50. [default: 200]" in out
    assert "Of the loaf; one of round, long." in out
    assert "A seed (repeatable)." in out


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("frontier", "--backend digits --adapter 'a b/c' --reward redness=1 --reward judge=2 --samples 4 --set a.b=1"),
        ("verify-bound", "--toy fold --toy rotation --certify --rel-error 0.01 --seed 3 --method low-rank"),
        ("verify-bound", "--map m:f --shape 3,4,4 --injection 0.5 --max-delta 2.5 --samples 9"),
        ("generate", "--backend digits --prompt 'a three' --prompt \"two o'clock\" --count 3 --layout geneval"),
        ("train", "--backend toy --kl exact --alpha 0.3 --steps 7 --reward m:f=2 --heldout g=1 --preset item-e"),
    ],
)
def test_a_command_is_written_as_it_is_read(name, line, capsys, monkeypatch):
    """What a report prints as the command that makes it again is read as the same options, output apart."""
    seen = []
    monkeypatch.setattr(COMMANDS[name], "run", lambda options: seen.append(options) or 0)
    assert run(capsys, name, *shlex.split(line), "--out", "somewhere", "--json")[0] == 0
    program, *again = shlex.split(command_line(name, seen[0]))
    assert (program, len(again)) == ("hnkit", 1 + len(shlex.split(line)))
    assert run(capsys, *again)[0] == 0
    assert seen[1] == dataclasses.replace(seen[0], out=None, as_json=False)


def test_the_command_in_a_report_makes_it_again(here, capsys):
    """The page of a map, a table of rewards and a training, and what the command in each page makes."""
    Path("scores.csv").write_text(
        "prompt,method,reward\n" + "".join(f"p{n % 3},{'ab'[n % 5 == 0]},{n % 7}\n" for n in range(60))
    )
    toy = ("train", "--backend", "toy", "--steps", "2", "--seed", "3", "--reward", "mymaps:score=2")
    for number, arguments in enumerate(
        ((*MAP, "mymaps:good", "--seed", "4"), ("frontier", "--rewards", "scores.csv", "--base", "a"), toy)
    ):
        folder = Path(f"run{number}")
        assert run(capsys, *arguments, "--out", folder)[0] == 0
        page = html.unescape((folder / "report.html").read_text())
        _, *words = shlex.split(re.search("Reproduce</h2>.*<pre>(.*)</pre>", page)[1])
        if arguments is toy:
            words[words.index("--config") + 1] = str(folder / "config.toml")
        assert run(capsys, *words, "--out", f"again{number}")[0] == 0
        first, second = ((Path(name) / "report.json").read_text() for name in (folder, f"again{number}"))
        assert first == second


def test_the_command_of_the_contributors_page_works(capsys):
    page = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = page.partition("## Adding a flag")[2].partition("```python\n")[2].partition("```")[0]
    module = ModuleType("weigh")
    sys.modules["weigh"] = module
    exec(block, module.__dict__)
    app = typer.Typer(add_completion=False)
    app.command()(command(module))
    for arguments, said in (
        (shlex.split(module.EXAMPLE)[2:], "2 times 3 gram"),
        (["--unit", "ounce"], "1 times 3 ounce"),
    ):
        with pytest.raises(SystemExit) as ended:
            app(arguments)
        assert ended.value.code == 0
        assert said in capsys.readouterr().out
    del sys.modules["weigh"]
    with pytest.raises(SystemExit):
        app(["--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "What the weight is told in; one of gram, ounce. [default: gram]" in out


def test_choices_are_the_librarys():
    assert set(typing.get_args(typing.get_args(field_types(verify_bound.Options)["method"])[0])) == set(METHODS)
    assert typing.get_args(typing.get_args(field_types(GenerateSettings)["layout"])[0]) == tuple(LAYOUTS)


def test_runs_as_a_module_and_survives_a_c_locale(tmp_path):
    done = hnkit(
        "verify-bound", "--toy", "extremal", "--samples", "8", "--out", str(tmp_path / "run"), LC_ALL="C",
        PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "local norm" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Theorem 7" in page
    assert "<script" not in page


def test_closed_stdout_is_quiet(tmp_path):
    command = f"{sys.executable} -m hnkit verify-bound --toy extremal --samples 8 --out {tmp_path / 'run'} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("asked", [(), ("--out", "there/new")])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(asked, here, capsys, monkeypatch):
    import hnkit.cli.folders

    place = here / "there" if asked else here
    place.mkdir(exist_ok=True)
    (here / "scores.csv").write_text("prompt,method,reward\na,base,1\n")  # of which nothing can be made
    plain = os.access
    monkeypatch.setattr(hnkit.cli.folders.os, "access", lambda path, mode: Path(path) != place and plain(path, mode))
    for words in (("verify-bound", "--toy", "rotation"), ("frontier", "--rewards", "scores.csv")):
        code, out, err = run(capsys, *words, *asked)
        assert (code, out) == (2, "")
        assert f"cannot be created, {place} is read-only: " in err
        assert ("choose a folder with --out" in err) is not bool(asked)


def test_read_only_folder_is_named(here, capsys, monkeypatch):
    def refuse(self, parents=False, exist_ok=False, mode=0o777):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = run(capsys, *MAP, "mymaps:good", "--out", "somewhere/new")
    assert code == 2
    assert "somewhere/new" in err


def test_a_run_that_was_moved_is_no_matter_of_a_configuration(here, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.app(["train", "--resume", "moved"])
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert "--resume moved: no run is there" in said
    assert "TOML" not in said


def test_a_working_directory_that_was_deleted_is_named(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit) as ended:
        cli.app(["verify-bound", "--map", "torch:sin", "--shape", "2"])
    assert ended.value.code == 2
    assert "the working directory cannot be found (no such file or directory): change to" in capsys.readouterr().err
