"""The audit of pins and licences: it notices what it is there for, and this environment passes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "docs" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["audit"]


@pytest.mark.parametrize(
    ("licence", "kind"),
    [
        ("MIT License", "permissive"),
        ("BSD-3-Clause AND MIT", "permissive"),
        ("MPL-2.0 AND MIT", "weak copyleft"),
        ("GNU Lesser General Public License v3 (LGPLv3)", "weak copyleft"),
        ("GPL-3.0-or-later", "strong copyleft"),
        ("GNU Affero General Public License v3", "strong copyleft"),
        ("GNU General Public License v2 (GPLv2)", "strong copyleft"),
        ("LicenseRef-NVIDIA-Proprietary", "other"),
        ("", "not stated"),
    ],
)
def test_kinds_of_licences(audit, licence, kind):
    assert audit.Package("x", "1", "1", licence).kind == kind


def test_what_fails_and_what_is_reported(audit):
    packages = [
        audit.Package("fine", "1.0", "1.0", "MIT"),
        audit.Package("build", "1.0+cpu", "1.0", "MIT"),
        audit.Package("other", "2.0", "1.0", "MIT"),
        audit.Package("strong", "1.0", "1.0", "GPLv3"),
        audit.Package("weak", "1.0", None, "MPL-2.0"),
    ]
    wrong, look = audit.problems(packages)
    assert [line.split()[0].rstrip(":") for line in wrong] == ["other", "strong"]
    assert [line.split()[0].rstrip(":") for line in look] == ["weak", "weak"]


def test_pins_are_read_without_comments_and_markers(audit, tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text("# all\nA_b.c==1.0  # why\n\nd==2 ; python_version > '3'\n")
    assert audit.read_pins(path) == {"a-b-c": "1.0", "d": "2"}


def test_every_requirement_is_found_pinned_and_free_of_strong_copyleft(audit):
    packages = {package.name: package for package in audit.needed()}
    assert {"torch", "numpy", "safetensors", "typer", "hypothesis"} <= packages.keys()
    unpinned = {name for name, package in packages.items() if package.pin is None}
    assert {"torch", "numpy", "safetensors", "diffusers", "peft", "transformers"} & unpinned == set()
    assert [name for name, package in packages.items() if package.kind == "strong copyleft"] == []
