"""Kill hnkit at random moments, go on each time, and compare the end with a run that was left in peace.

Runs of `train`, `generate`, `compare` and `verify-bound` are ended by SIGKILL, SIGTERM, SIGINT, SIGHUP, SIGUSR1, a
terminal that goes away, and, where there are rewards, one that raises. Half of the signals come after a random time,
half at a random write of the run's own (a flush, a rename), so that many fall inside a checkpoint; some hit a process
of its own, `python -m hnkit`, that may still be starting; a fifth of the others write their progress into a pipe that
nobody reads. Every finished run must equal the undisturbed one byte for byte: adapter, metrics, report, page, plots,
images and last checkpoint; of a comparison, everything but the seconds that images took.

    python benchmarks/kill_test.py --workers 16            # 100 kills over all commands: docs/results/kills.json
    python benchmarks/kill_test.py --kills 8 --command generate --out x.json

The report is written after each run that was gone on with to its end, so that what is known stays if this is stopped.
Undisturbed runs are kept in the user's cache, by code, versions and machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import importlib
import json
import os
import platform
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "kills.json"
SENTENCES = Path(__file__).resolve().with_name("kill_prompts.txt")
TRAIN = {
    "toy": {
        "steps": 60, "batch": 16, "checkpoint_every": 4, "measure_every": 15, "measure_samples": 32,
        "validate_every": 30, "ema": 0.9, "kl": "second-order",
    },
    "digits": {
        "steps": 9, "batch": 2, "checkpoint_every": 2, "measure_samples": 2, "measure_method": "second-order",
        "validate_every": 4, "validate_samples": 4, "ema": 0.9,
    },
}  # fmt: skip
COMPARISON = {
    "best_of": 2, "steps": "[2]", "diversity_prompts": 1, "diversity_seeds": 2, "measure_samples": 2, "grid": 1,
    "train_steps": 2, "prompts": 2, "ranks": "[]", "losses": "[]",
}  # fmt: skip
PROMPTS = ("a red three", "a two left of a nine")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TERMINAL, REWARD = "a lost terminal", "a reward that raises"
WRITES = ("fsync", "rename", "replace", "mkdir")
MARK = ".hnkit-run"
"""What a run folder has from its first moment."""
NEVER_COMPARED = {"timings.jsonl", ".lock", ".lock-holder"}
TIMED = ("seconds", "seconds_per_image", "sha256")
"""Keys of a comparison's documents that time changes, and their seals."""
SHOW_TIMES = {"report.html", "table-1.csv", "steps.csv", "ranks.csv", "losses.csv", "gain-against-cost.png"}
"""Files of a comparison that show them."""
RAISED = 2
"""Exit code of a run whose reward raised."""
STARTING = 5.0
"""Seconds in which a process of its own may still be importing."""
LIMIT = 240.0
"""Seconds after which a run that does not end is a failure."""
IN_A_ROW = 4
"""Kills of one run at most."""

Prepare = Callable[[], None]


@dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
        name: its name.
        start: its arguments, but for `--out`.
        resume: the arguments of going on, but for the folder.
        begun: the file whose presence means that a folder can be gone on with.
        rewards: whether it calls any.
    """

    name: str
    start: tuple[str, ...]
    resume: tuple[str, ...]
    begun: str
    rewards: bool = False


def command(name: str, backend: str, overrides: list[str]) -> Command:
    """The command `name` on small work."""
    settings = [f"train.{key}={value}" for key, value in TRAIN[backend].items()] if name == "train" else []
    settings += [f"compare.{key}={value}" for key, value in COMPARISON.items()] if name == "compare" else []
    settings += ["train.batch=2"] if name == "compare" else []
    settings += [f"train.prompts={SENTENCES}"] if name == "compare" or (name == "train" and backend == "digits") else []
    flags = [flag for override in [*settings, *overrides] for flag in ("--set", override)]
    if name == "train":
        return Command(name, ("train", "--backend", backend, *flags), ("train", "--resume"), "config.toml", True)
    if name == "generate":
        asked = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
        start = ("generate", "--backend", "digits", "--adapter", "bundled", *asked, "--count", "3", *flags)
        return Command(name, start, ("generate", "--resume"), "generate.json")
    if name == "compare":
        start = ("compare", "--backend", "digits", "--methods", "base,hypernoise,best-of-n", "--seeds", "2", *flags)
        return Command(name, start, ("compare", "--backend", "digits", "--resume"), "plan.json", True)
    start = ("verify-bound", "--toy", "linear-gaussian", "--toy", "rotation", "--samples", "128")
    return Command(name, start, ("verify-bound", "--resume"), "verify.json")


def modules(name: str, backend: str) -> list[str]:
    """What is imported once, before any fork: numerics run in the children alone."""
    found = ["hnkit.cli.app", "hnkit.training.run", "hnkit.toy.backend", "matplotlib.backends.backend_agg"]
    if name in ("generate", "compare") or (name == "train" and backend != "toy"):
        found += ["hnkit.scaled.digits.backend", "hnkit.scaled.compare.run", "diffusers", "transformers", "peft"]
    return [*found, "hnkit.checks.verify_toys"]


# --- one process -------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """A run in a process: its id, and the master's side of its terminal, where it has one."""

    pid: int
    terminal: int | None = None
    status: int | None = None

    def leave(self, seconds: float, there: Path | None = None) -> None:
        """Let it run for so long, until a file is there or it ends; what it says to its terminal is read."""
        until = time.monotonic() + seconds
        while self.status is None and (left := until - time.monotonic()) > 0 and not (there and there.exists()):
            if self.terminal is None:
                time.sleep(min(left, 0.01))
            elif select.select([self.terminal], [], [], min(left, 0.05))[0]:
                self._read()
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if ended else None

    def _read(self) -> None:
        try:
            os.read(self.terminal or 0, 2**16)
        except OSError as error:
            if error.errno != errno.EIO:  # nobody holds the other side any more
                raise

    def end(self) -> int:
        """Wait for it; its exit status as a shell shows it.

        Raises:
            Failed: it does not end.
        """
        self.leave(LIMIT)
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise Failed(f"the process did not end within {LIMIT:.0f} s")
        self.hang_up()
        return 128 + os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else os.WEXITSTATUS(self.status)

    def hang_up(self) -> None:
        """Take its terminal away."""
        if self.terminal is not None:
            os.close(self.terminal)
            self.terminal = None


class Failed(Exception):  # noqa: N818 - a finding
    """What was promised did not hold; the message says what."""


def spawn(arguments: list[str], log: Path, prepare: Prepare, *, unread: bool = False, terminal: bool = False) -> Child:
    """Run the command line in a forked process, which saves the seconds of importing."""
    pid, master = pty.fork() if terminal else (os.fork(), None)
    if pid:
        return Child(pid, master)
    code = 1
    try:
        if not terminal:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            if unread:  # `2>&1 | head`
                reader, descriptor = os.pipe()
                os.close(reader)
            os.dup2(descriptor, 2)
        # streams of its own: what the parent's still hold is the parent's to write
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        prepare()
        sys.argv = ["hnkit", *arguments]
        importlib.import_module("hnkit.cli.app").main()
    except SystemExit as end:
        code = int(end.code or 0)
    except KeyboardInterrupt:  # before the command line could take it
        code = 130
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                continue
        os._exit(code)


def spawn_anew(arguments: list[str], log: Path) -> Child:
    """Run the command line in a process that imports everything itself."""
    with log.open("ab") as file:
        process = subprocess.Popen([sys.executable, "-m", "hnkit", *arguments], stdout=file, stderr=file)
    child = Child(process.pid)
    process.returncode = 0  # it is waited for here, not by its object
    return child


def at_write(act: Callable[[int], None]) -> Prepare:
    """Call `act` with the number of each write operation, just before it."""

    def prepare() -> None:
        calls = iter(range(1, 10**9))
        for name in WRITES:
            plain = getattr(os, name)

            def watched(*arguments: Any, _plain: Callable[..., Any] = plain, **options: Any) -> Any:
                act(next(calls))
                return _plain(*arguments, **options)

            setattr(os, name, watched)

    return prepare


def signal_at_write(count: int, signum: int) -> Prepare:
    """Make the process signal itself just before its `count`-th write operation."""
    return at_write(lambda number: os.kill(os.getpid(), signum) if number == count else None)


def raise_at_reward(count: int) -> Prepare:
    """Make the `count`-th call of a reward raise."""

    def prepare() -> None:
        rewards = importlib.import_module("hnkit.rewards")
        calls, plain = iter(range(1, 10**9)), rewards.score

        class Raising:
            name = "raising"

            def __call__(self, *_: object) -> None:
                raise ConnectionError("the scorer's service is gone")

        rewards.score = lambda reward, *rest: plain(Raising() if next(calls) == count else reward, *rest)

    return prepare


# --- what a run is for -------------------------------------------------------------------------------------------


def outcome(folder: Path, command: Command) -> dict[str, str]:
    """Digests of everything a run is for: of checkpoints only the last of each training, since a stop adds some."""
    timed = command.name == "compare"
    last = None
    if command.name == "train":
        last = f"step-{json.loads((folder / 'report.json').read_text())['step']:08d}"

    def content(path: Path) -> bytes:
        own = timed and path.parent in (folder, folder / "parts")
        if own and path.suffix == ".json":
            return json.dumps(timeless(json.loads(path.read_bytes()))).encode()
        return path.read_bytes().replace(str(folder).encode(), b"FOLDER")

    return {
        str(path.relative_to(folder)): hashlib.sha256(content(path)).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in NEVER_COMPARED
        and not (timed and path.parent == folder and path.name in SHOW_TIMES)
        and ("checkpoints" not in path.parts or path.parent.name == last)
    }


def timeless(document: object) -> object:
    """A document without what time changes."""
    if isinstance(document, dict):
        return {key: timeless(value) for key, value in document.items() if key not in TIMED}
    return [timeless(entry) for entry in document] if isinstance(document, list) else document


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: digests of its files, its seconds, those with a folder, and its write operations."""

    files: dict[str, str]
    seconds: float
    working: float
    writes: int


def reference(command: Command, work: Path) -> Reference:
    """The undisturbed run; one of the same code, versions and machine is taken from the user's cache."""
    from hnkit.internal.cache import cache_folder
    from hnkit.internal.files import read_sealed, write_sealed
    from hnkit.internal.versions import code_digest, versions

    made_with = [code_digest(), versions(), platform.node(), dataclasses.asdict(command), Path(__file__).read_text()]
    key = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:24]
    cache = cache_folder("kill-test")
    if cache is not None:
        try:
            return Reference(**read_sealed(cache / f"{key}.json"))
        except (OSError, ValueError, TypeError):
            cache.mkdir(parents=True, exist_ok=True)
    folder, log, tally = (work / f"{command.name}-{kind}" for kind in ("whole", "whole.txt", "writes"))
    descriptor = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    begun = time.monotonic()
    child = spawn([*command.start, "--out", str(folder)], log, at_write(lambda _: os.write(descriptor, b".") and None))
    child.leave(LIMIT, folder / MARK)
    marked = time.monotonic()
    code = child.end()
    ended = time.monotonic()
    os.close(descriptor)
    if code:
        raise Failed(f"the undisturbed run failed with {code}: {log.read_text()[-2000:]}")
    found = Reference(outcome(folder, command), ended - begun, ended - marked, tally.stat().st_size)
    if cache is not None:
        write_sealed(cache / f"{key}.json", dataclasses.asdict(found))
    return found


# --- a run that is killed and gone on with -----------------------------------------------------------------------


@dataclass
class Killed:
    """What became of one run: its kills by what they were, and what went wrong, if anything did."""

    command: str
    kills: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    failure: str = ""


def killed(command: Command, whole: Reference, work: Path, number: int, seed: int, most: int) -> Killed:
    """Start a run, kill it up to `most` times, go on each time, and compare its end with the undisturbed one."""
    begun, found = time.monotonic(), Killed(command.name)
    dice = random.Random(f"{seed} {command.name} {number}")
    folder, log = work / f"{command.name}-{number}", work / f"{command.name}-{number}.txt"
    log.touch()
    try:
        tries = 0
        while attempt(command, whole, folder, log, dice, found, quiet=found.kills.total() >= most or tries >= 3 * most):
            tries += 1
        files = outcome(folder, command)
        if different := sorted(name for name in whole.files | files if whole.files.get(name) != files.get(name)):
            raise Failed(f"it differs from the undisturbed run in {', '.join(different)}")
        if "Traceback" in (text := log.read_text(errors="replace")):
            raise Failed(f"a traceback was printed: {text[-3000:]}")
    except Failed as failure:
        found.failure = f"{folder.name}, {dict(found.kills)}: {failure}"
    except Exception as error:  # noqa: BLE001 - a finding too; the other runs go on
        found.failure = f"{folder.name}, {dict(found.kills)}: {type(error).__name__}: {error}"
    else:
        shutil.rmtree(folder)
    found.seconds = time.monotonic() - begun
    return found


def attempt(
    command: Command, whole: Reference, folder: Path, log: Path, dice: random.Random, found: Killed, *, quiet: bool
) -> int:
    """Start or go on with the run in `folder`, and disturb it unless `quiet`; returns its exit code."""
    begun = (folder / command.begun).exists()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    arguments = [*command.resume, str(folder)] if begun else [*command.start, "--out", str(folder)]
    signum = dice.choice(SIGNALS)
    kinds = {"write": 10, "time": 6, "anew": 2, TERMINAL: 3, REWARD: 4 * command.rewards}
    kind = "quiet" if quiet else dice.choices([*kinds], [*kinds.values()])[0]
    unread = kind in ("write", "time") and dice.random() < 0.2
    late = dice.random() < 0.8  # in a short run most of the time goes by before there is anything to lose
    starting = STARTING if kind == "anew" else 0
    span = dice.uniform(0, 0.8 * whole.working if late else 0.5 * whole.seconds + starting)
    prepare: Prepare = lambda: None  # noqa: E731
    if kind == "write":
        prepare = signal_at_write(dice.randint(1, max(2, whole.writes // 2)), signum)
    elif kind == REWARD:
        prepare = raise_at_reward(dice.randint(2, 12))
    if kind == "anew":
        child = spawn_anew(arguments, log)
    else:
        child = spawn(arguments, log, prepare, unread=unread, terminal=kind == TERMINAL)
    if kind in ("time", "anew", TERMINAL):
        if late and begun:
            child.leave(whole.seconds - whole.working)
        elif late:
            child.leave(LIMIT, folder / MARK)
        child.leave(span)
        if kind == TERMINAL:
            child.hang_up()
        elif child.status is None:  # it is not waited for yet, so its id cannot be another process's
            os.kill(child.pid, signum)
    code = child.end()
    expected = {"quiet": 0, REWARD: RAISED, TERMINAL: 128 + signal.SIGHUP}.get(kind, 128 + signum)
    if not code:
        return code
    if code != expected:
        raise Failed(f"exit code {code} after {kind}, {signum.name}: {log.read_text(errors='replace')[-3000:]}")
    found.kills[kind if kind in (TERMINAL, REWARD) else signum.name] += 1
    where = {"write": "at a write", "time": "at a random time", "anew": "in a process of its own"}
    found.seen[where.get(kind, "")] += 1
    found.seen["with output that nobody reads"] += unread
    found.seen["before the run began"] += not (folder / command.begun).exists()
    found.seen["inside a write"] += any(folder.rglob(".*tmp"))
    return code


# --- all of them -------------------------------------------------------------------------------------------------


class Report:
    """The figures so far, written after each run."""

    def __init__(self, path: Path, seed: int, workers: int) -> None:
        self.path, self.begun = path, time.monotonic()
        self.document: dict[str, Any] = {
            "seed": seed,
            "workers": workers,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "torch": version("torch"),
            "finished": False,
            "seconds": 0.0,
            "commands": {},
            "failures": [],
        }

    def begin(self, name: str, whole: Reference) -> None:
        """A command whose undisturbed run is known."""
        self.document["commands"][name] = {
            "undisturbed_seconds": round(whole.seconds, 1), "kills": {}, "seen": {}, "runs": 0, "different": 0,
            "seconds": 0.0,
        }  # fmt: skip

    def add(self, run: Killed) -> None:
        """A run that has ended."""
        figures = self.document["commands"][run.command]
        for key, counts in (("kills", run.kills), ("seen", run.seen)):
            figures[key] = dict(sorted((Counter(figures[key]) + counts).items()))
        figures["seen"].pop("", None)
        figures["runs"] += 1
        figures["different"] += bool(run.failure)
        figures["seconds"] = round(figures["seconds"] + run.seconds, 1)
        if run.failure:
            self.document["failures"].append(run.failure)
        self.write()

    def write(self) -> None:
        """Write what is known so far."""
        self.document["seconds"] = round(time.monotonic() - self.begun, 1)
        whole = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        whole.write_text(json.dumps(self.document, indent=1) + "\n")
        whole.replace(self.path)


def run_all(names: list[Command], work: Path, report: Report, kills: int, seed: int, pool: ProcessPoolExecutor) -> None:
    """Kill so often, shared out evenly over the commands; the slowest begin first."""
    references = {one.name: pool.submit(reference, one, work) for one in names}
    wholes = {name: future.result() for name, future in references.items()}
    names = sorted(names, key=lambda one: -wholes[one.name].seconds)
    left = {one.name: kills // len(names) + (place < kills % len(names)) for place, one in enumerate(names)}
    for name, whole in wholes.items():
        report.begin(name, whole)
    running: dict[Future[Killed], int] = {}
    started: Counter[str] = Counter()
    while any(left.values()) or running:
        for one in names:
            while left[one.name]:
                most = min(IN_A_ROW, left[one.name])
                future = pool.submit(killed, one, wholes[one.name], work, started[one.name], seed, most)
                running[future] = most
                started[one.name] += 1
                left[one.name] -= most
        ended, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            run, most = future.result(), running.pop(future)
            if not run.failure:  # what came too late for a kill is tried again
                left[run.command] += most - run.kills.total()
            report.add(run)


def prepare_worker(names: list[str]) -> None:
    """Import once what the forks need; signals that whoever started this ignores (`nohup`, `&`) do what they do."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in names:
        importlib.import_module(name)
    importlib.import_module("tqdm").tqdm.get_lock()  # one that its forks share, and that is given back at the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ("train", "generate", "compare", "verify-bound")
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, each with one thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", action="append", choices=every, help="repeatable; default: all")
    parser.add_argument("--backend", default="digits", choices=tuple(TRAIN), help="what is trained")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="for one command")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    names = [command(name, options.backend, options.set) for name in options.command or every]
    needed = list(dict.fromkeys(module for one in names for module in modules(one.name, options.backend)))
    report = Report(options.out, options.seed, options.workers)
    with tempfile.TemporaryDirectory(prefix="hnkit-kill-") as work:
        pool = ProcessPoolExecutor(options.workers, get_context("spawn"), prepare_worker, (needed,))
        try:
            run_all(names, Path(work), report, options.kills, options.seed, pool)
            report.document["finished"] = True
        except Failed as failure:
            report.document["failures"].append(str(failure))
        finally:
            pool.shutdown(cancel_futures=True)
            report.write()
    document = report.document
    for name, figures in document["commands"].items():
        count = sum(figures["kills"].values())
        print(f"{name}: {count} kills, {figures['runs']} runs, {figures['different']} different; {figures['kills']}")
    print(f"{document['seconds']:.0f} s, seed {options.seed}: {options.out}")
    for failure in document["failures"]:
        print(failure)
    print("every finished run is bit-identical to the undisturbed one" if not document["failures"] else "FAILED")
    raise SystemExit(1 if document["failures"] else 0)


if __name__ == "__main__":
    main()
