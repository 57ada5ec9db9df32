"""Damaged files and random text: every reader answers with a value or one `InputError`, and changes nothing."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hnkit import InputError
from hnkit.backend import backend_factory
from hnkit.cli import app as cli
from hnkit.cli.verify_bound import parse_shape
from hnkit.config import CONFIG_FILE, RunConfig, parse_reward_flag, resolve_config
from hnkit.internal.files import file_digest, write_sealed
from hnkit.internal.folders import VERDICT_FILE
from hnkit.prompts import read_prompts
from hnkit.scaled.compare.evaluation import _read, read_part
from hnkit.scaled.compare.networks import _records
from hnkit.scaled.compare.plan import Plan, plan_from_json
from hnkit.scaled.compare.settings import read_plan
from hnkit.scaled.digits.checkpoint import CHECKSUMS, read_checksums
from hnkit.training.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    STATE,
    TENSORS,
    DamagedCheckpointError,
    JsonLog,
    _canonical,
    _manifest,
    load_checkpoint,
    newest_checkpoint,
)
from hnkit.training.report import REPORT, finished_report
from hnkit.training.run import METRICS, train
from tests.scaled import tiny
from tests.scaled.conftest import perturb

fuzz = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
numbers = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324])
scalars = st.none() | st.booleans() | numbers | text
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)


def one_line(work: Callable[[], Any]) -> str | None:
    """Run a reader: `None` if it accepts, the message if it refuses; anything else it raises fails the test."""
    try:
        work()
    except InputError as error:
        return str(error)
    return None


damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("replace"), st.binary(max_size=64)),
)


def damaged(data: bytes, damage: tuple[Any, ...]) -> bytes:
    """A file's bytes, cut short, with one bit flipped, with bytes put in between, or replaced."""
    kind, *how = damage
    if kind == "replace":
        return bytes(how[0])
    place = int(how[0] * len(data))
    if kind == "cut":
        return data[:place]
    if kind == "insert":
        return data[:place] + how[1] + data[place:]
    flipped = bytearray(data)
    flipped[place] ^= 1 << how[1]
    return bytes(flipped)


# --- configuration, flags, prompts ------------------------------------------------------------------------------

toml_values = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
train_keys = st.sampled_from(
    ["steps", "batch", "lr", "kl", "alpha", "ema", "prompts", "trackers", "seed", "nesterov", "accumulate", "clip"]
)


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml(key)} = {toml(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf") if math.isinf(value) else repr(value)
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(character):08x}" for character in value) + '"'
    return json.dumps(value)


@fuzz
@given(data=st.binary(max_size=200) | text.map(str.encode))
def test_configuration_of_random_bytes(data, tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(data)
    one_line(lambda: resolve_config(backend="toy", config_file=path))


@fuzz
@given(
    table=st.sampled_from(["train", "backend", "rewards", "heldout"]) | text,
    entries=st.dictionaries(train_keys | text, toml_values, max_size=4),
)
def test_configuration_of_random_values(table, entries, tmp_path):
    path = tmp_path / "c.toml"
    lines = [f"{toml(key)} = {toml(value)}" for key, value in entries.items()]
    path.write_text("\n".join([f"[{toml(table)}]", *lines]) + "\n", encoding="utf-8")
    found: list[RunConfig] = []
    refused = one_line(lambda: found.append(resolve_config(backend="toy", config_file=path)))
    if refused is None:  # what is accepted is written and read back as it is
        path.write_text(found[0].to_toml(), encoding="utf-8")
        assert resolve_config(config_file=path) == found[0]
        assert not any(":" in name for name in [*found[0].rewards, *found[0].heldout])


@fuzz
@given(
    table=st.sampled_from(["train", "backend", "rewards", "heldout", "compare", "", "train.train"]) | text,
    key=train_keys | st.sampled_from(["problem", "width", "redness", "redness.weight", "name"]) | text,
    value=text | toml_values.map(toml),
)
def test_set_flags(table, key, value):
    override = f"{table}.{key}={value}"
    found: list[RunConfig] = []
    if one_line(lambda: found.append(resolve_config(backend="toy", overrides=[override]))) is None:
        assert isinstance(found[0], RunConfig)
        assert not any(":" in name for name in [*found[0].rewards, *found[0].heldout])


@fuzz
@given(flag=text | st.builds("{}={}".format, text, text | numbers.map(str)))
def test_reward_flags(flag):
    found: list[Any] = []
    if one_line(lambda: found.append(parse_reward_flag(flag))) is None:
        name, spec = found[0]
        assert name.strip() == name != ""
        assert math.isfinite(spec.weight)


@settings(fuzz, max_examples=300)
@given(
    shape=st.text(string.digits + ",.-+eE xX_½٣", max_size=12)
    | st.lists(st.integers(-(10**20), 10**20), max_size=5).map(lambda sizes: ",".join(map(str, sizes)))
    | text
)
def test_shapes(shape):
    found: list[tuple[int, ...]] = []
    if one_line(lambda: found.append(parse_shape(shape))) is None:
        assert all(size >= 1 for size in found[0])
        assert 1 <= math.prod(found[0]) <= 2**24


@fuzz
@given(suffix=st.sampled_from([".txt", ".json", ".jsonl", ".csv", ""]), data=st.binary(max_size=200))
def test_prompt_files_of_random_bytes(suffix, data, tmp_path):
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(data)
    found: list[list[str]] = []
    if one_line(lambda: found.append(read_prompts(path))) is None:
        assert found[0]
        assert all(prompt.strip() == prompt != "" for prompt in found[0])


@fuzz
@given(suffix=st.sampled_from([".json", ".jsonl"]), document=documents)
def test_prompt_files_of_random_json(suffix, document, tmp_path):
    path = tmp_path / f"prompts{suffix}"
    path.write_text(json.dumps(document))
    found: list[list[str]] = []
    if one_line(lambda: found.append(read_prompts(path))) is None:
        assert "".join(found[0]).encode()  # text that can be written


@pytest.mark.parametrize("name", ["a\0b.txt", "~nonesuch-user/prompts.txt", "x" * 300 + ".txt", "hf:", "."])
def test_prompt_names_that_no_file_can_have(name):
    with pytest.raises(InputError):
        read_prompts(name)


# --- run folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of the toy with three checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = ["train.steps=3", "train.batch=4", "train.measure_samples=4", "train.checkpoint_every=1"]
    train(resolve_config(backend="toy", overrides=overrides), out=folder)
    return folder


@pytest.fixture
def run_folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / CHECKPOINTS).iterdir())


@fuzz
@given(damage=damages, which=st.sampled_from([TENSORS, STATE, MANIFEST]))
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, which, finished, tmp_path_factory):
    run = tmp_path_factory.mktemp("damaged")
    newest, before = checkpoints(finished)[-1], checkpoints(finished)[-2]
    for folder in (newest, before):
        shutil.copytree(folder, run / CHECKPOINTS / folder.name)
    path = run / CHECKPOINTS / newest.name / which
    original = path.read_bytes()
    path.write_bytes(damaged(original, damage))
    said: list[str] = []
    found = newest_checkpoint(run, said.append)
    assert found is not None
    if path.read_bytes() == original:
        assert (found.step, said) == (3, [])
    else:
        assert found.step == 2
        assert len(said) == 1
        assert newest.name in said[0]
    shutil.rmtree(run)


def forge(folder: Path, state: Any) -> None:
    """Give a checkpoint another state, its checksums right."""
    (folder / STATE).write_bytes(_canonical(state))
    (folder / MANIFEST).write_bytes(_manifest({name: file_digest(folder / name) for name in (TENSORS, STATE)}))


@fuzz
@given(state=documents | st.dictionaries(st.sampled_from(["step", "config", "skipped"]), documents))
def test_a_forged_checkpoint_is_damaged(state, finished, tmp_path):
    """Its checksums are right, and its content is not what a run writes."""
    folder = tmp_path / "step-00000009"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoints(finished)[-1], folder)
    try:
        forge(folder, state)
    except ValueError:
        return  # not JSON: a NaN in it
    if isinstance(state, dict) and type(state.get("step")) is int:
        assert load_checkpoint(folder).step == state["step"]
        return
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(folder)


STATE_KEYS = ("config", "metrics", "optimizer", "prompts", "skipped", "skipped_in_row")


@pytest.mark.parametrize("value", [None, {}, [], "text", -1.5, "missing"], ids=repr)
@pytest.mark.parametrize("key", STATE_KEYS)
def test_resuming_from_a_forged_state(key, value, run_folder):
    """One entry is gone or something else: it is refused in one line, or it does not matter."""
    for folder in checkpoints(run_folder)[1:]:
        shutil.rmtree(folder)
    (run_folder / REPORT).unlink()
    [folder] = checkpoints(run_folder)
    state = json.loads((folder / STATE).read_text())
    assert set(STATE_KEYS) <= set(state)
    state[key] = value
    if value == "missing":
        del state[key]
    forge(folder, state)
    config = resolve_config(resume=run_folder)
    message = one_line(lambda: train(config, resume=run_folder))
    assert message is None or "\n" not in message
    if key in ("config", "prompts") or value == "missing":
        assert message is not None


@fuzz
@given(document=documents, damage=damages)
def test_reports_that_are_no_reports(document, damage, finished, tmp_path_factory):
    run = tmp_path_factory.mktemp("report")
    (run / "adapter").mkdir()
    whole = (finished / REPORT).read_bytes()
    for data in (json.dumps(document).encode(), damaged(whole, damage)):
        (run / REPORT).write_bytes(data)
        found = finished_report(run)
        assert found is None or {"step", "skipped"} <= found.keys()


@fuzz
@given(damage=damages)
def test_a_damaged_metrics_file_is_cut_back_or_set_aside(damage, finished, tmp_path_factory):
    run = tmp_path_factory.mktemp("metrics")
    position = load_checkpoint(checkpoints(finished)[-2]).state["metrics"]
    whole = (finished / METRICS).read_bytes()
    (run / METRICS).write_bytes(damaged(whole, damage))
    given_bytes = (run / METRICS).read_bytes()
    said: list[str] = []
    log = JsonLog.resume(run / METRICS, position, said.append)
    log.close()
    kept = (run / METRICS).read_bytes()
    if said:  # nothing of what was there is lost
        assert kept == b""
        assert [path.read_bytes() for path in run.glob("*-damaged-*")] == [given_bytes]
    else:
        assert kept == whole[: position["size"]]


RESUMES = [
    (CONFIG_FILE, ("cut", 0.5)),
    (CONFIG_FILE, ("replace", b"\xff\xfe")),
    (CONFIG_FILE, ("replace", b"")),
    (CONFIG_FILE, ("replace", b'[backend]\nname = "toy"\n[train]\nsteps = 3\nbatch = 4\nkl = "exact"\n')),
    ("checkpoints", None),
    ("run", None),
]


@pytest.mark.parametrize(("name", "damage"), RESUMES, ids=str)
def test_resuming_a_damaged_run(name, damage, run_folder, capsys, monkeypatch):
    monkeypatch.chdir(run_folder.parent)
    if name == "checkpoints":
        for folder in checkpoints(run_folder):
            (folder / MANIFEST).write_bytes(b"{}")
    elif name == "run":
        shutil.rmtree(run_folder)
        run_folder.write_text("a file")
    else:
        path = run_folder / name
        path.write_bytes(damaged(path.read_bytes(), damage))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != ".lock"}
    monkeypatch.setattr(sys, "argv", ["hnkit", "train", "--resume", "run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "passed over" not in line]
    assert len(lines) == 1
    assert "internal error" not in captured.err
    assert {path: path.read_bytes() for path in before} == before


# --- comparisons ------------------------------------------------------------------------------------------------


@fuzz
@given(data=st.binary(max_size=100) | documents)
def test_plans_and_parts_of_comparisons(data, tmp_path):
    """Random bytes; and random JSON, plain and with a right checksum."""
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    for name in ("plan.json", "part.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(content)
    one_line(lambda: read_plan(tmp_path, "digits"))
    assert read_part(tmp_path / "part.json", "") is None
    if not isinstance(data, bytes):
        for name in ("plan.json", "part.json"):
            with contextlib.suppress(ValueError):  # not JSON: a NaN in it
                write_sealed(tmp_path / name, data)
    one_line(lambda: read_plan(tmp_path, "digits"))
    assert read_part(tmp_path / "part.json", "") is None
    assert _read(tmp_path / "part.json", ["a three"]) is None
    one_line(lambda: _records(tmp_path / "metrics.jsonl"))


@fuzz
@given(key=st.sampled_from(sorted(Plan().to_json())), value=documents)
def test_a_plan_with_one_wrong_entry(key, value, tmp_path):
    document = Plan().to_json() | {key: value}
    found: list[Plan] = []
    if one_line(lambda: found.append(plan_from_json(document))) is None:
        assert type(getattr(found[0], key)) is type(getattr(Plan(), key))


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, finished) -> dict[str, tuple[Any, Path]]:
    """Backend and trained adapter of the toy and of the tiny SANA."""
    root = tmp_path_factory.mktemp("adapters")
    factory = backend_factory("sana")
    sana = factory.load(factory.options(**tiny.options("sana", tiny.build("sana", root / "model"))))
    perturb(sana)
    sana.save_adapter(root / "sana")
    toy = backend_factory("toy")
    return {"toy": (toy.load(toy.options()), finished / "adapter"), "sana": (sana, root / "sana")}


def weights_of(backend: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in backend.hypernetwork.named_parameters() if value.requires_grad}


def require_refused(backend: Any, folder: Path) -> None:
    """The adapter is refused in one line, and the network is as it was."""
    before = weights_of(backend)
    message = one_line(lambda: backend.load_adapter(folder))
    assert message is not None
    assert "\n" not in message
    after = weights_of(backend)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["toy", "sana"])
@fuzz
@given(damage=damages, which=st.integers(0, 1))
def test_damaged_adapters_are_refused(name, damage, which, adapters, tmp_path_factory):
    backend, folder = adapters[name]
    copy = tmp_path_factory.mktemp("adapter")
    # verdict.json is for people: what it says is shown, and nothing is made of it
    kept = {path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"}}
    files = sorted(path for path in kept if path.name != VERDICT_FILE)
    assert len(files) == 2
    for path in files:
        (copy / path.name).write_bytes(path.read_bytes())
    path = copy / files[which].name
    original = path.read_bytes()
    path.write_bytes(damaged(original, damage))
    if path.read_bytes() == original:
        return
    if path.suffix == ".json" and _same_document(path.read_bytes(), original):
        return  # white space
    require_refused(backend, copy)
    shutil.rmtree(copy)


def _same_document(one: bytes, two: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(two)
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize("name", ["toy", "sana"])
@fuzz
@given(document=documents, pick=st.integers(0, 1000), deep=st.booleans())
def test_adapter_configurations_with_a_wrong_entry_are_refused(name, document, pick, deep, adapters, tmp_path_factory):
    backend, folder = adapters[name]
    copy = tmp_path_factory.mktemp("adapter")
    config = next(path for path in folder.iterdir() if path.suffix == ".json")
    weights = next(path for path in folder.iterdir() if path.suffix == ".safetensors")
    shutil.copy(weights, copy)
    whole = json.loads(config.read_text())
    table = whole["hnkit"] if deep and "hnkit" in whole else whole
    key = sorted(table)[pick % len(table)]
    unused = {"depth", "width", "seed"} if name == "toy" else set()
    if key in unused or (type(table[key]) is type(document) and table[key] == document):
        return
    table[key] = document
    (copy / config.name).write_text(json.dumps(whole))
    if whole.get("hnkit", True) is None:
        return  # an adapter without hnkit's block is one of plain peft
    require_refused(backend, copy)


@pytest.mark.parametrize("name", ["toy", "sana"])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("change", ["missing", "foreign", "shape", "dtype", "nan", "path"])
def test_adapters_with_foreign_weights_are_refused(name, published, change, adapters, tmp_path):
    """`published`: without the checksum that would reveal any change at once."""
    backend, folder = adapters[name]
    config = next(path for path in folder.iterdir() if path.suffix == ".json")
    document = json.loads(config.read_text())
    weights = load_file(next(path for path in folder.iterdir() if path.suffix == ".safetensors"))
    first = sorted(weights)[0]
    if change == "missing":
        del weights[first]
    elif change in {"foreign", "path"}:
        weights["../../foreign" if change == "path" else "foreign.weight"] = torch.zeros(2, 2)
    elif change == "shape":
        weights[first] = weights[first][..., :1].contiguous()
    elif change == "dtype":
        weights[first] = torch.zeros_like(weights[first], dtype=torch.int32)
    else:
        weights[first] = torch.full_like(weights[first], torch.nan)
    (tmp_path / "a").mkdir()
    target = tmp_path / "a" / ("adapter.safetensors" if name == "toy" else "adapter_model.safetensors")
    save_file(weights, target)
    if published:
        import hashlib

        document.pop("hnkit", None)
        if "sha256" in document:
            document["sha256"] = hashlib.sha256(target.read_bytes()).hexdigest()
    (tmp_path / "a" / config.name).write_text(json.dumps(document))
    require_refused(backend, tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


# --- models -----------------------------------------------------------------------------------------------------


@settings(fuzz, max_examples=25)
@given(damage=damages, pick=st.integers(0, 100))
def test_damaged_models_are_refused_or_load(damage, pick, adapters, tmp_path_factory):
    """A model's files carry no checksums, so a flipped bit in a weight may load; nothing else may happen."""
    model = Path(adapters["sana"][0].options.model_id)
    copy = Path(shutil.copytree(model, tmp_path_factory.mktemp("model") / "model"))
    files = sorted(path for path in copy.rglob("*") if path.suffix in {".json", ".safetensors"})
    path = files[pick % len(files)]
    path.write_bytes(damaged(path.read_bytes(), damage))
    factory = backend_factory("sana")
    one_line(lambda: factory.load(factory.options(**tiny.options("sana", copy))).encode(["a red fox"]))
    shutil.rmtree(copy)


# --- the bundled model's list -----------------------------------------------------------------------------------


@fuzz
@given(data=st.binary(max_size=200) | text.map(str.encode))
def test_checksum_lists(data, tmp_path):
    (tmp_path / CHECKSUMS).write_bytes(data)
    found: list[dict[str, str]] = []
    if one_line(lambda: found.append(read_checksums(tmp_path))) is None:
        assert all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in found[0])
