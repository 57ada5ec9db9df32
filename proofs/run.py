"""Run every executable proof check, and keep the index in step with them.

python proofs/run.py                    run all checks; exit 1 if one fails or the index is stale
python proofs/run.py theorem_7_bound    run some
python proofs/run.py --write-index      write proofs/README.md
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from harness import Claim, load  # noqa: E402

INDEX = ROOT / "README.md"


@dataclass(frozen=True)
class Outcome:
    """What running one statement's check gave."""

    name: str
    claims: list[Claim]
    counterexamples: list[Claim]
    false_variant_fails: bool
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every claim and counterexample holds and the false variant is refuted."""
        return (
            bool(self.claims)
            and all(c.holds for c in [*self.claims, *self.counterexamples])
            and self.false_variant_fails
        )


def statements() -> dict[str, dict[str, Any]]:
    """The table of statements."""
    return tomllib.loads((ROOT / "statements.toml").read_text())


def run(name: str) -> Outcome:
    """Run the check of one statement, its counterexamples and its deliberately false variant."""
    start = time.perf_counter()
    check = load(name)
    claims, counterexamples = list(check.claims()), list(check.counterexamples())
    refuted = any(not claim.holds for claim in check.false_claims())
    return Outcome(name, claims, counterexamples, refuted, time.perf_counter() - start)


def machine_checked() -> set[str]:
    """Names of the theorems that the prover has checked, by the record that `proofs/coq/check.py` verifies."""
    record = json.loads((ROOT / "coq" / "machine_checked.json").read_text())
    return {entry["theorem"] for entry in record["theorems"]}


def index() -> str:
    """The index as Markdown: statement, source, derivation, check, machine-checked, and what rests on it."""
    from hnkit.checks.registries import checks_by_proof

    proved, resting = machine_checked(), checks_by_proof()
    lines = [
        "# Proofs",
        "",
        "From a number on the screen to the statement it rests on. Every statement has a derivation and an executable",
        "check (`python proofs/run.py`); those with theorem names are also machine-checked in Coq with MathComp",
        "(`proofs/coq`, `nox -s proofs` compiles them and prints the axioms used). A statement without a name in that",
        "column is not machine-checked. This page is generated: `python proofs/run.py --write-index`.",
        "",
        "| statement | source | derivation | check | machine-checked | used by | checks of `verify-bound` |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in statements().items():
        missing = [theorem for theorem in entry.get("coq", []) if theorem not in proved]
        if missing:
            raise SystemExit(
                f"statements.toml: {name} names {missing[0]}, which proofs/coq/machine_checked.json does not list"
            )
        theorems = ", ".join(f"`{theorem}`" for theorem in entry.get("coq", [])) or "no"
        functions = ", ".join(f"`{function}`" for function in entry["functions"])
        checks = ", ".join(f"`{check}`" for check in resting.get(name, [])) or "none"
        title = entry["title"].replace("|", "\\|")
        lines.append(
            f"| {title} | {entry['source']} | [{name}]({name}/README.md) | [check.py]({name}/check.py) "
            f"| {theorems} | {functions} | {checks} |"
        )
    unknown = sorted(resting.keys() - statements().keys())
    if unknown:
        raise SystemExit(f"verify-bound names the proof {unknown[0]!r}, which statements.toml does not list")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="statements to run, all unless given")
    parser.add_argument("--write-index", action="store_true", help="write proofs/README.md and stop")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every claim")
    arguments = parser.parse_args()
    if arguments.write_index:
        INDEX.write_text(index())
        return 0
    unknown = [name for name in arguments.names if name not in statements()]
    if unknown:
        print(f"unknown statement {unknown[0]!r}: known are {', '.join(statements())}", file=sys.stderr)
        return 2
    failed = 0
    for name in arguments.names or statements():
        outcome = run(name)
        failed += not outcome.holds
        print(
            f"{'holds' if outcome.holds else 'FAILS':6} {name:24} {len(outcome.claims):4} claims, "
            f"{len(outcome.counterexamples):3} counterexamples, false variant "
            f"{'refuted' if outcome.false_variant_fails else 'NOT REFUTED'} ({outcome.seconds:.1f} s)"
        )
        for claim in [*outcome.claims, *outcome.counterexamples]:
            if arguments.verbose or not claim.holds:
                print(f"    {'holds' if claim.holds else 'FAILS'} [{claim.method}] {claim.text} {claim.detail}")
    if not arguments.names and (not INDEX.exists() or INDEX.read_text() != index()):
        print("proofs/README.md is stale: python proofs/run.py --write-index", file=sys.stderr)
        failed += 1
    print(f"{failed} of {len(arguments.names or statements())} failed" if failed else "all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
