"""Kill hnkit at random moments, go on each time, and compare the end with a run that was left in peace.

Half of the kills come after a random time, half at a random write of the run's own (a flush, a rename), so that many
fall inside a checkpoint. SIGKILL, SIGTERM, SIGINT, SIGHUP and SIGUSR1 alternate at random; in training a reward may
raise instead, at a random call, and a fifth of the attempts write their progress into a pipe that nobody reads. Every
finished run must equal the undisturbed one byte for byte: adapter, metrics, report, page, plots, images and last
checkpoint; of a comparison, everything but the seconds that images took. `verify-bound` is not resumed but run again;
what a killed one leaves may not look finished.

    python benchmarks/kill_test.py --kills 60
    python benchmarks/kill_test.py --kills 50 --backend digits --set train.steps=30
    python benchmarks/kill_test.py --kills 20 --command generate
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SETTINGS = {
    "steps": 60,
    "batch": 16,
    "checkpoint_every": 4,
    "measure_every": 15,
    "measure_samples": 32,
    "validate_every": 30,
    "ema": 0.9,
    "kl": "second-order",
}
COMPARISON = {
    "best_of": 2, "steps": "[2]", "diversity_prompts": 1, "diversity_seeds": 2, "measure_samples": 2, "grid": 1,
    "train_steps": 2, "prompts": 2, "ranks": "[]", "losses": "[]",
}  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
WRITES = ("fsync", "rename", "replace", "mkdir")
NEVER_COMPARED = {"timings.jsonl", ".lock", ".lock-holder"}
TIMED = ("seconds", "seconds_per_image", "sha256")
"""Keys of a comparison's documents that time changes, and their seals."""
SHOW_TIMES = {"report.html", "table-1.csv", "steps.csv", "ranks.csv", "losses.csv", "gain-against-cost.png"}
"""Files of a comparison that show them."""
RAISED = 2
"""Exit code of a run whose reward raised."""

Prepare = Callable[[], None]


@dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
        start: its arguments, but for `--out`.
        resume: the arguments of going on, but for the folder; `None`: it is run again.
        begun: the file whose presence means that a folder can be gone on with.
    """

    start: list[str]
    resume: list[str] | None
    begun: str


def commands(name: str, backend: str, overrides: list[str]) -> Command:
    """The command `name` on small work."""
    flags = [flag for override in overrides for flag in ("--set", override)]
    if name == "train":
        settings = [f"train.{key}={value}" for key, value in SETTINGS.items()] if backend == "toy" else []
        flags = [flag for override in [*settings, *overrides] for flag in ("--set", override)]
        return Command(["train", "--backend", backend, *flags], ["train", "--resume"], "config.toml")
    if name == "generate":
        prompts = ("a red three", "a two left of a nine")
        asked = [flag for prompt in prompts for flag in ("--prompt", prompt)]
        return Command(
            ["generate", "--backend", "digits", *asked, "--count", "3", *flags],
            ["generate", "--resume"],
            "generate.json",
        )
    if name == "compare":
        settings = [flag for key, value in COMPARISON.items() for flag in ("--set", f"compare.{key}={value}")]
        methods = ["--methods", "base,hypernoise,best-of-n", "--seeds", "2", "--set", "train.batch=4"]
        start = ["compare", "--backend", "digits", *methods, *settings, *flags]
        return Command(start, ["compare", "--backend", "digits", "--resume"], "plan.json")
    return Command(["verify-bound", "--toy", "linear-gaussian", "--samples", "128", *flags], None, "report.html")


def spawn(arguments: list[str], log: Path, prepare: Prepare, *, unread: bool = False) -> int:
    """Run the command line in a forked process, which saves the seconds of importing; returns its id."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    if unread:  # as a terminal that is gone, or `2>&1 | head`
        reader, descriptor = os.pipe()
        os.close(reader)
    os.dup2(descriptor, 2)
    code = 1
    try:
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


def signal_at_write(count: int, signum: int) -> Prepare:
    """Make the process signal itself just before its `count`-th write operation."""

    def prepare() -> None:
        calls = iter(range(1, 10**9))
        for name in WRITES:
            plain = getattr(os, name)

            def watched(*arguments, _plain=plain, **options):
                if next(calls) == count:
                    os.kill(os.getpid(), signum)
                return _plain(*arguments, **options)

            setattr(os, name, watched)

    return prepare


def raise_at_reward(count: int) -> Prepare:
    """Make the `count`-th call of a reward raise."""

    def prepare() -> None:
        rewards = importlib.import_module("hnkit.rewards")
        calls, plain = iter(range(1, 10**9)), rewards.score

        class Raising:
            name = "raising"

            def __call__(self, *_):
                raise ConnectionError("the scorer's service is gone")

        rewards.score = lambda reward, *rest: plain(Raising() if next(calls) == count else reward, *rest)

    return prepare


def outcome(folder: Path, steps: int | None, timed: bool = False) -> dict[str, bytes]:
    """Everything a run is for: of checkpoints only the last of each training, since a stop adds some.

    `timed`: it is a comparison, whose own documents say how long each image took.
    """
    last = f"step-{steps:08d}" if steps is not None else None

    def content(path: Path) -> bytes:
        own = timed and path.parent in (folder, folder / "parts")
        if own and path.suffix == ".json":
            return json.dumps(timeless(json.loads(path.read_bytes()))).encode()
        return path.read_bytes().replace(str(folder).encode(), b"FOLDER")

    return {
        str(path.relative_to(folder)): content(path)
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


def exit_code(status: int) -> int:
    """The exit status of a child as a shell would show it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class KillTest:
    """Runs, kills and comparisons, with their counts."""

    def __init__(self, work: Path, name: str, backend: str, overrides: list[str], seed: int) -> None:
        self.work, self.random, self.name = work, random.Random(seed), name
        self.command = commands(name, backend, overrides)
        self.log = work / "log.txt"
        self.counts: Counter[str] = Counter()
        self.runs = 0

    def reference(self) -> tuple[dict[str, bytes], int | None, float]:
        """The undisturbed run: its files, its steps, and how long it took."""
        begun = time.monotonic()
        arguments = [*self.command.start, "--out", str(self.work / "whole")]
        code = exit_code(os.waitpid(spawn(arguments, self.log, lambda: None), 0)[1])
        if code:
            raise SystemExit(f"the undisturbed run failed with {code}:\n{self.log.read_text()}")
        seconds = time.monotonic() - begun
        report = json.loads((self.work / "whole" / "report.json").read_text())
        steps = report["step"] if self.name == "train" else None
        return outcome(self.work / "whole", steps, self.name == "compare"), steps, seconds

    def attempt(self, folder: Path, seconds: float, quiet: bool) -> int:
        """Start or go on with the run in `folder`, and disturb it unless `quiet`; returns its exit code."""
        begun = self.command.resume is not None and (folder / self.command.begun).exists()
        if not begun:
            finished = (folder / self.command.begun).exists() and not (folder / "unfinished.json").exists()
            if self.command.resume is None and finished:
                raise SystemExit(f"{folder} was killed and looks finished")
            shutil.rmtree(folder, ignore_errors=True)
        arguments = [*self.command.resume, str(folder)] if begun else [*self.command.start, "--out", str(folder)]
        signum = self.random.choice(SIGNALS)
        unread = not quiet and self.random.random() < 0.2
        kind = "quiet" if quiet else self.random.choices(["write", "time", "reward"], [5, 5, self.name == "train"])[0]
        prepare: Prepare = lambda: None  # noqa: E731
        if kind == "write":
            prepare = signal_at_write(self.random.randint(1, 40), signum)
        elif kind == "reward":
            prepare = raise_at_reward(self.random.randint(2, 30))
        child = spawn(arguments, self.log, prepare, unread=unread)
        if kind == "time":
            time.sleep(self.random.uniform(0, 0.4 * seconds))
            # the child is not waited for yet, so its id cannot have been given to another process
            os.kill(child, signum)
        code = exit_code(os.waitpid(child, 0)[1])
        self.counts["with output that nobody reads"] += unread
        if kind == "reward" and code == RAISED:
            self.counts["a reward that raised"] += 1
        elif kind in ("write", "time") and code == 128 + signum:
            self.counts[signal.Signals(signum).name] += 1
            self.counts["at a write" if kind == "write" else "at a random time"] += 1
            self.counts["before the run began"] += not (folder / self.command.begun).exists()
            self.counts["inside a checkpoint or another write"] += any(folder.rglob(".*tmp"))
        elif code:
            raise SystemExit(f"exit code {code} after {signal.Signals(signum).name}:\n{self.log.read_text()[-3000:]}")
        return code

    def kills(self) -> int:
        """Kills and raised rewards so far."""
        return sum(self.counts[signum.name] for signum in SIGNALS) + self.counts["a reward that raised"]

    def run(self, kills: int) -> bool:
        """Kill that often; True if every run ended as the undisturbed one."""
        expected, steps, seconds = self.reference()
        while self.kills() < kills:
            folder = self.work / f"run-{self.runs}"
            while self.attempt(folder, seconds, quiet=self.kills() >= kills):
                continue
            self.runs += 1
            found = outcome(folder, steps, self.name == "compare")
            different = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            if different:
                print(f"{folder} differs from the undisturbed run in {', '.join(different)}")
                return False
            shutil.rmtree(folder)
        if "Traceback" in self.log.read_text():
            print(f"a traceback was printed:\n{self.log.read_text()[-3000:]}")
            return False
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", default="train", choices=("train", "generate", "compare", "verify-bound"))
    parser.add_argument("--backend", default="toy")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    options = parser.parse_args()
    # imported once, before any fork: numerics run in the children alone
    modules = ["hnkit.cli.app", "hnkit.training.run", "hnkit.toy.backend", "matplotlib.backends.backend_agg"]
    if options.command in ("generate", "compare") or options.backend != "toy":
        modules += ["hnkit.scaled.digits.backend", "hnkit.scaled.compare.run", "diffusers", "transformers", "peft"]
    for module in modules:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="hnkit-kill-") as work:
        test = KillTest(Path(work), options.command, options.backend, options.set, options.seed)
        begun = time.monotonic()
        whole = test.run(options.kills)
    figures = ", ".join(f"{name} {count}" for name, count in test.counts.items())
    seconds = time.monotonic() - begun
    print(f"{test.kills()} kills ({figures}), {test.runs} finished runs, {seconds:.0f} s, seed {options.seed}")
    print("every finished run is bit-identical to the undisturbed one" if whole else "FAILED")
    raise SystemExit(0 if whole else 1)


if __name__ == "__main__":
    main()
