"""The distribution: what wheel and sdist hold, and that hnkit works beside foreign packages called toy and scaled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"hnkit": "hnkit", "toy": "hnkit/toy", "scaled": "hnkit/scaled"}
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "site", "*.pyc")


def run(*command: str, folder: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, built from a copy of the sources so that nothing is left in them."""
    copy = tmp_path_factory.mktemp("sources") / "hnkit"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('out')", folder=copy)
    (found,) = (copy / "out").glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory) -> Path:
    """The wheel, built from the source distribution alone."""
    place = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (source,) = place.iterdir()
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "out", ".", folder=source)
    (found,) = (source / "out").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    """A folder with the wheel's contents: what `pip install hnkit` puts on the path."""
    place = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A working folder with other people's `toy` and `scaled`."""
    place = tmp_path_factory.mktemp("foreign")
    (place / "toy.py").write_text("OWNER = 'someone else'\n")
    (place / "scaled").mkdir()
    (place / "scaled" / "__init__.py").write_text("OWNER = 'someone else'\n")
    return place


def sources() -> dict[str, Path]:
    """Files of the three folders by the place the wheel has them in."""
    found = {}
    for folder, target in FOLDERS.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                found[f"{target}/{file.relative_to(ROOT / folder).as_posix()}"] = file
    return found


def test_the_wheel_holds_hnkit_alone_with_every_file_of_the_three_folders(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    top = {name.split("/")[0] for name in held}
    assert {name for name in top if not name.endswith(".dist-info")} == {"hnkit"}
    (metadata,) = top - {"hnkit"}
    assert held[f"{metadata}/top_level.txt"].decode().split() == ["hnkit"]
    packaged = {name for name in held if name.startswith("hnkit/")}
    assert packaged == set(sources())
    for name in ("hnkit/py.typed", "hnkit/__init__.pyi", "hnkit/scaled/digits/model/SHA256SUMS"):
        assert held[name] == sources()[name].read_bytes()
    assert all(held[name] == file.read_bytes() for name, file in sources().items())


def test_the_wheel_describes_itself_without_the_repository(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    assert "# hnkit" in text
    assert "Description-Content-Type: text/markdown" in text
    assert "](docs/" not in text


def test_the_sdist_holds_what_tests_and_proofs_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    texts = ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "README.md")
    tools = ("noxfile.py", "constraints.txt", "proofs/run.py", "tests/test_install.py", "docs/stub.py")
    for path in (*texts, *tools):
        assert path in held
    assert {file.relative_to(ROOT).as_posix() for file in sources().values()} <= held


ORIGIN = """
import json, runpy, sys
import toy, scaled, hnkit.toy, hnkit.scaled.pipelines.options as options
assert toy.OWNER == scaled.OWNER == "someone else"
assert hnkit.toy.PROBLEMS
print(json.dumps([hnkit.__file__, hnkit.toy.__file__, options.__file__]))
sys.argv = ["hnkit", "backends", "--json"]
runpy.run_module("hnkit", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_imports_and_commands_beside_a_foreign_toy_and_scaled(kind: str, foreign: Path, request) -> None:
    path = request.getfixturevalue("installed") if kind == "wheel" else None
    places, listed = run("-c", ORIGIN, folder=foreign, path=path).split("\n", 1)
    home = {name: ROOT / name if path is None else path / target for name, target in FOLDERS.items()}
    expected = [home["hnkit"] / "__init__.py", home["toy"] / "__init__.py", home["scaled"] / "pipelines" / "options.py"]
    assert [Path(place) for place in json.loads(places)] == expected
    assert {"toy", "digits", "sana"} <= set(json.dumps(json.loads(listed)).replace('"', " ").split())


def test_torchrun_finds_the_module_beside_a_foreign_toy_and_scaled(foreign: Path) -> None:
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    assert "verify-bound" in run(*start, "-m", "hnkit", "--help", folder=foreign)


def test_coverage_measures_the_three_folders(tmp_path: Path) -> None:
    data = tmp_path / "coverage"
    script = tmp_path / "imports.py"
    script.write_text("import hnkit.toy.numerics, hnkit.scaled.pipelines.options, hnkit.internal.values\n")
    run("-m", "coverage", "run", f"--data-file={data}", str(script), folder=ROOT)
    report = tmp_path / "report.json"
    run("-m", "coverage", "json", "-q", f"--data-file={data}", "-o", str(report), folder=ROOT)
    files = json.loads(report.read_text())["files"]
    for name in ("hnkit/internal/values.py", "toy/numerics.py", "scaled/pipelines/options.py"):
        assert files[name]["summary"]["covered_lines"] > 0
    assert {name.split("/")[0] for name in files} == {"hnkit", "toy", "scaled"}
