"""requirements.lock is constraints.txt with a hash for every file, and torch in the one version that is supported."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lock():
    spec = importlib.util.spec_from_file_location("lock", ROOT / "docs" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lock_has_the_pins_and_no_others(lock):
    assert lock.differences() == []  # else run docs/lock.py
    assert lock.locked()["torch"] == "2.13.0"
    assert {"pip", "setuptools", "wheel"} <= lock.locked().keys()  # what installs the others, and builds hnkit


def test_every_line_is_an_exact_pin_with_a_hash():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 100
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+ --hash=sha256:[0-9a-f]{64}", line) for line in pins)


def test_what_is_missing_or_of_another_version_is_named(lock, monkeypatch):
    name, version = next(iter(lock.locked().items()))
    monkeypatch.setattr(lock, "wanted", lambda: [f"{name}=={version}.1", "new-one==1"])
    found = lock.differences()
    assert f"{name}=={version}.1 is {version}" in found
    assert "new-one==1 is missing" in found
    assert "torch is not in constraints.txt" in found


def test_a_file_without_a_hash_is_named_and_nothing_is_written(lock):
    archive = {"url": "https://example.org/a.whl", "archive_info": {"hashes": {"md5": "0"}}}
    entry = {"metadata": {"name": "a", "version": "1"}, "download_info": archive}
    with pytest.raises(SystemExit, match=r"a: https://example\.org/a\.whl has no SHA-256"):
        lock._hash_of(entry)
    archive["archive_info"]["hashes"]["sha256"] = "1f"
    assert lock._hash_of(entry) == "1f"


class Session:
    """A session of nox that notes what it is told to install; pip's report says that torch is of this build."""

    def __init__(self, folder: Path, torch: str) -> None:
        self.folder, self.torch = folder, torch
        self.env, self.warned, self.installed = {}, [], []

    def create_tmp(self) -> str:
        return str(self.folder)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def install(self, *words: str) -> None:
        if "--dry-run" in words:
            report = {"install": [{"metadata": {"name": "torch", "version": self.torch}}]}
            Path(words[words.index("--report") + 1]).write_text(json.dumps(report))
        else:
            self.installed.append(words)


@pytest.fixture
def noxfile(monkeypatch):
    """noxfile.py, beside a nox of which it takes the decorator alone; on the platform of the lock."""
    stub = types.ModuleType("nox")
    stub.session, stub.options, stub.Session = (lambda function: function), types.SimpleNamespace(), Session
    monkeypatch.setitem(sys.modules, "nox", stub)
    monkeypatch.chdir(ROOT)
    for name, value in {
        "system": "Linux", "libc_ver": ("glibc", "2.35"), "machine": "x86_64", "python_implementation": "CPython",
        "python_version_tuple": ("3", "11", "7"),
    }.items():  # fmt: skip
        monkeypatch.setattr(platform, name, lambda value=value: value)
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_is_checked_where_the_lock_is_for(noxfile, lock, tmp_path):
    session = Session(tmp_path, "2.13.0+cpu")
    assert noxfile._install_locked(session)
    assert not session.warned
    packages, project = session.installed
    assert {"--require-hashes", "--no-deps"} <= set(packages)
    text = (tmp_path / "pins.txt").read_text()
    assert packages[-2:] == ("-r", str(tmp_path / "pins.txt"))
    assert {line.split("==")[0] for line in text.splitlines() if "--hash=sha256:" in line} >= {"torch", "pip", "numpy"}
    assert project[-3:] == ("--no-build-isolation", "-e", ".")


def test_another_build_of_torch_is_installed_by_its_version_and_that_is_said(noxfile, tmp_path):
    session = Session(tmp_path, "2.13.0")
    assert noxfile._install_locked(session)
    assert [text for text in session.warned if "its hash is not checked" in text and "torch 2.13.0 " in text]
    torch, packages, _ = session.installed
    assert torch == ("-q", "-c", "constraints.txt", "torch")
    assert "--require-hashes" in packages
    pins = (tmp_path / "pins.txt").read_text()
    assert "\ntorch==" not in pins
    assert "numpy==" in pins


@pytest.mark.parametrize(
    ("name", "value"),
    [("machine", "aarch64"), ("system", "Darwin"), ("python_version_tuple", ("3", "12", "1")), ("libc_ver", ("", ""))],
)
def test_on_another_platform_versions_are_pinned_and_that_is_said(name, value, noxfile, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, name, lambda: value)
    session = Session(tmp_path, "2.13.0+cpu")
    assert not noxfile._install_locked(session)
    assert not session.installed
    assert len(session.warned) == 1
    assert "no hash is checked" in session.warned[0]
    session.install = lambda *words: session.installed.append(words)
    noxfile._install(session, "testing", "pytest")
    assert session.installed == [("-q", "-c", "constraints.txt", "-e", ".[testing]", "pytest")]


def test_a_file_of_another_hash_ends_the_session(noxfile, tmp_path, monkeypatch):
    session = Session(tmp_path, "2.13.0+cpu")

    def install(*words):
        if "--require-hashes" in words:
            raise RuntimeError("THESE PACKAGES DO NOT MATCH THE HASHES")
        Session.install(session, *words)

    monkeypatch.setattr(session, "install", install)
    with pytest.raises(RuntimeError, match="DO NOT MATCH"):
        noxfile._install_locked(session)


def test_every_check_besides_the_tests_runs_in_one_environment(noxfile, tmp_path, monkeypatch):
    session, ran = Session(tmp_path, "2.13.0+cpu"), []
    session.posargs, session.run = (), lambda *words, **_: ran.append(" ".join(words[:2]))
    monkeypatch.setattr(noxfile, "_install_prover", lambda _: ran.append("prover"))
    noxfile.checks(session)
    assert ran == [
        "prover", "ruff check", "ruff format", "mypy", "pip-audit --requirement", "python docs/audit.py",
        "python proofs/coq/check.py", "python proofs/run.py",
    ]  # fmt: skip
    assert len(session.installed) == 2
    pins = (tmp_path / "pins.txt").read_text()
    assert all(f"\n{tool}==" in pins for tool in ("ruff", "mypy", "pip_audit", "pytest-xdist", "sympy", "mpmath"))
    assert (tmp_path / "types" / "hnkit" / "toy").resolve() == ROOT / "toy"


def test_the_gate_runs_the_tests_as_the_readme_does_and_every_check():
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("not a checkout: hidden files are not part of the source distribution")
    tests = re.search(r"nox -s tests$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert tests
    called = [line for line in script.read_text(encoding="utf-8").splitlines() if "nox -s" in line]
    assert called == [f".venv/bin/{tests[0]}", ".venv/bin/nox -s checks"]
