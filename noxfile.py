"""Every task of the project, each in an environment of its own: `nox -s demo`, `nox -s tests`, `nox -l`."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = False

PINS, LOCK = "constraints.txt", "requirements.lock"
TEST_TOOLS = (
    "pytest", "pytest-benchmark", "pytest-cov", "pytest-timeout", "pytest-xdist", "mpmath", "sympy", "pyarrow",
)  # fmt: skip
WITHOUT_DEPENDENCIES = ("open_clip_torch",)
"""Run by the tests of foreign formats; what they declare would bring torchvision, and with it another torch."""
WITHOUT_TRAINING = "base,hypernoise,best-of-2,best-of-4,best-of-n,reno,prompt-optimisation"
"""The methods of a comparison that need no further training beside the adapter's."""
CHECK_TOOLS = ("ruff", "mypy", "pip-audit")
PROVER = (
    "coq",
    "libcoq-mathcomp",
    "libcoq-mathcomp-analysis",
    "libcoq-mathcomp-real-closed",
    "libcoq-coquelicot",
)


def _prepare(session: nox.Session) -> None:
    session.env.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PIP_DISABLE_PIP_VERSION_CHECK="1")
    # glibc gives large blocks back to the system after every step; keeping them is about twice as fast on the CPU
    session.env.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(8 * 2**30))


def _install(session: nox.Session, extras: str = "", *tools: str) -> None:
    _prepare(session)
    target = f".[{extras}]" if extras else "."
    session.install("-q", "-c", PINS, "-e", target, *tools)


def _install_locked(session: nox.Session) -> bool:
    """Install what `requirements.lock` names, build tools included, each file checked against its hash.

    False where the lock is for another platform. A file of another hash is an error, but for torch, of which one
    version has several builds: another one than the lock's is installed by its version, and that is said.
    """
    _prepare(session)
    lines = Path(LOCK).read_text(encoding="utf-8").splitlines()
    version = ".".join(platform.python_version_tuple()[:2])
    system = f"{platform.system()} ({platform.libc_ver()[0] or 'no glibc'})"  # musl's wheels have hashes of their own
    here = f"{system}, {platform.python_implementation()} {version}, {platform.machine()}."
    there = lines[0].rpartition(": ")[2]
    if here != there:
        session.warn(f"{LOCK} is for {there} Here versions are pinned, and no hash is checked.")
        return False
    folder = Path(session.create_tmp())
    report = folder / "torch.json"
    torch = next(line for line in lines if line.startswith("torch=="))
    session.install(
        "-q", "--dry-run", "--ignore-installed", "--no-deps", "--report", str(report), torch.partition(" ")[0]
    )
    build = lines[1].partition("(")[2].partition(")")[0]
    found = json.loads(report.read_text())["install"][0]["metadata"]["version"] if report.exists() else build
    if found != build:
        session.warn(f"torch {found} is another build than the lock's {build}: its hash is not checked.")
        lines.remove(torch)
        session.install("-q", "-c", PINS, "torch")
    pins = folder / "pins.txt"
    pins.write_text("\n".join(lines) + "\n")
    session.install("-q", "--require-hashes", "--no-deps", "-r", str(pins))
    session.install("-q", "--no-deps", "--no-build-isolation", "-e", ".")
    return True


def _install_prover(session: nox.Session) -> None:
    """Install Coq and its libraries where that needs no question: Debian or Ubuntu, as root or with sudo."""
    if shutil.which("coqc"):
        return
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get"):
        session.error(f"coqc is not installed: install Coq 8.16 with MathComp ({', '.join(PROVER)} on Debian)")
    session.run(*sudo, "apt-get", "update", "-q", external=True, silent=True)
    session.run(*sudo, "apt-get", "install", "-y", "-q", *PROVER, external=True, silent=True)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job: check the theory on every toy, show the finished adapter, train another, compare the finished."""
    _install(session, "scaled,certify")
    out = Path(session.posargs[0] if session.posargs else "runs/demo")
    if out.exists():
        session.error(f"{out} exists already and is never overwritten: nox -s demo -- NEW_FOLDER")
    session.run("hnkit", "verify-bound", "--out", str(out / "verify"))
    shown = ("a red three", "a blue seven and a green one", "two fives", "a cyan zero")
    prompts = [word for prompt in shown for word in ("--prompt", prompt)]
    session.run(
        "hnkit", "generate", "--backend", "digits", "--adapter", "bundled", *prompts, "--out", str(out / "images"),
    )  # fmt: skip
    # fewer steps than the preset's 500, and no second training for the comparison: an answer in minutes
    session.run("hnkit", "train", "--backend", "digits", "--steps", "300", "--out", str(out / "train"))
    session.run(
        "hnkit", "compare", "--backend", "digits", "--quick", "--adapter", "bundled", "--methods", WITHOUT_TRAINING,
        "--out", str(out / "compare"),
    )  # fmt: skip


def _install_all(session: nox.Session) -> None:
    """Install all that tests and checks need: the lock, which holds the tools too, or the pinned versions."""
    if not _install_locked(session):
        _install(session, "scaled,testing,certify,docs", *TEST_TOOLS, *CHECK_TOOLS)
        session.install("-q", "-c", PINS, "--no-deps", *WITHOUT_DEPENDENCIES)


def _run_tests(session: nox.Session, *options: str) -> None:
    session.env.update(OMP_NUM_THREADS="1")  # the workers share the cores
    # each worker begins with one half of the files, so that what a file prepares is prepared once
    session.run("pytest", "-q", "-n", "auto", "--dist", "worksteal", *options, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The whole test suite, on files whose hashes are on record wherever the lock is for."""
    _install_all(session)
    _run_tests(session)


@nox.session
def coverage(session: nox.Session) -> None:
    """The whole test suite and the lines that it does not reach; takes a fifth longer than `tests`."""
    _install_all(session)
    _run_tests(session, "--cov", "--cov-report=term:skip-covered")


@nox.session
def checks(session: nox.Session) -> None:
    """All that a change has to pass besides the tests, in one environment: lint, types, audit, proofs."""
    _install_prover(session)
    _install_all(session)
    _run_lint(session)
    _run_types(session)
    _run_audit(session)
    _run_proofs(session)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and the checks of ruff."""
    session.install("-q", "-c", PINS, "ruff")
    _run_lint(session)


def _run_lint(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types of the three folders."""
    _install(session, "scaled,testing,certify", "mypy")
    _run_types(session)


def _run_types(session: nox.Session) -> None:
    # mypy does not follow an editable install's finder: it reads a tree of links laid out as the wheel is
    tree = Path(session.create_tmp()) / "types"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "hnkit").mkdir(parents=True)
    for inner in (*Path("hnkit").iterdir(), Path("toy"), Path("scaled")):
        (tree / "hnkit" / inner.name).symlink_to(inner.resolve())
    session.run("mypy", env={"MYPYPATH": str(tree.resolve())})


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of the pinned versions where the data can be reached; pins and licences always."""
    _install_all(session)
    _run_audit(session)


def _run_audit(session: nox.Session) -> None:
    report = Path(session.create_tmp()) / "audit.json"
    report.unlink(missing_ok=True)
    session.run(
        "pip-audit", "--requirement", str(Path(PINS).resolve()), "--no-deps", "--disable-pip", "--timeout", "20",
        "--progress-spinner", "off", "--format", "json", "--output", str(report),
        success_codes=range(256), silent=True,
    )  # fmt: skip
    found = json.loads(report.read_text()) if report.exists() and report.stat().st_size else None
    session.run("python", "docs/audit.py")
    if found is None:
        session.warn("the data on vulnerabilities could not be reached: pins and licences alone were audited")
        return
    known = [(p["name"], p["version"], v["id"]) for p in found["dependencies"] for v in p.get("vulns", ())]
    if known:
        session.error("known vulnerabilities: " + "; ".join(" ".join(entry) for entry in known))
    session.log(f"no known vulnerability in {len(found['dependencies'])} pinned packages")


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks, as ratios against what a user would otherwise run."""
    _install(session, "scaled,certify", "pytest", "pytest-benchmark", "pytest-timeout")
    session.run("pytest", "-q", "-m", "", "--timeout=1800", "benchmarks", *session.posargs)


@nox.session
def proofs(session: nox.Session) -> None:
    """Every statement's executable check, and the machine-checked proofs with the axioms they use."""
    _install_prover(session)
    _install(session, "certify", "sympy", "mpmath")
    _run_proofs(session)


def _run_proofs(session: nox.Session) -> None:
    session.run("python", "proofs/coq/check.py")
    session.run("python", "proofs/run.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation pages into site/."""
    _install(session, "docs")
    session.run("python", "docs/build.py", "site")
