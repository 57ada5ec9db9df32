"""Mutation testing of the mathematical modules: how many small errors in them would some test notice?

The packages and tests are copied to a temporary folder, the test files collected once, and each mutant run in a forked
process of its own: the functions of the imported modules get the code of the mutated source, then the tests that reach
the changed statement run, cheapest first, until one fails. A mutant that outlasts its processor time counts as killed.

    python benchmarks/mutate.py                                  every mutant of every module: hours
    python benchmarks/mutate.py --sample 20                      20 mutants of each drawn at random
    python benchmarks/mutate.py bounds toy/folding               every mutant of two modules
    python benchmarks/mutate.py --survivors                      those that survived last time, and no others
    python benchmarks/mutate.py --new                            those that have no outcome yet: of changed statements
    python benchmarks/mutate.py --page                           only write docs/mutation.md from the figures

Figures go to docs/results/mutation.json and from there to docs/mutation.md. Survivors that no test can kill are listed
with the reason in benchmarks/equivalent_mutants.toml.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import tomllib
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from mutants import Mutant, find_mutants

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs/results/mutation.json"
PAGE = ROOT / "docs/mutation.md"
EQUIVALENT = ROOT / "benchmarks/equivalent_mutants.toml"
KEPT = ("hnkit", "toy", "scaled", "proofs", "tests", "pyproject.toml")
TOYS = ["tests/toy/test_problems.py", "tests/toy/test_linear_gaussian.py", "tests/toy/test_shapes_of_rewards.py"]
MUTANTS_TESTS = "tests/robustness/mutants"
TESTS = {
    "hnkit/bounds": ["tests/hnkit/test_bounds.py"],
    "hnkit/lipschitz": ["tests/hnkit/test_lipschitz.py"],
    "hnkit/convolution": ["tests/hnkit/test_lipschitz.py"],
    "hnkit/certify": ["tests/hnkit/test_lipschitz.py", "tests/hnkit/test_ball.py"],
    "hnkit/ball": ["tests/hnkit/test_ball.py"],
    "hnkit/tilt": ["tests/hnkit/test_tilt.py"],
    "toy/linear_gaussian": [TOYS[1], TOYS[0]],
    "toy/one_dimensional": [TOYS[2], TOYS[0]],
    "toy/mixture": [TOYS[2], TOYS[0]],
    "toy/half_space": [TOYS[2], TOYS[0]],
    "toy/folding": [TOYS[2], TOYS[0]],
    "toy/_numerics": [TOYS[2], TOYS[0]],
    "hnkit/logdet": ["tests/hnkit/test_logdet.py"],
    "hnkit/kl": ["tests/hnkit/test_kl.py"],
    "hnkit/moments": ["tests/hnkit/test_kl.py"],
    "hnkit/loss": ["tests/hnkit/test_loss.py"],
    "hnkit/jacobian": ["tests/hnkit/test_jacobian.py"],
    "hnkit/estimators": ["tests/hnkit/test_estimators.py"],
    "hnkit/krylov": ["tests/hnkit/test_estimators.py"],
}


@dataclass(frozen=True)
class Outcome:
    """One mutant and what became of it: killed, survived, or not covered (no test reaches the statement)."""

    key: str
    line: int
    change: str
    status: str
    by: str
    seconds: float


class Laboratory:
    """A pytest plugin that, in place of running the collected tests once, runs them over mutants."""

    def __init__(self, work: Path, options: argparse.Namespace, modules: list[str]) -> None:
        self.work, self.options, self.modules = work, options, modules
        self.kills: dict[str, int] = {}
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The first failure ends the process of the mutant."""
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_runtestloop(self, session: Any) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        load_forward_mode()
        for name in self.modules:
            print(f"{name}: measuring which tests reach which lines", flush=True)
            reached = self.reached(name)
            self.module(name, reached)
        return True

    def reached(self, name: str) -> dict[str, dict[str, Any]]:
        """For each passing test of the module's files its seconds and the lines of the module that it runs."""
        tests = {}
        for path in files_of(name, self.options.tests):
            out = self.work / f"{name.replace('/', '.')}-{Path(path).stem}.json"
            if not out.exists():
                child = fork_quiet()
                if not child:
                    with contextlib.suppress(BaseException):  # what it leaves unwritten ends the parent
                        self.trace(str(self.work / f"{name}.py"), path, out)
                    os._exit(1)
                os.waitpid(child, 0)
            tests |= json.loads(out.read_text())
        for test, seen in tests.items():
            if not seen["passed"]:
                print(f"  fails without any mutant, left out: {test}", flush=True)
        return {test: seen for test, seen in tests.items() if seen["passed"]}

    def trace(self, module: str, path: str, out: Path) -> None:
        """Run one test file without mutants, watching one module; ends the process."""
        seen: dict[str, dict[str, Any]] = {}
        lines: set[int] = set()

        def in_frame(frame: Any, event: str, _: object) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
            return in_frame

        def on_call(frame: Any, _event: str, _: object) -> Any:
            if frame.f_code.co_filename != module:
                return None
            lines.add(frame.f_lineno)
            return in_frame

        items = [item for test, item in self.items.items() if test.startswith(f"{path}::")]
        for item, following in zip(items, [*items[1:], None], strict=False):
            lines.clear()
            self.failed, start = "", time.process_time()
            sys.settrace(on_call)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.settrace(None)
            seconds = time.process_time() - start
            seen[item.nodeid] = {"seconds": seconds, "lines": sorted(lines), "passed": not self.failed}
        out.write_text(json.dumps(seen))
        os._exit(0)

    def module(self, name: str, reached: dict[str, dict[str, Any]]) -> None:
        """Run a sample of the mutants of one module and record them."""
        source = (self.work / f"{name}.py").read_text()
        mutants = find_mutants(source)
        old = read_figures().get(name, {})
        size = self.options.sample or len(mutants)
        # what is known of mutants that the source still has; what was drawn before is forgotten
        known = {mutant.key for mutant in mutants}
        rows = {row["key"]: row for row in old.get("mutants", []) if row["key"] in known}
        if self.options.survivors:
            sample = [m for m in mutants if rows.get(m.key, {}).get("status") in ("survived", "not covered")]
        elif self.options.new:
            sample = [mutant for mutant in mutants if mutant.key not in rows]
        else:
            rows = {}
            sample = random.Random(f"{self.options.seed} {name}").sample(mutants, min(size, len(mutants)))
        functions = live_functions(str(self.work / f"{name}.py"))
        outcomes = []
        for mutant in sample:
            outcome = self.run(mutant, name, source, reached, functions)
            outcomes.append(outcome)
            if outcome.status != "killed":
                print(f"  {outcome.status}: {name}:{mutant.line} {mutant.key}", flush=True)
            rows[outcome.key] = asdict(outcome)
            record(name, {"all": len(known), "seed": self.options.seed, "mutants": list(rows.values())})
        record(name, {"all": len(known), "seed": self.options.seed, "mutants": list(rows.values())})
        print(f"{name}: {tally([asdict(outcome) for outcome in outcomes])} of {len(mutants)} mutants", flush=True)

    def run(
        self, mutant: Mutant, name: str, source: str, reached: dict[str, dict[str, Any]], functions: list[FunctionType]
    ) -> Outcome:
        """Fork, change the code, run the tests that reach it."""
        start = time.perf_counter()
        statement = set(range(mutant.lines[0], mutant.lines[1] + 1))
        everywhere = mutant.function == "module"
        tests = [test for test, seen in reached.items() if everywhere or statement.intersection(seen["lines"])]
        if not tests:
            status = "survived" if self.options.tests else "not covered"
            return Outcome(mutant.key, mutant.line, mutant.change, status, "", 0.0)
        tests.sort(key=lambda test: (reached[test]["seconds"] + 0.05) / (1 + self.kills.get(test, 0)))
        limit = 10 + 3 * sum(reached[test]["seconds"] for test in tests)
        result = self.work / "result"
        result.unlink(missing_ok=True)
        child = fork_quiet()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 1))
            resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
            with contextlib.suppress(BaseException):
                swap(mutant, name, self.work, source, functions)
                items = [self.items[test] for test in tests]
                for item, following in zip(items, [*items[1:], None], strict=True):
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    if self.failed:
                        result.write_text(self.failed)
                        os._exit(1)
                os._exit(0)
            os._exit(2)
        _, status = os.waitpid(child, 0)
        by = result.read_text() if result.exists() else ""
        if os.WIFSIGNALED(status):
            by = "processor time or memory"
        elif os.WEXITSTATUS(status) == 2:
            by = "import"
        self.kills[by] = self.kills.get(by, 0) + 1
        fate = "survived" if status == 0 else "killed"
        return Outcome(mutant.key, mutant.line, mutant.change, fate, by, round(time.perf_counter() - start, 2))


def load_forward_mode() -> None:
    """The first forward-mode product of a process takes a second; what it loads is left to all forks."""
    import torch
    from torch.autograd import forward_ad

    with warnings.catch_warnings(action="ignore"), forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(1), torch.ones(1))


def fork_quiet() -> int:
    """Fork; the child writes nowhere."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    return child


def live_functions(path: str) -> list[FunctionType]:
    """Every function of a source file that exists now, decorated or not."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) is FunctionType]
    return [function for function in found if function.__code__.co_filename == path]


def code_objects(code: CodeType) -> list[CodeType]:
    """A code object and all that it holds, in the order of the source."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return [code, *(below for part in inner for below in code_objects(part))]


def swap(mutant: Mutant, name: str, work: Path, source: str, functions: list[FunctionType]) -> None:
    """Give the imported functions the code of the mutant; run a changed statement of the module again."""
    tree = ast.parse(source)
    changed = mutant.apply(tree)
    path = str(work / f"{name}.py")
    before, after = (compile(part, path, "exec", dont_inherit=True) for part in (tree, changed))
    pairs = zip(code_objects(before)[1:], code_objects(after)[1:], strict=True)
    new_code = {old: new for old, new in pairs if old != new}
    for function in functions:
        if function.__code__ in new_code:
            function.__code__ = new_code[function.__code__]
    place = mutant.path[0][1]
    assert place is not None
    module = sys.modules[name.replace("/", ".")]
    outermost = changed.body[place]
    if mutant.function == "module":
        old_values = dict(vars(module))
        exec(compile(ast.Module([outermost], []), path, "exec"), vars(module))
        for known in list(sys.modules.values()):
            for key, value in list(getattr(known, "__dict__", {}).items()):
                if key in old_values and old_values[key] is value and vars(module)[key] is not value:
                    setattr(known, key, vars(module)[key])
    elif any(field == "args" for field, _ in mutant.path[1:3]):  # defaults are made when the function is
        fresh = dict(vars(module))
        exec(compile(ast.Module([outermost], []), path, "exec"), fresh)
        made = {function.__qualname__: function for function in live_functions(path) if function not in functions}
        for function in functions:
            if function.__qualname__ in made:
                function.__defaults__ = made[function.__qualname__].__defaults__
                function.__kwdefaults__ = made[function.__qualname__].__kwdefaults__


def tally(rows: list[dict[str, Any]]) -> str:
    counts = {status: sum(row["status"] == status for row in rows) for status in ("killed", "survived", "not covered")}
    return f"{len(rows)} run, " + ", ".join(f"{count} {status}" for status, count in counts.items())


def files_of(name: str, chosen: list[str]) -> list[str]:
    own = f"{MUTANTS_TESTS}/test_{Path(name).name.removeprefix('_')}_mutants.py"
    return [path for path in chosen or [*TESTS[name], own] if (ROOT / path).exists()]


def read_figures() -> dict[str, Any]:
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def record(name: str, figures: dict[str, Any]) -> None:
    """Put the figures of one module into the file."""
    everything = read_figures() | {name: figures}
    new = FIGURES.with_suffix(".tmp")
    new.write_text(json.dumps(dict(sorted(everything.items())), indent=1) + "\n")
    new.replace(FIGURES)


def write_page() -> None:
    """docs/mutation.md from the figures and the reasons."""
    figures, reasons = read_figures(), tomllib.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    rows, survivors, equivalents, totals = [], [], [], [0, 0, 0, 0, 0, 0]
    for name in (name for name in TESTS if name in figures):
        module = figures[name]
        mutants = module["mutants"]
        status = [row["status"] for row in mutants]
        known = reasons.get(name, {})
        excused = [row for row in mutants if row["status"] == "survived" and row["key"] in known]
        counts = [module["all"], len(mutants), status.count("killed"), status.count("survived"), len(excused),
                  status.count("not covered")]  # fmt: skip
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        rows.append(f"| `{name}` | " + " | ".join(map(str, counts)) + f" | {share(counts)} |")
        for row in sorted(mutants, key=lambda row: row["line"]):
            if row["status"] == "killed":
                continue
            function, statement, change = row["key"].split(" | ", 2)
            statement = statement if len(statement) < 90 else statement[:87] + "..."
            text = " \\| ".join((function, statement.replace("|", "\\|"), change.replace("|", "\\|")))
            where = f"| `{name}:{row['line']}` | `{text}`"
            if row["key"] in known:
                equivalents.append(f"{where} | {known[row['key']].replace('|', chr(92) + '|')} |")
            else:
                survivors.append(f"{where} | {row['status']} |")
    rows.append("| **all** | " + " | ".join(map(str, totals)) + f" | {share(totals)} |")
    everything, run, killed, _, equal, _ = totals
    judged = max(1, run - equal)
    late = sum(row["by"].startswith(MUTANTS_TESTS) for module in figures.values() for row in module["mutants"])
    PAGE.write_text(
        f"""# Would a test notice?

`python benchmarks/mutate.py` changes the mathematical modules in one small place at a time (an operator, a constant, a
comparison, a dropped minus, `abs`, `sqrt` or transpose, `min` for `max`, `sum` for `mean`, `vjp` for `jvp`, ...) and
runs the tests of that module. A mutant is *killed* when a test fails, or when the change makes the tests outlast three
times their usual processor time; messages, docstrings, annotations and class attributes are left alone. *Equivalent*
mutants survive because they change nothing that can be observed, or only a tolerance; the last table says why for each.
They stay out of the share of killed ones; those that no test reaches count against it.

{run} of the {everything} mutants of these modules were run; an outcome is kept until its statement changes. **Killed:
{killed} of {judged} ({100 * killed / judged:.1f}%).** Of these, {late} fell to tests in `{MUTANTS_TESTS}`, which were
written for mutants that had survived the others. The quickest tests run first: some would have fallen to others too.

| module | mutants that exist | run | killed | survived | of these equivalent | not covered | killed, % |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

## Survivors that a test should notice

| where | function, statement, column, change | |
| --- | --- | --- |
{chr(10).join(survivors) or "| none | | |"}

## Equivalent mutants

| where | function, statement, column, change | why |
| --- | --- | --- |
{chr(10).join(equivalents)}
""",
        encoding="utf-8",
    )


def share(counts: list[int]) -> str:
    """The share of killed mutants among those that are not equivalent."""
    _, run, killed, _, equivalent, _ = counts
    return f"{100 * killed / (run - equivalent):.1f}" if run > equivalent else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("modules", nargs="*", help=f"out of {', '.join(TESTS)}; hnkit/ may be left out")
    parser.add_argument("--sample", type=int, default=0, help="mutants of each module, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true", help="only those that survived last time")
    parser.add_argument("--new", action="store_true", help="only those that have no outcome yet")
    parser.add_argument("--tests", nargs="*", default=[], help="with --survivors: only these files, new tests say")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    modules = [name if "/" in name else f"hnkit/{name}" for name in options.modules] or list(TESTS)
    unknown = [name for name in modules if name not in TESTS]
    if options.tests and not options.survivors:
        parser.error("--tests goes with --survivors")
    if unknown:
        parser.error(f"unknown module {unknown[0]!r}: one of {', '.join(TESTS)}")
    if not options.page:
        work_on(modules, options)
    write_page()


def work_on(modules: list[str], options: argparse.Namespace) -> None:
    """Copy the project, collect the tests once, run the mutants."""
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        work = Path(folder).resolve()
        ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
        for name in KEPT:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, work / name, **({"ignore": ignore} if (ROOT / name).is_dir() else {}))
        os.chdir(work)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        sys.path.insert(0, str(work))
        import hypothesis
        import pytest

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # a failure need not be made small
        hypothesis.settings.register_profile("mutants", database=None, deadline=None, derandomize=True, phases=phases)
        hypothesis.settings.load_profile("mutants")
        files = sorted({path for name in modules for path in files_of(name, options.tests)})
        plugins = [flag for name in ("cacheprovider", "cov", "xdist", "randomly") for flag in ("-p", f"no:{name}")]
        arguments = ["-q", "-s", "--no-header", "--disable-warnings", "-o", "timeout=0", *plugins, *files]
        code = pytest.main(arguments, plugins=[Laboratory(work, options, modules)])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise SystemExit(f"the tests could not be collected: pytest says {code!r}")
    for name in modules:
        missing = f"{name.replace('/', '.')}"
        assert str(work) in str(getattr(sys.modules[missing], "__file__", "")), f"{missing} is not the copy"


if __name__ == "__main__":
    main()
