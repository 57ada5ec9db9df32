"""Compile the Coq proofs, and refuse any that rests on something other than the libraries' own axioms.

    python proofs/coq/check.py                compile, print a table theorem -> axioms
    python proofs/coq/check.py --write-index  also record the machine-checked statements in machine_checked.json

Three guards, each sufficient for most slips: the sources are searched for commands that leave a gap (`Admitted`,
`Axiom`, ...); every theorem of Main.v must be listed in STATEMENTS and the other way round; and Coq's own
`Print Assumptions` must name, for each theorem, nothing but the axioms of ALLOWED, by their full names.

Exit status: 0 all proved, 1 something is not, 2 the prover or a library is missing. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

HERE = Path(__file__).resolve().parent
INDEX = HERE / "machine_checked.json"
MAIN = "Main"
PACKAGES = ("coq", "libcoq-mathcomp", "libcoq-mathcomp-analysis", "libcoq-mathcomp-real-closed", "libcoq-coquelicot")
LIBRARIES = (
    "mathcomp.algebra.all_algebra",
    "mathcomp.classical.boolp",
    "mathcomp.analysis.Rstruct",
    "mathcomp.real_closed.complex",
    "Coquelicot.Coquelicot",
)

# Full name -> where it comes from. The real numbers are Coq's, and classical; the axioms are consistent together
# (they hold in the usual set-theoretic model) and are those that any development on these libraries has.
ALLOWED = {
    "Coq.Reals.ClassicalDedekindReals.sig_not_dec": "Coq's real numbers: decidability of negated propositions",
    "Coq.Reals.ClassicalDedekindReals.sig_forall_dec": "Coq's real numbers: limited principle of omniscience",
    "Coq.Logic.FunctionalExtensionality.functional_extensionality_dep": "Coq's real numbers: equal values, equal maps",
    "Coq.Logic.Classical_Prop.classic": "Coq's real analysis, Coquelicot: excluded middle",
    "Coq.Logic.Epsilon.epsilon_statement": "MathComp-Analysis, Rstruct: Hilbert's choice",
    "mathcomp.classical.boolp.functional_extensionality_dep": "MathComp-Analysis: equal values, equal maps",
    "mathcomp.classical.boolp.propositional_extensionality": "MathComp-Analysis: equivalent propositions are equal",
    "mathcomp.classical.boolp.constructive_indefinite_description": "MathComp-Analysis: choice",
}

GAPS = re.compile(
    r"\b(Admitted|admit|give_up|Axioms?|Conjectures?|Parameters?|bypass_check|Declare\s+ML\s+Module"
    r"|Unset\s+(?:Guard|Positivity|Universe)\s+Checking)\b"
)


@dataclass(frozen=True)
class Statement:
    """A theorem of Main.v and what it says.

    Attributes:
        theorem: its name in Coq.
        source: where the statement comes from.
        words: the statement in words.
    """

    theorem: str
    source: str
    words: str


STATEMENTS = (
    Statement("det_nonzero", "Theorem 7", "det(I + A) is not zero if |A| <= L < 1"),
    Statement("theorem7", "Theorem 7", "|tr A - ln|det(I + A)|| <= d h(L) if |A x| <= L |x| for all x and L < 1"),
    Statement("theorem7_jacobian", "Theorem 7", "the same for the Jacobian of an L-Lipschitz f wherever f has one"),
    Statement("frobenius_bound", "ours (b)", "|tr A - ln|det(I + A)|| <= |A|_F^2 / L^2 h(L) for 0 < L < 1"),
    Statement("frobenius_tighter", "ours (b)", "|A|_F^2 <= d L^2, so the Frobenius bound is never the looser one"),
    Statement("lemma5_bilipschitz", "Lemma 5", "(1-L)|x-y| <= |Tx-Ty| <= (1+L)|x-y| in a normed space"),
    Statement("lemma5_injective", "Lemma 5", "T = id + f is injective if L < 1, in a normed space"),
    Statement("lemma5_bijective", "Lemma 5", "T is bijective with 1/(1-L)-Lipschitz inverse, in a complete normed space"),
    Statement("lemma5_euclidean_bilipschitz", "Lemma 5", "the bi-Lipschitz bounds for the Euclidean norm of R^d"),
    Statement("lemma5_euclidean_bijective", "Lemma 5", "bijective, Lipschitz inverse, for the Euclidean norm of R^d"),
    Statement("gibbs", "Gibbs' inequality", "KL(q || p) >= 0, zero exactly if q = p; finite spaces, zeros allowed"),
    Statement("data_processing", "eq. 12", "KL(g_# q || g_# p) <= KL(q || p); finite spaces"),
    Statement("prop2", "Proposition 2", "KL(p_phi || p*) = J_gen(phi) + ln Z*; finite spaces"),
    Statement("prop2_minimisers", "Proposition 2", "KL(p_phi || p*) and J_gen have the same minimisers; finite spaces"),
    Statement("normaliser_noise", "eq. 21", "noise space and output space have the same Z*; finite spaces"),
    Statement("prop4", "Proposition 4", "KL(q || p0*) = J_noise(q) + ln Z*; finite spaces"),
    Statement("prop4_minimisers", "Proposition 4", "KL(q || p0*) and J_noise have the same minimisers; finite spaces"),
    Statement("optimality_gap", "ours (f)", "J_noise + ln Z* >= 0, zero exactly at p0*; finite spaces"),
    Statement("theorem3_pushforward", "Theorem 3, part 1", "g_# p0* = p*; finite spaces"),
    Statement("theorem3_minimiser", "Theorem 3, part 2", "p0* alone minimises KL(q || p0) among g_# q = p*; finite"),
    Statement("frontier_bound", "ours (j)", "E_q r <= alpha (KL(q || p) + ln E_p exp(r / alpha)); finite spaces"),
    Statement("frontier_attained", "ours (j)", "the tilted law attains it; finite spaces"),
    Statement("certified_normaliser", "ours (k)", "P(prod Z <= delta prod Zhat) <= delta over independent prompts; finite"),
    Statement("best_of_n", "best-of-n", "KL(best of n || p) <= ln n - (n - 1) / n, ties broken by any rule; finite spaces"),
    Statement("best_of_n_at_random", "best-of-n", "the same for the best of n with ties broken at random; finite spaces"),
    Statement("covariance_gap_nonneg", "ours (e)", "s - 1 - ln s >= 0 for s > 0"),
    Statement("covariance_gap_zero", "ours (e)", "s - 1 - ln s = 0 only at s = 1"),
)


class ProverMissing(Exception):
    """Coq or one of its libraries is not installed."""


class Refused(Exception):
    """A proof does not compile, has a gap, or rests on an axiom that is not allowed."""


def sources(folder: Path) -> dict[str, str]:
    """Module name to text, for every Coq file of the folder."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.v"))}


def without_comments(text: str) -> str:
    """The text with (nested) Coq comments and string literals blanked, line breaks kept."""
    kept, depth, quoted = [], 0, False
    for token in re.findall(r"\(\*|\*\)|\"|\n|.", text):
        if token == '"':
            quoted = not quoted
        elif token == "(*" and not quoted:
            depth += 1
        elif token == "*)" and not quoted and depth:
            depth -= 1
        elif token == "\n" or not (depth or quoted):
            kept.append(token)
    return "".join(kept)


def find_gaps(modules: dict[str, str]) -> list[str]:
    """Every command that leaves a gap, as `File.v:line: command`."""
    return [
        f"{name}.v:{number}: {match.group(1)}"
        for name, text in modules.items()
        for number, line in enumerate(without_comments(text).split("\n"), start=1)
        for match in GAPS.finditer(line)
    ]


def unlisted(modules: dict[str, str], statements: Sequence[Statement]) -> list[str]:
    """Theorems of Main.v without an entry among the statements, and entries without a theorem."""
    proved = set(re.findall(r"^\s*Theorem\s+(\w+)", without_comments(modules.get(MAIN, "")), re.MULTILINE))
    listed = {statement.theorem for statement in statements}
    return [f"{name} is proved in {MAIN}.v but not listed" for name in sorted(proved - listed)] + [
        f"{name} is listed but not a theorem of {MAIN}.v" for name in sorted(listed - proved)
    ]


def build_order(modules: dict[str, str]) -> list[str]:
    """The modules, each after those that it requires."""
    requires = {
        name: set(" ".join(re.findall(r"From hnkit Require (?:Import |Export )?([\w\s]+)\.", text)).split())
        for name, text in modules.items()
    }
    try:
        order = list(TopologicalSorter(requires).static_order())
    except CycleError as error:
        raise Refused(f"the files require each other in a circle: {' -> '.join(error.args[1])}") from None
    missing = sorted(set(order) - set(modules))
    if missing:
        raise Refused(f"{missing[0]}.v is required but is not there")
    return order


def coqc(build: Path, module: str) -> str:
    """Compile one file of the build folder and return what Coq printed; the user's own start-up file is not read."""
    project = (HERE / "_CoqProject").read_text(encoding="utf-8").splitlines()
    extra = [line.split(maxsplit=1)[1] for line in project if line.startswith("-arg ")]
    command = ["coqc", "-q", "-Q", ".", "hnkit", *extra, f"{module}.v"]
    result = subprocess.run(command, cwd=build, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Refused(f"{module}.v does not compile\n{(result.stdout + result.stderr).strip()}")
    return result.stdout


def require_prover(libraries: Sequence[str] = LIBRARIES) -> str:
    """The version of Coq; raises ProverMissing if it or a library cannot be loaded."""
    hint = f"on Debian or Ubuntu: apt-get install {' '.join(PACKAGES)}"
    if shutil.which("coqc") is None:
        raise ProverMissing(f"coqc is not installed; {hint}")
    with tempfile.TemporaryDirectory() as folder:
        probe = "".join(f"Require {library}.\n" for library in libraries)
        (Path(folder) / "Probe.v").write_text(probe, encoding="utf-8")
        try:
            coqc(Path(folder), "Probe")
        except Refused as error:
            found = re.search(r"(?:library|prefix|path) [^\n]*", str(error))
            what = found.group(0) if found else str(error).splitlines()[-1]
            raise ProverMissing(f"a Coq library cannot be loaded ({what}); {hint}") from None
    version = subprocess.run(["coqc", "--print-version"], capture_output=True, text=True, check=True).stdout
    return version.split()[0]


def parse_assumptions(output: str) -> list[list[str]]:
    """The blocks of several `Print Assumptions`, each as the names that it lists.

    Whatever is not the declaration of an axiom (an unsafe fixpoint, say) is kept whole, so that no list allows it.
    """
    blocks: list[list[str]] = []
    for line in output.splitlines():
        if re.match(r"Closed under the global context|Axioms:\s*$", line):
            blocks.append([])
        elif line and not line[0].isspace() and blocks:
            declared = re.match(r"([\w.']+)(?:\s*:\s|\s*$)", line)
            blocks[-1].append(declared.group(1) if declared else line.strip())
    return blocks


def assumptions(build: Path, theorems: Sequence[str]) -> dict[str, list[str]]:
    """The axioms under each theorem of Main, by full name, as Coq reports them.

    Coq prints the shortest name that is unambiguous; a second run asks for the full name of each, so that a file
    cannot pass an axiom of its own off as a library's.
    """
    head = f"From hnkit Require {MAIN}.\nSet Printing Width 100000.\n"
    asked = "".join(f"Print Assumptions {MAIN}.{theorem}.\n" for theorem in theorems)
    (build / "AskAssumptions.v").write_text(head + asked, encoding="utf-8")
    blocks = parse_assumptions(coqc(build, "AskAssumptions"))
    if len(blocks) != len(theorems):
        raise Refused(f"Coq answered {len(blocks)} of {len(theorems)} questions about assumptions")
    names = sorted({name for block in blocks for name in block if re.fullmatch(r"[\w.']+", name)})
    (build / "AskNames.v").write_text(head + "".join(f"About {name}.\n" for name in names), encoding="utf-8")
    full = re.findall(r"^Expands to: Constant (\S+)$", coqc(build, "AskNames"), re.MULTILINE)
    if len(full) != len(names):
        raise Refused(f"Coq gave the full names of {len(full)} of {len(names)} axioms")
    resolved = dict(zip(names, full, strict=True))
    return {
        theorem: sorted(resolved.get(name, name) for name in block)
        for theorem, block in zip(theorems, blocks, strict=True)
    }


def verify(folder: Path, statements: Sequence[Statement], build: Path) -> dict[str, list[str]]:
    """Theorem to axioms, for a folder of proofs without gaps; raises Refused otherwise.

    Args:
        folder: the Coq files; Main.v has the theorems.
        statements: the theorems that are claimed.
        build: an empty folder for the compiled files.
    """
    modules = sources(folder)
    complaints = find_gaps(modules) + unlisted(modules, statements)
    if complaints:
        raise Refused("\n".join(complaints))
    for name in build_order(modules):
        (build / f"{name}.v").write_text(modules[name], encoding="utf-8")
        start = time.perf_counter()
        coqc(build, name)
        print(f"compiled {name}.v ({time.perf_counter() - start:.1f} s)", flush=True)
    print("asking Coq for the axioms under each theorem", flush=True)
    found = assumptions(build, [statement.theorem for statement in statements])
    refused = [
        f"{theorem} rests on {axiom}, which is not allowed"
        for theorem, axioms in found.items()
        for axiom in axioms
        if axiom not in ALLOWED
    ]
    if refused:
        raise Refused("\n".join(refused))
    return found


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every Coq file, so that a record can be told from a stale one."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.v"))}


def write_index(path: Path, statements: Sequence[Statement], axioms: dict[str, list[str]], version: str) -> None:
    """Record what was machine-checked, atomically."""
    record = {
        "coq": version,
        "sources": digest(HERE),
        "axioms": {name: ALLOWED[name] for name in sorted({axiom for names in axioms.values() for axiom in names})},
        "theorems": [
            {"theorem": s.theorem, "source": s.source, "words": s.words, "axioms": axioms[s.theorem]}
            for s in statements
        ],
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def table(statements: Sequence[Statement], axioms: dict[str, list[str]]) -> str:
    """Theorems with numbered axioms, and what the numbers mean."""
    used = sorted({axiom for names in axioms.values() for axiom in names})
    width = max(len(statement.theorem) for statement in statements)
    rows = [f"{'theorem':{width}}  axioms"]
    for statement in statements:
        marks = " ".join(str(used.index(axiom) + 1) for axiom in axioms[statement.theorem]) or "none"
        rows.append(f"{statement.theorem:{width}}  {marks}")
    rows.append("")
    rows += [f"{number}  {axiom}\n   {ALLOWED[axiom]}" for number, axiom in enumerate(used, start=1)]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the machine-checked statements to FILE")
    parser.add_argument("--write-index", action="store_true", help=f"the same, to {INDEX.name} beside this script")
    options = parser.parse_args(arguments)
    try:
        version = require_prover()
        with tempfile.TemporaryDirectory(prefix="hnkit-coq-") as build:
            axioms = verify(HERE, STATEMENTS, Path(build))
    except ProverMissing as error:
        print(error, file=sys.stderr)
        return 2
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    print(table(STATEMENTS, axioms))
    for path in [options.json, INDEX if options.write_index else None]:
        if path is not None:
            write_index(path, STATEMENTS, axioms, version)
    print(f"{len(STATEMENTS)} theorems machine-checked by Coq {version}, no axioms beyond those of the libraries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
