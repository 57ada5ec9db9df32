"""Run folders in which anything has been exchanged: nothing outside is touched, nothing hangs, the answer is one line.

Each file and folder of an unfinished run, however deep, is replaced in turn by a symbolic link, a hard link, a dangling
link, a pipe, a folder or a file, and the run is gone on with; each string in its documents is spoilt in turn. Some of
these are in the plain run, all of them are marked slow.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import hnkit.checks.parts
import hnkit.scaled.compare.nats
from hnkit.cli import app as cli
from hnkit.errors import InputError
from hnkit.generate import SEAL, TEXT
from hnkit.internal.files import file_digest, sealed
from hnkit.internal.folders import MANIFEST, STATE, TENSORS
from hnkit.internal.values import CONTROL
from hnkit.scaled.compare import COMPARISON
from hnkit.training.checkpoint import _manifest
from tests.hnkit.fake_backend import FakeBackend, FakeFactory, Options
from tests.hnkit.training.training_runs import fake_config, interrupt_after, resume, run

VICTIM = "export A=1\n"
PATIENCE = 90


@pytest.fixture(scope="module")
def fake_everywhere() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        here = ("hnkit.backend", "hnkit.adapters", "hnkit.training.session")
        comparison = (f"hnkit.scaled.compare.{name}" for name in ("run", "settings", "networks"))
        for module in (*here, *comparison):
            patch.setattr(f"{module}.backend_factory", lambda _: FakeFactory())
        patch.setattr("hnkit.cli.compare.comparison_runner", lambda _: COMPARISON)
        yield


def command(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.app(list(arguments))
    return int(ended.value.code or 0)


def begun_training(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGTERM)
        run(fake_config(checkpoint_every=2, validate_every=2, measure_every=2), folder)


def training_goes_on(folder: Path) -> int:
    try:
        resume(fake_config(checkpoint_every=2, validate_every=2, measure_every=2), folder)
    except (InputError, OSError) as error:  # as the command line says it
        line, code = cli.describe_error(error)
        print(line, file=sys.stderr)
        return code
    return 0


def begun_images(folder: Path) -> None:
    backend = FakeBackend(Options())
    backend.save_adapter(folder.parent / "mine")
    asked = ("--adapter", str(folder.parent / "mine"), "--prompt", "a cat", "--prompt", "a dog", "--count", "1")
    assert command("generate", "--backend", "fake", *asked, "--out", str(folder)) == 0
    for name in (TEXT, SEAL):
        (folder / "prompt-001" / name).unlink()
    (folder / "report.json").unlink()


def begun_checks(folder: Path) -> None:
    plain, calls = hnkit.checks.parts.write_sealed, iter(range(100))

    def cut_short(path: Path, content: dict) -> None:
        if next(calls) == 12:
            raise KeyboardInterrupt
        plain(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hnkit.checks.parts, "write_sealed", cut_short)
        asked = ("--map", "torch:sin", "--shape", "2", "--samples", "4")
        assert command("verify-bound", *asked, "--out", str(folder)) == 130


COMPARED = (
    "--methods", "base,hypernoise,best-of-n", "--seeds", "1",
    *(word for override in (
        "compare.best_of=2", "compare.steps=[1]", "compare.diversity_prompts=1", "compare.diversity_seeds=2",
        "compare.measure_samples=2", "compare.grid=1", "compare.train_steps=2", "compare.ranks=[]", "compare.losses=[]",
        "train.batch=2", "train.checkpoint_every=1", "train.measure_samples=2", "train.validate_samples=2",
    ) for word in ("--set", override)),
)  # fmt: skip


def begun_comparison(folder: Path) -> None:
    """One network is trained, some blocks of its KL are measured, and no report is written."""
    plain, calls = hnkit.scaled.compare.evaluation.write_sealed, iter(range(100))

    def cut_short(path: Path, content: dict) -> None:
        if "blocks-of" in str(path) and next(calls) == 2:
            raise KeyboardInterrupt
        plain(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hnkit.scaled.compare.evaluation, "write_sealed", cut_short)
        assert command("compare", "--backend", "fake", *COMPARED, "--out", str(folder)) == 130


RUNS: dict[str, tuple[Callable[[Path], None], Callable[[Path], int]]] = {
    "train": (begun_training, training_goes_on),
    "generate": (begun_images, lambda folder: command("generate", "--resume", str(folder))),
    "verify-bound": (
        begun_checks, lambda folder: command("verify-bound", "--map", "torch:sin", "--resume", str(folder))
    ),
    "compare": (
        begun_comparison, lambda folder: command("compare", "--backend", "fake", "--resume", str(folder))
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory, fake_everywhere) -> dict[str, Path]:
    """An unfinished run of each command."""
    found = {}
    for name, (begin, _) in RUNS.items():
        found[name] = tmp_path_factory.mktemp(name) / "run"
        begin(found[name])
    return found


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def hard_link(path: Path, victim: Path) -> None:
    if victim.is_dir():
        pytest.skip("folders have no hard links")
    os.link(victim, path)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "link": link,
    "hard link": hard_link,
    "dangling link": lambda path, victim: path.symlink_to(victim.with_name("absent")),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "pipe": lambda path, _: os.mkfifo(path),
    "folder": lambda path, _: path.mkdir(),
    "file": lambda path, _: path.write_text("{}"),
}


PLAIN = {"train": 1, "generate": 2, "verify-bound": 2, "compare": 1}
"""How many places are tried for each kind in the plain run; each kind has others."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUNS)
def test_what_was_exchanged_leads_nowhere(name, kind, begun, tmp_path, capsys):
    """The share of the plain run: a few places a kind, spread over the folder."""
    places = all_places(begun[name])
    step, first = len(places) // PLAIN[name], 5 * [*KINDS].index(kind)
    chosen = [places[(first + turn * step) % len(places)] for turn in range(PLAIN[name])]
    require_harmless(name, kind, begun[name], chosen, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUNS)
def test_whatever_was_exchanged_nothing_outside_is_touched(name, kind, begun, tmp_path, capsys):
    places = all_places(begun[name])
    assert len(places) > 8
    require_harmless(name, kind, begun[name], places, tmp_path, capsys)


def all_places(run: Path) -> list[Path]:
    return sorted(path.relative_to(run) for path in run.rglob("*"))


def require_harmless(name: str, kind: str, run: Path, places: list[Path], tmp_path: Path, capsys) -> None:
    """Exchange what lies at each of the places, go on, and look at the answer and at what lies outside."""
    victim_file, victim_folder = tmp_path / "outside" / "profile", tmp_path / "outside" / "folder"
    victim_folder.mkdir(parents=True)
    victim_file.write_text(VICTIM)
    (victim_folder / "precious").write_text(VICTIM)
    wrong = []
    for number, place in enumerate(places):
        folder = shutil.copytree(run, tmp_path / str(number))
        path = folder / place
        victim = victim_folder if path.is_dir() else victim_file
        if victim is victim_folder and kind == "hard link":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        KINDS[kind](path, victim)
        code, said = gone_on_with(RUNS[name][1], folder, capsys)
        lines = [line for line in said.splitlines() if name != "compare" or line.startswith("hnkit: ")]  # no progress
        if code not in (0, 2) or "internal error" in said or "Traceback" in said or len(lines) > 3 - code:
            wrong.append(f"{place}: {code} {said}")
        outside = {p.name: p.read_text() for p in (tmp_path / "outside").rglob("*") if p.is_file()}
        if outside != {"profile": VICTIM, "precious": VICTIM}:
            wrong.append(f"{place}: outside are {outside}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


def gone_on_with(go_on: Callable[[Path], int], folder: Path, capsys) -> tuple[int, str]:
    """The exit code, and what was said; 99 where it hangs."""

    class Hangs(BaseException):
        pass

    def give_up(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        code = go_on(folder)
    except Hangs:
        code = 99
    except Exception as error:  # noqa: BLE001 - a finding
        return 98, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(True)
    return code, capsys.readouterr().err


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj.exe$(touch owned);`touch owned`"


def test_a_string_of_a_received_folder_reaches_no_terminal_as_it_is(begun, tmp_path, capsys):
    """The share of the plain run: one string of each file or folder directly in a run, another one each."""
    areas: dict[tuple[str, str], list[tuple[str, Path, str]]] = {}
    for found in all_spoilt(begun):
        areas.setdefault((found[0], found[1].parts[0]), []).append(found)
    chosen = [found[7 * number % len(found)] for number, (_, found) in enumerate(sorted(areas.items()))]
    assert len(chosen) > 8
    require_quiet(chosen, begun, tmp_path, capsys)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Pictures are made, and not drawn, which is most of the time; the share of the plain run draws them."""
    draw = "matplotlib.backends.backend_agg.FigureCanvasAgg.draw"
    monkeypatch.setattr(draw, lambda canvas: canvas.get_renderer())


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", RUNS)
def test_no_string_of_a_received_folder_reaches_the_terminal_as_it_is(name, begun, tmp_path, capsys):
    """Each string of each JSON and TOML file of each run, spoilt in turn."""
    found = [spoilt for spoilt in all_spoilt(begun) if spoilt[0] == name]
    assert len(found) > 10
    require_quiet(found, begun, tmp_path, capsys)


def require_quiet(found: list[tuple[str, Path, str]], begun: dict[str, Path], tmp_path: Path, capsys) -> None:
    """Go on with each run of which a document was spoilt, and look at what is said."""
    wrong = []
    for number, (name, place, spoilt) in enumerate(found):
        folder = shutil.copytree(begun[name], tmp_path / f"{name}-{number}")
        (folder / place).write_text(spoilt, encoding="utf-8")
        if place.name == STATE:  # as somebody would forge it
            parts = {part: file_digest(folder / place.with_name(part)) for part in (TENSORS, STATE)}
            (folder / place.with_name(MANIFEST)).write_bytes(_manifest(parts))
        code, said = gone_on_with(RUNS[name][1], folder, capsys)
        if (
            code not in (0, 1, 2) or "internal error" in said or CONTROL.search(said)
        ):  # 1: a forged part may fail a check
            wrong.append(f"{name} {place}: {code} {said!r}\n{spoilt[:300]}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.rglob("owned"))


def all_spoilt(begun: dict[str, Path]) -> list[tuple[str, Path, str]]:
    """Of each run, each document, and each string of it: the document with that string spoilt.

    Of checkpoints before the newest, which nobody reads while that one is whole, one string a document.
    """
    found = []
    for name, folder in begun.items():
        newest = max(folder.glob("checkpoints/step-*"), default=folder)
        for source in sorted(folder.rglob("*.[jt][so][om][nl]")):
            unread = source.parent.match("checkpoints/step-*") and source.parent != newest
            documents = spoilt_documents(source)
            found += [
                (name, source.relative_to(folder), spoilt)
                for spoilt in (itertools.islice(documents, 1) if unread else documents)
            ]
    return found


def spoilt_documents(source: Path) -> Iterator[str]:
    """The document with one string after the other spoilt, sealed anew where it was sealed; of TOML, each value."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".toml":
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line.endswith('"'):
                quoted = json.dumps(ESCAPES)
                yield "\n".join([*lines[:number], f"{line.partition('=')[0]}= {quoted}", *lines[number + 1 :], ""])
        return
    document = json.loads(text)
    is_sealed = isinstance(document, dict) and set(document) == {"sha256", "content"}
    for spoilt in spoilt_values(document["content"] if is_sealed else document):
        yield json.dumps(sealed(spoilt) if is_sealed else spoilt)


def spoilt_values(value: object) -> Iterator[object]:
    """The document with each of its strings and keys spoilt, one after the other."""
    if isinstance(value, str):
        yield ESCAPES
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield {(ESCAPES if name == key else name): old for name, old in value.items()}
            yield from ({**value, key: spoilt} for spoilt in spoilt_values(entry))
    elif isinstance(value, list):
        for place, entry in enumerate(value[:3]):
            yield from ([*value[:place], spoilt, *value[place + 1 :]] for spoilt in spoilt_values(entry))
