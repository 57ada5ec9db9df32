"""What other tools read of the project says the same as the project: citation, style hooks, hosted runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import hnkit
from hnkit.training.publish import CITATION

ROOT = Path(__file__).parents[1]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == hnkit.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]


def test_the_questions_page_cites_the_same():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"][0]
    assert paper["title"] in text
    assert CITATION in text
    assert f"version = {{{hnkit.__version__}}}" in text
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in text


def test_style_hooks_run_the_pinned_ruff():
    hidden = ROOT / ".pre-commit-config.yaml"
    if not hidden.exists():
        pytest.skip("not a checkout: hidden files are not part of the source distribution")
    pin = re.search(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    hooks = yaml.safe_load(hidden.read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {tuple(hook["additional_dependencies"]) for hook in hooks} == {(pin[0],)}


def test_hosted_runs_call_the_gate():
    workflow = ROOT / ".github" / "workflows" / "tests.yml"
    if not workflow.exists():
        pytest.skip("not a checkout: hidden files are not part of the source distribution")
    job = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]["gate"]
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    assert (ROOT / command).is_file()
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert f">={job['strategy']['matrix']['python'][0]}" == oldest
