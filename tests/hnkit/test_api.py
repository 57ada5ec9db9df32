"""The public names: each is there, typed, written once, and imported on first use."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hnkit

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", hnkit.__all__)
def test_every_name_is_there_and_is_what_its_module_calls_so(name: str) -> None:
    found = getattr(hnkit, name)
    if name != "__version__":
        assert found is getattr(importlib.import_module(f"hnkit.{hnkit._HOME[name]}"), name)
    assert name in dir(hnkit)


def test_a_name_has_one_home_and_an_unknown_one_is_said() -> None:
    listed = [name for names in hnkit._API.values() for name in names]
    assert len(listed) == len(set(listed))
    with pytest.raises(AttributeError, match="no attribute 'noise_lk'"):
        _ = hnkit.noise_lk


def test_type_checkers_read_the_same_names() -> None:
    tool = load(ROOT / "docs" / "stub.py")
    text = tool.STUB.read_text(encoding="utf-8")
    assert text == tool.stub(), "run python docs/stub.py"
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname for node in imports for alias in node.names} == set(hnkit._HOME)


def test_importing_hnkit_imports_nothing_else() -> None:
    code = "import hnkit, sys; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'scipy'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_that_a_document_uses_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = {module.name for module in pkgutil.iter_modules(hnkit.__path__)} | {"toy", "scaled"}
    groups = {"problems", "backends", "rewards", "comparisons"}  # of entry points
    used = set(re.findall(r"(?<![\w/.\-@])hnkit\.([A-Za-z_]\w*)", text)) - groups
    for names in re.findall(r"^\s*from hnkit import (\w+(?:, \w+)*)$", text, re.MULTILINE):
        used |= set(names.split(", "))
    missing = {name for name in used - modules if not hasattr(hnkit, name)}
    assert not missing
