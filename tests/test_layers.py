"""Imports run one way: each room of the house may import those of the floors below it, and nothing above."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    {"errors"},
    {"internal", "maps", "bounds", "injection"},
    {"jacobian", "logdet", "backend", "prompts", "output"},
    {"linalg", "config", "generate"},
    {"lipschitz", "rewards", "adapters"},
    {"kl"},
    {"loss", "tilt", "frontier"},
    {"figures"},
    {"testing"},
    {"checks", "training"},
    {"verify"},
    {"cli"},
    {"__main__"},
)
"""The rooms of `hnkit/` from the lowest floor up; rooms of one floor may import each other, but not in a circle."""

FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
ROOMS_AT_MOST = 26


def source_files() -> dict[str, Path]:
    """Every module of the three folders under the name it is imported by."""
    found = {}
    for folder in ("hnkit", "toy", "scaled"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "hnkit" else ("hnkit", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


FILES = source_files()


@functools.cache
def imported(path: Path, *, every: bool = False) -> frozenset[str]:
    """Modules of hnkit (or `every` one) that a file imports anywhere, lazily or for types, by their longest names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {
                inner if (inner := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names
            }
    return frozenset(name for name in found if every or name == "hnkit" or name.startswith("hnkit."))


def room(name: str) -> str:
    """The room of `hnkit/` that a module is in: `hnkit.kl.moments` is in `kl`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def violation(importer: str, target: str) -> str | None:
    """What an import breaks, in words that name both files; `None` if nothing."""
    there, here = room(target), room(importer)
    where = f"{FILES[importer].relative_to(ROOT)} imports {target}"
    if here in ("toy", "scaled"):
        if there in ("toy", "scaled") and there != here:
            return f"{where}: toy and scaled do not know each other"
        return f"{where}: only the command line starts the command line" if there == "cli" else None
    if here == "__init__":
        return None
    if there in ("toy", "scaled"):
        return f"{where}: hnkit reaches {there} through entry points only"
    if there == "__init__" or here == there:
        return None
    return f"{where}: an upward arrow" if FLOOR[there] > FLOOR[here] else None


def test_every_room_is_on_a_floor_and_there_are_few():
    rooms = {room(name) for name in FILES if room(name) not in ("toy", "scaled")} - {"__init__"}
    assert not rooms - set(FLOOR)
    assert len(rooms - {"__main__"}) <= ROOMS_AT_MOST


@pytest.mark.parametrize("importer", sorted(FILES))
def test_imports_run_one_way(importer):
    broken = [line for target in sorted(imported(FILES[importer])) if (line := violation(importer, target))]
    assert not broken, "\n".join(broken)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A circle for each module that is on one, found by depth-first search."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
            return
        if name in done:
            return
        for target in sorted(graph.get(name, ())):
            visit(target, [*path, name])
        done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_there_is_no_circle():
    graph = {name: imported(path) - {name, "hnkit"} for name, path in FILES.items() if name != "hnkit"}
    # A package's __init__ re-exports its modules; a module that imports its own package would close the circle.
    assert not circles(graph)


def test_no_command_waits_for_scipy_stats():
    """It takes half a second to import; `scipy.special` has the same functions."""
    assert [name for name, path in FILES.items() if "scipy.stats" in imported(path, every=True)] == []


def test_a_circle_and_an_upward_arrow_are_found(tmp_path):
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert "hnkit/errors.py imports hnkit.cli" in (violation("hnkit.errors", "hnkit.cli") or "")
    file = tmp_path / "lazy.py"
    file.write_text("def f():\n    from hnkit.cli import main\n")
    assert imported(file) == {"hnkit.cli"}
