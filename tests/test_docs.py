"""README, docs and docstrings are executed; generated tables are current; every link leads somewhere."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import pkgutil
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hnkit
from hnkit import toy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
MODULES = sorted(
    module.name
    for package in (hnkit, toy)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if module.name not in ("hnkit.__main__", "hnkit.cli")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__docs__"}
    here = stand_ins(tmp_path) if page.name == "real-models.md" else {}
    for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), start=1):
        for there, here_ in here.items():
            block = block.replace(there, here_)
        exec(compile(block, f"{page.name} block {number}", "exec"), namespace)


def test_the_output_in_the_readme_is_that_of_its_code(capsys):
    """The block of text after the code is what the code prints, to the digits that another processor keeps."""
    code, printed = re.search(
        r"^```python\n(.*?)^```\n+```text\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    ).groups()
    exec(compile(code, "README.md", "exec"), {"__name__": "__docs__"})
    assert capsys.readouterr().out == printed


def test_the_verdict_in_the_readme_is_that_of_its_map():
    torch.manual_seed(0)
    f = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16)).double()
    for layer in (f[0], f[2]):
        torch.nn.init.orthogonal_(layer.weight, gain=0.8)
    assert str(hnkit.verify_bound(f, (16,)).card) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_on_an_index_links_nowhere_relative():
    """An index shows the README without the repository: a relative link there leads nowhere, a picture is missing."""
    spec = importlib.util.spec_from_file_location("index_readme", ROOT / "docs" / "index_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.for_an_index((ROOT / "README.md").read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert any(link.startswith("https://arxiv.org/") for link in links)
    assert [link for link in links if not link.startswith("https://")] == []
    assert "docs/digits.md" in text, "what a link named is still named"
    assert "![" not in text


def stand_ins(folder: Path) -> dict[str, str]:
    """A tiny checkpoint of the real classes and a trained adapter of it where a page's code names real ones."""
    pytest.importorskip("diffusers")
    from hnkit.backend import backend_factory
    from tests.scaled import tiny
    from tests.scaled.conftest import perturb

    model = tiny.build("sana", folder / "model")
    factory = backend_factory("sana")
    backend = factory.load(factory.options(**tiny.options("sana", model)))
    perturb(backend, 0.03)
    backend.save_adapter(folder / "runs" / "red" / "adapter")
    return {
        "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers": str(model),
        '.to("cuda")': "",
        'Generator("cuda")': "Generator()",
    }


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_generated_tables_are_current():
    result = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx")
    out = tmp_path_factory.mktemp("docs") / "site"
    result = subprocess.run(
        [sys.executable, "docs/build.py", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return out


def test_links_of_the_site_lead_somewhere(site):
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#:?]+)(?:[#?][^"]*)?"', page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pages_of_reports_are_shown_at_the_width_of_the_reader(site):
    """On a telephone stands the narrow picture in the place of the wide one; flags stand with their values."""
    page = (site / "docs" / "gallery.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img[^>]*class="(on-\w+)"[^>]*src="[^"]*/(\w+)-(\w+)\.png"', page)
    assert {kind for kind, _, _ in shown} == {"on-desk", "on-telephone"}
    assert all((kind == "on-desk") == (width == "wide") for kind, _, width in shown)
    assert len({name for kind, name, _ in shown if kind == "on-telephone"}) == 5
    commands = re.sub("<[^>]+>", "", (site / "reference" / "commands.html").read_text(encoding="utf-8"))
    assert "--map PKG.MOD:F" in commands
    assert "--verbose, -v\n" in commands
    robustness = (site / "docs" / "robustness.html").read_text(encoding="utf-8")
    assert '<td class="sentence"' in robustness
    assert not re.search(r"\\\|", commands + robustness)


def test_figures_of_the_site_stay_on_one_line(site):
    """`0.66 ± 0.10` and `45 %` are held together by no-break spaces, everywhere but in what is to be copied."""
    for name in ("index", "docs/earning", "docs/digits"):
        text = re.sub(r"(?s)<pre>.*?</pre>|<[^>]+>", "", (site / f"{name}.html").read_text(encoding="utf-8"))
        assert "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}" in text, name
        assert not re.search(r"\d (?:± \d|%)", text), name


def test_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8"))
        assert not loaded, f"{page.name}: {loaded}"


def test_site_has_every_public_name(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as stream:
        inventory = InventoryFile.load(stream, "", posixpath.join)
    kinds = ("py:function", "py:class", "py:exception", "py:data", "py:attribute")
    described = {name for kind in kinds for name in inventory.get(kind, ())}
    homes = {name: f"hnkit.{home}" for name, home in hnkit._HOME.items()}
    missing = {
        name
        for name, home in homes.items()
        if not {f"{home}.{name}", f"{getattr(getattr(hnkit, name), '__module__', home)}.{name}"} & described
    }
    assert not missing


def test_site_has_every_key_and_flag(site):
    from hnkit.config import TrainConfig

    configuration = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    for item in dataclasses.fields(TrainConfig):
        assert f">{item.name}<" in configuration
    for row in re.findall(r"(?s)<tr.*?</tr>", configuration):  # two columns, which a telephone shows side by side
        assert len(re.findall(r"<t[dh]", row)) == 2
    words = re.sub("<[^>]+>", "", configuration)
    assert "optimiser steps; at least 1. An integer, default 1000" in words
    assert not re.search(r"\*[A-Z]", words)
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    help_text = subprocess.run(
        [sys.executable, "-m", "hnkit", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for flag in set(re.findall(r"--[a-z][a-z-]+", help_text)) - {"--help"}:
        assert flag in commands, flag


def test_what_is_said_of_an_attribute_is_not_taken_for_its_type(site):
    """A sentence with a colon below a constant is a sentence; napoleon would make a type of what stands before it."""
    page = re.sub("<[^>]+>", "", (site / "reference" / "hnkit.kl.html").read_text(encoding="utf-8"))
    assert "Samples below which no coefficient is fitted: one from a handful of others is noise." in page
    for page in (site / "reference").glob("hnkit*.html"):
        assert ">Type<" not in page.read_text(encoding="utf-8"), page.name


def test_site_says_what_packages_say_of_their_modules(site):
    """Which source of a setting wins, above all, where settings are looked up and where they are described."""
    for page in ("configuration", "hnkit.config"):
        text = re.sub("<[^>]+>", "", (site / "reference" / f"{page}.html").read_text(encoding="utf-8"))
        assert "Later sources win: the dataclasses’ defaults, the backend’s preset" in text, page
        assert "Bases: object" not in text


def test_the_package_speaks_of_itself():
    """No path of a machine and no registry host in what is shipped."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout: nothing says which files are shipped")
    forbidden = re.compile(r"/(?:work/|opt/dev|root/)|pypi\.org|pythonhosted|registry\.npmjs|deb\.debian")
    for name in listed:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".v", ".html"} and path != Path(__file__):
            found = forbidden.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found}"


def test_a_percent_sign_is_written_one_way():
    """`95 %`, as tables and verdicts have it, in every text of the project; style sheets write their own."""
    glued = re.compile(r"[0-9}]%(?![a-zA-Z(0-9{])|:[+,0-9]*\.[0-9]%\}|(?<=\d )percent of")
    assert all(map(glued.search, ("misses 47% of it", 'f"{share:.0%} of it"', "7.3 percent of |f|²")))
    for folder in ("hnkit", "toy", "scaled", "docs", "proofs", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".md", ".ipynb"}:
                for line in path.read_text(encoding="utf-8").splitlines():
                    assert not glued.search(re.sub(r"(?:width: |max\()100%", "", line)), f"{path}: {line}"
    for page in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        assert not glued.search((ROOT / page).read_text(encoding="utf-8")), page


@pytest.fixture(scope="module")
def notebook():
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_runs_and_shows_what_is_stored(notebook):
    """Text to the digit, as it is printed; a picture where a picture is stored. A cell that fails fails the test."""
    nbformat = pytest.importorskip("nbformat")
    stored, now = nbformat.read(notebook.NOTEBOOK, as_version=4), notebook.executed()
    nbformat.validate(stored)
    assert notebook.texts(now) == notebook.texts(stored)
    assert all(output.get("name") != "stderr" for cell in stored.cells for output in cell.get("outputs", []))
    kinds = [[output.output_type for output in cell.get("outputs", [])] for cell in stored.cells]
    assert [[o.output_type for o in cell.get("outputs", [])] for cell in now.cells] == kinds
    assert sum(len(found) for found in kinds) >= 6
    page, pictures = notebook.to_markdown(now)
    assert len(pictures) == 2
    assert all(f"]({name})" in page for name in pictures)


def test_the_gallery_is_small_and_whole():
    """Every picture of the page is there and no other, and all of them are read in a moment."""
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\(gallery/([\w-]+\.png)\)", page))
    files = {path.name: path.stat().st_size for path in (ROOT / "docs" / "gallery").glob("*.png")}
    assert shown <= set(files)
    assert sum(files.values()) < 2**20
