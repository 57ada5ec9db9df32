"""A table of bad input, generated from the commands' own flags and the configuration's own keys.

Every flag and every key must be spoilt at least once: `FLAGS` and the dataclasses say what there is, so a new flag or
key without a bad value here makes `test_bad_input.py` fail.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hnkit.backend import backend_factory
from hnkit.config import TrainConfig
from hnkit.internal.files import sealed
from hnkit.scaled.compare.plan import Plan

BACKENDS = ("toy", "digits", "sana", "sd-turbo", "flux")

PLAN: dict[str, Any] = {
    "backend": "digits", "plan": Plan().to_json(), "adapter": None, "adapter_files": {}, "prompts": ["a three"],
    "overrides": [], "quick": True,
}  # fmt: skip

FILES: dict[str, str | bytes] = {
    "precious.txt": "kept\n",
    "empty.txt": "",
    "blank.txt": " \n\t\n\n",
    "latin1.txt": b"caf\xe9\n",
    "prompts.txt": "a red fox\ntwo blue cats\n",
    "no-suffix": "a red fox\n",
    "prompts.csv": "a red fox\n",
    "commas.csv": "prompt\na red fox, asleep\n",
    "short.csv": "prompt,id\na red fox\n",
    "open.csv": 'prompt\n"a red fox\n',
    "cut.parquet": "PAR1",
    "two/prompts.txt": "a red fox\ntwo blue cats\n",
    "empty.json": "",
    "number.json": "3",
    "numbers.json": "[1, 2]",
    "nested.json": '[["a"]]',
    "cut.json": '["a red fox", "two bl',
    "deep.json": "[" * 100_000,
    "field.jsonl": '{"text": "a"}\n',
    "kind.jsonl": '{"prompt": 3}\n',
    "cut.jsonl": '{"prompt": "a"}\n{"prompt": "b\n',
    "surrogate.json": '["a\\ud800b"]',
    "empty.toml": "",
    "latin1.toml": b'[train]\nprompts = "\xe9"\n',
    "open.toml": "[train\n",
    "twice.toml": "[train]\nsteps = 1\nsteps = 2\n",
    "deep.toml": f"a = {'[' * 5000}",
    "binary.toml": bytes(range(256)),
    "scalar.toml": "train = 3\n",
    "array.toml": "[[train]]\nsteps = 1\n",
    "table.toml": "[trian]\nsteps = 1\n",
    "date.toml": "[train]\nlr = 1979-05-27\n",
    "nul.toml": '[train]\nprompts = "a\\u0000b.txt"\n',
    "code.toml": '[rewards]\n"os:system" = 1.0\n',
    "code-heldout.toml": '[heldout]\n"os:system" = 1.0\n',
    "backend-number.toml": "[backend]\nname = 3\n",
    "backend-unknown.toml": '[backend]\nname = "os"\n',
    "backend-path.toml": '[backend]\nname = "hnkit.toy.backend:FACTORY"\n',
    "scores.csv": "prompt,method,reward\n" + "".join(f"a,base,{k % 7}\na,ours,{k}\n" for k in range(40)),
    "weird.py": "def f(x):\n    return x * float('nan')\ndef r(images, prompts):\n    return images\nnumber = 3\n",
    "adapter-empty/adapter.json": "",
    "adapter-list/adapter.json": "[]",
    "adapter-path/adapter.json": json.dumps({"format": "hnkit-toy-adapter-1", "problem": "../../x"}),
    "run-cut/config.toml": "[train]\nsteps = ",
    "run-foreign/config.toml": '[backend]\nname = "nonesuch"\n',
    "run-key/config.toml": '[backend]\nname = "toy"\n[train]\nstepz = 1\n',
    "run-code/config.toml": '[backend]\nname = "toy"\n[rewards]\n"os:system" = 1.0\n',
    "plan-cut/plan.json": '{"backend": "digits", ',
    "plan-list/plan.json": "[]",
    "plan-unsealed/plan.json": json.dumps(PLAN),
    "plan-type/plan.json": json.dumps(sealed(PLAN | {"plan": 3})),
    "plan-prompts/plan.json": json.dumps(sealed(PLAN | {"prompts": [3]})),
    "plan-empty/plan.json": json.dumps(sealed(PLAN | {"prompts": []})),
    "plan-adapter/plan.json": json.dumps(sealed(PLAN | {"adapter": "absent", "adapter_files": {"w": "0"}})),
}
"""What lies in the working directory, beside an empty folder, a symbolic link to itself and one to nowhere."""

GENERATE = {"backend": "digits", "settings": {"count": 1}, "prompts": ["a three"], "records": {}, "overrides": [],
            "adapter": None, "adapter_files": {}, "model": None, "version": "0"}  # fmt: skip
FILES |= {
    "generate-plan/generate.json": json.dumps(sealed(GENERATE)),
    "generate-cut/generate.json": '{"sha256": ',
    "generate-keys/generate.json": json.dumps(sealed({"backend": "digits"})),
    "generate-type/generate.json": json.dumps(sealed(GENERATE | {"prompts": [3]})),
    "generate-range/generate.json": json.dumps(sealed(GENERATE | {"settings": {"count": 0}})),
    "generate-foreign/generate.json": json.dumps(sealed(GENERATE | {"backend": "os"})),
    "generate-adapter/generate.json": json.dumps(sealed(GENERATE | {"adapter": "gone", "adapter_files": {"w": "0"}})),
    "generate-lifting/generate.json": json.dumps(sealed(GENERATE | {"overrides": ["backend.local_files_only=false"]})),
}
GENERATES = tuple(name.partition("/")[0] for name in FILES if name.startswith("generate-") and "plan" not in name)
PLANS = tuple(name.partition("/")[0] for name in FILES if name.startswith("plan-"))
LONG = "x" * 300
NONE_SUCH = ("absent", "folder", "loop", "dangling", LONG, "")


@dataclass(frozen=True)
class Case:
    """A command line that must be refused, and what it spoils: a flag, or `table.key`."""

    spoils: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        words = " ".join(self.arguments)
        return ascii(words if len(words) < 90 else words[:87] + "...")


def write_files(folder: Path) -> None:
    """Fill the working directory of the cases."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "folder.toml").mkdir()
    (folder / "folder.txt").mkdir()
    (folder / "loop.toml").symlink_to("loop.toml")
    (folder / "loop.txt").symlink_to("loop.txt")


NOT_INTEGERS = ("", "x", "1.5", "nan", "inf", "1e3", "0x10", "1,2", "½", "--", "9" * 5000)
NOT_NUMBERS = ("", "x", "nan", "inf", "-inf", "1,2", "½", "1e999")
PROMPT_FILES = (
    "absent.txt", "empty.txt", "blank.txt", "latin1.txt", "no-suffix", "prompts.csv", "prompts.csv:text", "commas.csv",
    "short.csv", "open.csv", "absent.csv:text", "cut.parquet", "two", "empty.json", "number.json",
    "numbers.json", "nested.json", "cut.json", "deep.json", "field.jsonl", "kind.jsonl", "cut.jsonl", "folder.txt",
    "loop.txt", "folder", "", f"{LONG}.txt", "hf:", "hf:::", "surrogate.json", "~nonesuch-user/prompts.txt",
)  # fmt: skip
TOML_FILES = (
    "absent.toml", "folder.toml", "loop.toml", "latin1.toml", "open.toml", "twice.toml", "deep.toml", "binary.toml",
    "scalar.toml", "array.toml", "table.toml", "date.toml", "nul.toml", "code.toml", "code-heldout.toml",
    "backend-number.toml", "backend-unknown.toml", "backend-path.toml", "prompts.txt", "", f"{LONG}.toml",
)  # fmt: skip
REWARD_FLAGS = (
    "", "=", "=1", "nonesuch=1", "redness=nan", "redness=inf", "redness=x", "redness=1=2", "os:=1", ":system=1",
    "os:nonesuch=1", "no_such_module:f=1", "weird:number=1", "..weird:f=1", "/etc/passwd:f=1", "a b:c=1", "redness=",
    "clipscore=1",
)  # fmt: skip
SETS = (
    "", "=", "x", "train", "train.", "train.=1", ".=1", "train.steps", "train.nonesuch=1", "nonesuch.key=1",
    "backend.nonesuch=1", "backend.name=hnkit.toy.backend:FACTORY", "rewards.os:system=1", "heldout.os:system=1",
    "rewards.nonesuch=1", "rewards.redness=x", "rewards.redness=nan", "rewards.redness.weight=x",
    "rewards.redness.nonesuch=1", "rewards.redness.size=[1]", "rewards.=1", "heldout.redness=inf",
    "heldout.redness.weight=none", "rewards.redness.=1", "heldout.nonesuch=1", "rewards.redness.__class__=1",
)  # fmt: skip
SHAPES = (
    "",
    ",",
    "x",
    "3,",
    ",3",
    "0",
    "-1",
    "3,-1",
    "1.5",
    "nan",
    "9" * 30,
    "9" * 5000,
    "1" + ",1" * 5000 + ",0",
    "½",
)
MAPS = (
    "", ":", "os", "os:", ":f", "os:nonesuch", "weird:number", "weird:f", "no_such_module:f", "..weird:f", "os:system",
    "weird:f.g", "/etc/passwd:f", "a b:c", "os:path", "weird.py:f", "posix:abort.x",
)  # fmt: skip
# 0 means "at least one", "-1" is below every range
COUNTS = (*NOT_INTEGERS, "0", "-1")
HUGE = (*COUNTS, str(2**63), str(10**30))

TRAIN = ("train", "--backend", "toy", "--set", "train.steps=1", "--set", "train.batch=2",
         "--set", "train.measure_samples=2")  # fmt: skip
VERIFY = ("verify-bound", "--toy", "extremal", "--samples", "8")
MAP = ("verify-bound", "--map", "math:sin", "--shape", "3", "--samples", "2")
KL_MAP = ("verify-bound", "--map", "torch:sin", "--shape", "3", "--samples", "2", "--method", "arnoldi")
DIGITS = ("--backend", "digits")
FRONTIER = ("frontier", *DIGITS, "--adapter", "folder")
DIGITS_RUN = ("train", *DIGITS, "--set", "train.steps=1")

FLAGS: list[tuple[tuple[str, ...], str, tuple[str, ...]]] = [
    (("verify-bound",), "--toy", ("", "nonesuch", "toy:PROBLEMS", "linear-gaussian ", "línea", "*", LONG)),
    (("verify-bound", "--shape", "3"), "--map", MAPS),
    (("verify-bound", "--map", "torch:sin"), "--shape", SHAPES),
    (("verify-bound", "--adapter", "folder"), "--backend", ("", "nonesuch", "hnkit.toy.backend:FACTORY", LONG)),
    (("verify-bound", "--backend", "toy"), "--adapter", (*NONE_SUCH, "adapter-empty", "adapter-list", "adapter-path",
                                                         "run-cut", "run-foreign", "run-key", "run-code")),
    (("verify-bound", "--backend", "toy", "--adapter", "folder"), "--prompts", PROMPT_FILES),
    (VERIFY, "--method", ("", "nonesuch", "EXACT", "0")),
    (("verify-bound", "--toy", "extremal"), "--model-id", ("absent",)),
    (("verify-bound", "--toy", "extremal"), "--samples", HUGE),
    (VERIFY, "--seed", (*NOT_INTEGERS, "-1", str(2**63))),
    (VERIFY, "--alpha", (*NOT_NUMBERS, "0", "-1")),
    (KL_MAP, "--injection", (*NOT_NUMBERS, "0", "1", "-0.5")),
    ((*KL_MAP, "--injection", "0.5"), "--max-delta", (*NOT_NUMBERS, "0", "-1")),
    (KL_MAP, "--probes", HUGE),
    (KL_MAP, "--steps", HUGE),
    (KL_MAP, "--rel-error", (*NOT_NUMBERS, "0", "-0.1", "1")),
    (KL_MAP, "--budget", HUGE),
    (("verify-bound", "--backend", "toy", "--adapter", "folder"), "--set", ("", "x", "train.steps=1", "backend.x=1")),
    (("verify-bound",), "--resume", (*NONE_SUCH, "precious.txt", "run-key")),
    (VERIFY, "--out", ("folder", "precious.txt", "precious.txt/below", "loop", "loop/below", "dangling", LONG, "")),
    (("train",), "--backend", ("", "nonesuch", "hnkit.toy.backend:FACTORY", "TOY", LONG)),
    (TRAIN, "--config", TOML_FILES),
    (TRAIN, "--preset", ("", "nonesuch", "DEFAULT")),
    (("train", "--backend", "diffusers"), "--model-id", ("", "nobody/no-such-model", "folder", LONG)),
    (TRAIN, "--kl", ("", "nonesuch", "L2", "0")),
    (TRAIN, "--alpha", (*NOT_NUMBERS, "0", "-1")),
    (TRAIN, "--reduction", ("", "nonesuch", "SUM")),
    (("train", "--backend", "toy"), "--steps", COUNTS),
    (("train", "--backend", "toy", "--set", "train.steps=1"), "--batch", (*COUNTS, str(2**70))),
    (TRAIN, "--lr", (*NOT_NUMBERS, "0", "-1")),
    (TRAIN, "--seed", (*NOT_INTEGERS, "-1", str(2**63))),
    (TRAIN, "--reward", REWARD_FLAGS),
    (TRAIN, "--heldout", REWARD_FLAGS),
    (TRAIN, "--prompts", tuple(name for name in PROMPT_FILES if name)),
    (TRAIN, "--objective", ("", "nonesuch", "direct")),
    (TRAIN, "--from-adapter", (*(name for name in NONE_SUCH if name), "precious.txt", "adapter-empty", "adapter-list",
                               "adapter-path")),
    (("train", *DIGITS), "--model-id", ("absent", "folder", "precious.txt", LONG)),
    (TRAIN, "--out", ("folder", "precious.txt", "precious.txt/below", "loop", "loop/below", "dangling", LONG, "")),
    (("train", "--backend", "toy", "--plan"), "--card", ("", "abacus", "h1000", "24", LONG)),
    (("train",), "--resume", (*NONE_SUCH, "run-cut", "run-foreign", "run-key", "run-code", "precious.txt")),
    (TRAIN, "--set", SETS),
    (("generate",), "--backend", ("", "nonesuch", "toy", LONG)),
    (("generate", *DIGITS), "--adapter", (*NONE_SUCH, "precious.txt", "run-cut", "run-code")),
    (("generate", *DIGITS), "--prompts", PROMPT_FILES),
    (("generate", *DIGITS, "--prompt", "a three"), "--model-id", ("absent", "folder", "precious.txt", LONG)),
    (("generate", *DIGITS), "--prompt", ("", " ", "\t\n", "a photo of a cat", "\udcff", "a three " * 200)),
    (("generate", *DIGITS), "--count", COUNTS),
    (("generate", *DIGITS), "--steps", (*COUNTS, "100000")),
    (("generate", *DIGITS), "--seed", (*NOT_INTEGERS, "-1")),
    (("generate", *DIGITS), "--batch", COUNTS),
    (("generate", *DIGITS), "--layout", ("", "nonesuch", "../geneval", LONG)),
    (("generate", *DIGITS), "--set", ("", "x", "train.steps=1", "backend.nonesuch=1", "backend.size=0")),
    (("generate", *DIGITS), "--out", ("folder", "precious.txt", "loop", "loop/below", "dangling", "precious.txt/b")),
    (("frontier",), "--rewards", ("", "nonesuch.csv", "folder", "prompts.csv", "short.csv", "latin1.txt", "empty.txt")),
    (("frontier", "--rewards", "scores.csv"), "--base", ("", "nonesuch", "BASE", LONG)),
    (("frontier", "--rewards", "scores.csv"), "--out", ("folder", "precious.txt", "loop", "dangling")),
    (("frontier",), "--backend", ("", "nonesuch", "toy", LONG)),
    (("frontier", "--rewards", "scores.csv"), "--model-id", ("absent",)),
    (("frontier", *DIGITS), "--adapter", (*NONE_SUCH, "precious.txt", "run-cut", "run-code")),
    (FRONTIER, "--prompts", PROMPT_FILES),
    (FRONTIER, "--reward", REWARD_FLAGS),
    (FRONTIER, "--base-samples", (*COUNTS, "7")),
    (FRONTIER, "--samples", (*COUNTS, "1")),
    (FRONTIER, "--generator-steps", COUNTS),
    (FRONTIER, "--seed", (*NOT_INTEGERS, "-1", str(2**63))),
    (FRONTIER, "--method", ("", "nonesuch", "EXACT")),
    (FRONTIER, "--alpha", (*NOT_NUMBERS, "0", "-1")),
    (FRONTIER, "--set", ("", "x", "train.steps=1", "backend.nonesuch=1", "backend.size=0")),
    (("generate",), "--resume", (*NONE_SUCH, "precious.txt", *GENERATES)),
    (("export",), "--checkpoint", (*NONE_SUCH, "precious.txt", "run-cut", "run-code", "folder/checkpoints/step-1")),
    (("export", "--checkpoint", "folder"), "--set", ("", "x", "train.steps=1", "backend.nonesuch=1")),
    (("export", "--checkpoint", "folder"), "--out", ("folder", "precious.txt", "loop", "loop/below", "dangling")),
    (("push", "folder"), "--to", ("", "a b", "me/../x", "me/x/y", LONG)),
    (("push", "folder"), "--license", ("",)),
    (("push", "folder"), "--out", ("folder", "precious.txt", "loop", "dangling")),
    (("compare",), "--backend", ("", "nonesuch", "toy", LONG)),
    (("compare", *DIGITS), "--methods", ("", ",", "base,", "nonesuch", "base,nonesuch", "BASE", "base;reno")),
    (("compare", *DIGITS), "--adapter", (*NONE_SUCH, "precious.txt")),
    (("compare", *DIGITS), "--prompts", PROMPT_FILES),
    (("compare", *DIGITS), "--seeds", COUNTS),
    (("compare", *DIGITS), "--model-id", ("absent", "folder", "precious.txt", LONG)),
    (("compare", *DIGITS), "--power", (*NOT_NUMBERS, "0", "-0.1", "inf")),
    (("compare", *DIGITS), "--resume", (*NONE_SUCH, "precious.txt", *PLANS)),
    (("compare", *DIGITS), "--set", (*(s for s in SETS), "compare", "compare.=1", "compare.nonesuch=1")),
    (("compare", *DIGITS), "--out", ("folder", "precious.txt", "loop", "loop/below", "dangling", "precious.txt/b")),
]  # fmt: skip

CONFLICTS: list[tuple[str, ...]] = [
    ("",),
    ("nonesuch",),
    ("verify",),
    ("--nope",),
    ("verify-bound", "--nope"),
    ("verify-bound", "stray"),
    ("train", "stray"),
    ("generate", "stray"),
    ("compare", "stray"),
    ("backends", "stray"),
    ("backends", "--json", "--nope"),
    ("verify-bound", "--samples"),
    ("verify-bound", "--quick"),
    ("verify-bound", "--json=1"),
    ("verify-bound", "--certify=no", "--toy", "nonesuch"),
    ("verify-bound", "-v", "--verbose", "--toy", "nonesuch"),
    ("verify-bound", "--toy", "extremal", "--map", "torch:sin", "--shape", "3"),
    ("verify-bound", "--toy", "extremal", "--backend", "toy", "--adapter", "folder"),
    ("verify-bound", "--map", "torch:sin", "--shape", "3", "--backend", "toy"),
    ("verify-bound", "--map", "torch:sin"),
    ("verify-bound", "--shape", "3"),
    ("verify-bound", "--adapter", "folder"),
    ("verify-bound", "--prompts", "prompts.txt"),
    ("verify-bound", "--set", "backend.problem=folding"),
    ("verify-bound", "--backend", "toy"),
    ("verify-bound", "--toy", "extremal", "--injection", "0.5"),
    ("verify-bound", "--backend", "toy", "--adapter", "folder", "--injection", "0.5"),
    (*KL_MAP, "--max-delta", "2"),
    ("verify-bound", "--backend", "toy", "--adapter", "bundled"),
    ("generate", "--backend", "sana", "--adapter", "bundled"),
    ("frontier", "--backend", "sana", "--adapter", "bundled"),
    ("compare", "--backend", "sana", "--adapter", "bundled"),
    (*KL_MAP, "--alpha", "1"),
    (*KL_MAP, "--rel-error", "0.1", "--budget", "10"),
    ("verify-bound", "--map", "torch:sin", "--shape", "3", "--method", "exact", "--budget", "10"),
    ("verify-bound", "--resume"),
    ("verify-bound", "--resume", "folder", "--out", "new"),
    ("verify-bound", "--resume", "folder", "--samples", "8"),
    ("verify-bound", "--resume", "folder", "--set", "backend.problem=folding"),
    ("train",),
    ("train", "--resume", "folder", "--out", "new"),
    ("train", "--resume", "run-key", "--preset", "default"),
    ("train", "--backend", "toy", "--plan", "--out", "new"),
    ("train", "--backend", "toy", "--card", "h100"),
    ("train", "--backend", "sana", "--plan", "--set", "backend.model_id=absent"),
    ("train", "--backend", "toy", "--plan", "--kl", "arnoldi"),
    ("train", "--resume"),
    ("train", "--resume", "--out", "absent"),
    ("train", "--resume", "--out", "folder"),
    ("train", "--backend", "sana", "--config", "open.toml"),
    (*DIGITS_RUN, "--set", "backend.model_id=folder"),
    (*DIGITS_RUN, "--set", "backend.model_id=absent"),
    (*DIGITS_RUN, "--set", "backend.device=nonesuch"),
    (*DIGITS_RUN, "--set", "backend.device=cuda:99"),
    (*DIGITS_RUN, "--set", "backend.compile=nonesuch"),
    (*DIGITS_RUN, "--kl", "arnoldi", "--set", "backend.compile=eager"),
    (*DIGITS_RUN, "--set", "backend.shard=true", "--set", "backend.compile=inductor"),
    (*DIGITS_RUN, "--set", "backend.shard=true", "--set", "backend.quantize=fp8"),
    (*DIGITS_RUN, "--set", "rewards.clipscore=1", "--set", "rewards.clipscore.model_id=absent"),
    (*DIGITS_RUN, "--set", "rewards.clipscore=1", "--set", "rewards.clipscore.model_id=3"),
    (*DIGITS_RUN, "--set", "rewards.clipscore=1", "--set", "rewards.clipscore.model_id=folder"),
    (*DIGITS_RUN, "--set", "rewards.digits-clip.device=nonesuch"),
    (*DIGITS_RUN, "--prompts", "prompts.txt"),
    (*DIGITS_RUN, "--set", "train.validation_prompts=prompts.txt"),
    (*TRAIN, "--set", "train.prompts=prompts.txt", "--set", "train.validation_prompts=prompts.txt"),
    (*TRAIN, "--set", "train.nesterov=true"),
    (*TRAIN, "--set", "train.optimizer=sgd", "--set", "train.nesterov=true"),
    (*TRAIN, "--set", "train.accumulate=3"),
    (*TRAIN, "--set", "train.optimizer=adamw8bit"),
    (*TRAIN, "--set", 'train.trackers=["wandb"]'),
    (*TRAIN, "--set", "train.generator_steps=2"),
    (*TRAIN, "--set", "backend.problem=folding", "--set", "backend.hypernetwork=cnn"),
    ("export",),
    ("export", "stray"),
    ("push",),
    ("push", "absent"),
    ("push", "folder"),
    ("push", "precious.txt"),
    ("push", "folder", "stray"),
    ("train", "--backend", "toy", "--model-id", "folder"),
    ("generate",),
    ("generate", *DIGITS, "--prompt", "a three", "--prompts", "prompts.txt"),
    ("generate", "--backend", "toy", "--prompt", "a"),
    ("generate", "--backend", "sana", "--prompt", "a"),
    ("generate", "--backend", "sd-turbo", "--prompt", "a"),
    ("generate", "--backend", "flux", "--prompt", "a"),
    ("generate", "--backend", "sana", "--set", "backend.model_id=folder", "--prompt", "a"),
    ("generate", "--backend", "sana", "--set", "backend.model_id=../../etc", "--prompt", "a"),
    ("generate", "--resume"),
    ("generate", "--resume", "folder", "--out", "new"),
    ("generate", "--resume", "generate-plan", "--count", "2"),
    ("generate", "--resume", "generate-plan", "--prompt", "a three"),
    ("generate", "--resume", "generate-plan", "--set", "backend.size=32"),
    ("generate", "--resume", "generate-plan", "--backend", "toy"),
    ("generate", "--resume", "generate-plan", "--model-id", "absent"),
    ("generate", *DIGITS, "--prompt", "a three", "--layout", "dpg-bench", "--count", "3"),
    ("generate", *DIGITS, "--prompt", "a three", "--layout", "dpg-bench"),
    ("generate", *DIGITS, "--prompts", "prompts.txt", "--layout", "geneval"),
    ("generate", *DIGITS, "--layout", "geneval"),
    ("generate", *DIGITS, "--prompt", "a three", "--layout", "t2i-compbench"),
    ("generate", *DIGITS, "--prompt", "a/b", "--layout", "t2i-compbench", "--count", "10"),
    ("compare",),
    ("compare", "--backend", "toy"),
    ("compare", "--resume"),
    ("compare", *DIGITS, "--resume"),
    ("compare", *DIGITS, "--resume", "folder", "--out", "new"),
    ("compare", *DIGITS, "--resume", "--out", "folder"),
    ("compare", *DIGITS, "--methods", "base", "--seeds", "0", "--quick"),
]


def flag_cases() -> Iterator[Case]:
    """Every flag that takes a value, with bad ones."""
    for command, flag, values in FLAGS:
        for value in values:
            yield Case(f"{command[0]} {flag}", (*command, f"{flag}={value}"))


def bad_values(annotation: Any, metadata: Any) -> Iterator[str]:
    """TOML text that a key of this type and range must refuse."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return
    if origin is Literal:
        yield from ('"nonesuch"', "3", '""', "[]", "true")
    elif origin is tuple:
        yield from ('"nonesuch"', "3", "true", "{}", '[["x"]]', "[true]")
    elif annotation is bool:
        yield from ("1", '"true"', "[]", "0.0")
    elif annotation is int:
        yield from ('"1"', "1.5", "true", "nan", "[1]", "{}", "1979-05-27")
    elif annotation is float:
        yield from ('"1"', "true", "nan", "inf", "-inf", "[1.0]", "1" + "0" * 400)
    elif annotation in (str, Path):
        yield from ("3", "true", "[]", "1.5")
    for name, shift in (("least", -1), ("above", 0), ("below", 0)):
        if metadata.get(name) is not None:
            yield str(annotation(metadata[name] + shift))


def key_cases() -> Iterator[Case]:
    """Every key of `[train]` and of every backend's `[backend]`, in a file, and of `compare`, as a flag."""
    for backend in BACKENDS:
        for item, annotation in fields(backend_factory(backend).options):
            for value in bad_values(annotation, item.metadata):
                document = f"[backend]\nname = {json.dumps(backend)}\n{item.name} = {value}\n"
                yield Case(f"{backend}.{item.name}", ("train", "--config", document))
    for item, annotation in fields(TrainConfig):
        for value in bad_values(annotation, item.metadata):
            document = f'[backend]\nname = "toy"\n[train]\n{item.name} = {value}\n'
            yield Case(f"train.{item.name}", ("train", "--config", document))
    for item, annotation in fields(Plan):
        values = list(bad_values(annotation, item.metadata))
        if annotation is str:  # a flag's bare text is text
            values = ["[]"] if item.name == "never" else []
        for value in values:
            yield Case(f"compare.{item.name}", ("compare", *DIGITS, "--set", f"compare.{item.name}={value}"))
    for table in ("rewards", "heldout"):
        for value in ("nan", "inf", '"1"', "true", "[]", "[1.0]", '{ weight = "x" }', "{ weight = nan }",
                      "{ size = [1] }", "1979-05-27", "{ nonesuch = 1 }"):  # fmt: skip
            document = f'[backend]\nname = "toy"\n[train]\nsteps = 1\n[{table}]\nredness = {value}\n'
            yield Case(f"{table}.redness", ("train", "--config", document))


RANGES: list[tuple[str, str, tuple[str, ...]]] = [
    *(("toy", key, ("0", "-1")) for key in ("width", "depth")),
    ("toy", "seed", ("-1",)),
    ("toy", "problem", ("", "nonesuch", "../x")),
    *(("digits", key, ("0", "-1")) for key in ("size", "rank", "lora_alpha", "max_sequence_length")),
    ("digits", "seed", ("-1", str(2**64))),
    ("digits", "size", ("31", "33")),
    ("digits", "dtype", ("float64",)),
    *(("compare", key, ("0", "-1", "x", "1.5", "")) for key in (
        "seeds", "batch", "best_of", "reno_iterations", "rounds", "proposals", "measure_samples", "grid")),
    *(("compare", key, ("-1", "x", "1.5", "")) for key in (
        "prompts", "train_steps", "diversity_prompts", "diversity_seeds", "seed")),
    ("compare", "diversity_seeds", ("1",)),
    ("compare", "measure_samples", ("1",)),
    ("compare", "steps", ("0", "[]", "[0]", "[1, -1]", "x", "1.5", "")),
    ("compare", "ranks", ("[0]", "[-1]", "x", "1.5")),
    ("compare", "losses", ("nonesuch", "[3]", '["l2", "nonesuch"]')),
    ("compare", "methods", ("nonesuch", "[]", "[3]", "")),
]  # fmt: skip


def range_cases() -> Iterator[Case]:
    """Keys whose accepted range is checked by code rather than by the field's metadata."""
    for table, key, values in RANGES:
        for value in values:
            if table == "compare":
                yield Case(f"compare.{key}", ("compare", *DIGITS, "--set", f"compare.{key}={value}"))
            else:
                yield Case(
                    f"{table}.{key}",
                    ("train", "--backend", table, "--set", "train.steps=1", "--set", f"backend.{key}={value}"),
                )


def fields(record: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass that a user sets, with their types."""
    hints = typing.get_type_hints(record)
    return [(item, hints[item.name]) for item in dataclasses.fields(record) if item.init]


def sample(cases: Sequence[Case]) -> set[Case]:
    """The cases of a quick run: of everything that is spoilt the first two ways and every fourth, and all conflicts.

    The three real pipelines share their options, and a case that loads the bundled model takes a second: of those the
    first alone.
    """
    chosen: set[Case] = set()
    seen: dict[str, int] = {}
    for case in cases:
        number = seen[case.spoils] = seen.get(case.spoils, -1) + 1
        table = case.spoils.partition(".")[0]
        heavy = "digits" in case.arguments or table in ("sana", "sd-turbo", "flux")
        if case.spoils == "conflict" or number == 0 or (not heavy and (number == 1 or number % 4 == 0)):
            chosen.add(case)
    return chosen


def all_cases() -> list[Case]:
    """The whole table; equal command lines once."""
    conflicts = (Case("conflict", arguments) for arguments in CONFLICTS)
    cases = [*flag_cases(), *key_cases(), *range_cases(), *conflicts]
    return list({case.arguments: case for case in cases}.values())
