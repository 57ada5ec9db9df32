"""The checker of the Coq proofs refuses every planted gap, and its record is that of the committed sources."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "proofs" / "coq" / "check.py"
SPEC = importlib.util.spec_from_file_location("coq_check", CHECK)
check = importlib.util.module_from_spec(SPEC)
sys.modules["coq_check"] = check
SPEC.loader.exec_module(check)

needs_coq = pytest.mark.skipif(shutil.which("coqc") is None, reason="coqc is not installed: nox -s proofs installs it")

CLAIM = (check.Statement("claim", "none", "for the test"),)
SOUND = "Theorem claim : 1 + 1 = 2.\nProof. reflexivity. Qed.\n"
FALSE_CLAIM = "Theorem claim : 1 = 2.\nProof. destruct cheat. Qed.\n"
PLANTED = {
    "admitted": ("Theorem claim : 1 = 2.\nProof. Admitted.\n", "Main.v:2: Admitted"),
    "admit in a script": ("Theorem claim : 1 = 2.\nProof. admit. Qed.\n", "Main.v:2: admit"),
    "axiom": ("Axiom cheat : False.\n" + FALSE_CLAIM, "Main.v:1: Axiom"),
    "parameter": ("Parameter cheat : False.\n" + FALSE_CLAIM, "Main.v:1: Parameter"),
    "no termination check": ("Unset Guard Checking.\n" + SOUND, "Main.v:1: Unset Guard Checking"),
    "not listed": (SOUND + "Theorem extra : True.\nProof. exact I. Qed.\n", "extra is proved in Main.v but not listed"),
    "not proved": ("Lemma claim : True.\nProof. exact I. Qed.\n", "claim is listed but not a theorem"),
}
PLANTED_FOR_COQ = {
    # A variable outside a section is an axiom without the word.
    "variable": ("Variable cheat : False.\n" + FALSE_CLAIM, "claim rests on hnkit.Main.cheat, which is not allowed"),
    "wrong proof": ("Theorem claim : 1 = 2.\nProof. reflexivity. Qed.\n", "Main.v does not compile"),
    "unfinished proof": ("Theorem claim : 1 = 2 /\\ True.\nProof. split. Qed.\n", "Main.v does not compile"),
}


def refusal(tmp_path, text, statements=CLAIM):
    folder, build = tmp_path / "proofs", tmp_path / "build"
    folder.mkdir()
    build.mkdir()
    (folder / "Main.v").write_text(text)
    with pytest.raises(check.Refused) as refused:
        check.verify(folder, statements, build)
    return str(refused.value)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_gap_is_refused_by_reading(name, tmp_path):
    text, reason = PLANTED[name]
    assert reason in refusal(tmp_path, text)


@needs_coq
@pytest.mark.parametrize("name", PLANTED_FOR_COQ)
def test_planted_gap_is_refused_by_coq(name, tmp_path):
    text, reason = PLANTED_FOR_COQ[name]
    assert reason in refusal(tmp_path, text)


@needs_coq
def test_axiom_under_the_name_of_a_library_axiom_is_refused(tmp_path):
    text = "Module Classical_Prop.\nVariable classic : 1 = 2.\nEnd Classical_Prop.\n"
    text += "Theorem claim : 1 = 2.\nProof. exact Classical_Prop.classic. Qed.\n"
    assert "claim rests on hnkit.Main.Classical_Prop.classic" in refusal(tmp_path, text)


@needs_coq
def test_sound_proofs_pass_with_the_axioms_they_use(tmp_path):
    folder, build = tmp_path / "proofs", tmp_path / "build"
    folder.mkdir()
    build.mkdir()
    (folder / "Main.v").write_text(
        "From Coq Require Import Classical.\nFrom hnkit Require Import Base.\n"
        "(* Admitted, in a comment (* or a nested Axiom *), is no gap. *)\n"
        + SOUND
        + "Theorem middle : forall P : Prop, P \\/ ~ P.\nProof. exact base. Qed.\n"
    )
    (folder / "Base.v").write_text("From Coq Require Import Classical.\nDefinition base := classic.\n")
    statements = (*CLAIM, check.Statement("middle", "none", "excluded middle"))
    found = check.verify(folder, statements, build)
    assert found == {"claim": [], "middle": ["Coq.Logic.Classical_Prop.classic"]}


def test_whatever_is_not_an_axiom_is_kept_whole():
    output = "Axioms:\na.b : nat\n  continued\nf is assumed to be guarded.\nClosed under the global context\n"
    assert check.parse_assumptions(output) == [["a.b", "f is assumed to be guarded."], []]


def test_missing_prover_is_one_line_and_exit_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(package in error for package in check.PACKAGES)


@needs_coq
def test_missing_library_is_named():
    with pytest.raises(check.ProverMissing, match="NoSuchLibrary"):
        check.require_prover(["NoSuchLibrary"])


def test_circular_files_are_refused(tmp_path):
    modules = {"Main": "From hnkit Require Import Other.\n", "Other": "From hnkit Require Import Main.\n"}
    with pytest.raises(check.Refused, match="circle"):
        check.build_order(modules)


def test_the_sources_have_no_gap_and_every_theorem_is_listed():
    modules = check.sources(CHECK.parent)
    assert check.find_gaps(modules) == []
    assert check.unlisted(modules, check.STATEMENTS) == []
    assert check.build_order(modules)[-1] == "Main"


def test_record_is_that_of_the_sources():
    record = json.loads(check.INDEX.read_text())
    assert record["sources"] == check.digest(CHECK.parent), "python proofs/coq/check.py --write-index"
    assert [(t["theorem"], t["source"], t["words"]) for t in record["theorems"]] == [
        (s.theorem, s.source, s.words) for s in check.STATEMENTS
    ]
    used = {axiom for theorem in record["theorems"] for axiom in theorem["axioms"]}
    assert used == record["axioms"].keys()
    assert used <= check.ALLOWED.keys()
    assert re.fullmatch(r"\d+\.\d+\.\d+", record["coq"])
