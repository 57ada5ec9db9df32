"""`hnkit compare` on a tiny checkpoint: tables, resumption, and the arithmetic of the tables by hand."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from hnkit import InputError
from hnkit.backend import backend_factory
from hnkit.cli.app import describe_error
from hnkit.config import TrainConfig, resolve_config
from hnkit.internal.files import new_run_folder, read_sealed, write_sealed
from hnkit.internal.folders import run_lock
from hnkit.internal.provenance import prompts_digest, recorded_provenance
from hnkit.rewards import CallableReward, RewardSum
from hnkit.scaled.compare import COMPARISON, evaluation, networks
from hnkit.scaled.compare import run as run_module
from hnkit.scaled.compare.baselines import Base, BestOfN
from hnkit.scaled.compare.evaluation import Job, Row, Scorer
from hnkit.scaled.compare.page import all_tables, lead, to_csv
from hnkit.scaled.compare.plan import METHODS, Plan, make_plan, plan_from_json
from hnkit.scaled.compare.settings import Settings, configuration, read_plan, reproducing_command
from hnkit.scaled.compare.tables import by_category, category_mean, estimate
from tests.scaled import tiny
from tests.scaled.conftest import redness

PROMPTS = ["a red house", "two dogs", "a cat"]
SMALL = [
    "compare.best_of=2", "compare.reno_iterations=2", "compare.ranks=[2]", 'compare.losses=["l2"]',
    "compare.steps=[1, 2]", "compare.diversity_prompts=1", "compare.diversity_seeds=3", "compare.measure_samples=4",
    "compare.grid=2", "compare.train_steps=2", "train.batch=2", "train.accumulate=1", "train.warmup=0",
    "train.validate_samples=4", "rewards.redness=1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def overrides(checkpoint, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "train.txt"
    prompts.write_text("a tree\na boat\na lamp\na green frog\n")
    options = tiny.options("sana", checkpoint("sana"), dtype="bfloat16")  # as every real model is by default
    # the paper's reward ensemble is the preset: the table [rewards] is replaced by redness alone
    return [
        *SMALL,
        f"train.prompts={prompts}",
        *(f"backend.{key}={tiny.text(value)}" for key, value in options.items()),
    ]


@pytest.fixture(scope="module")
def finished(overrides, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "run"
    methods = ["base", "hypernoise", "direct", "best-of-n", "reno"]
    document = COMPARISON("sana", methods=methods, prompts=PROMPTS, seeds=2, overrides=overrides, out=out)
    return out, document


@pytest.fixture(scope="module", autouse=True)
def redness_alone():
    """The sana preset trains on four models that are not here."""
    factory = backend_factory("sana")
    presets = {name: {k: v for k, v in preset.items() if not k.startswith("rewards.")}
               for name, preset in factory.presets.items()}  # fmt: skip
    patch = pytest.MonkeyPatch()
    # the module that defines it comes last: one that is first imported while it is replaced would keep the replacement
    for module in (
        "hnkit.training.session",
        "hnkit.scaled.compare.run",
        "hnkit.scaled.compare.settings",
        "hnkit.scaled.compare.networks",
        "hnkit.backend",
    ):
        patch.setattr(f"{module}.backend_factory", lambda _: replace(factory, presets=presets))
    yield
    patch.undo()


def test_every_table_is_filled(finished):
    out, document = finished
    for name in ("table-1", "scores", "steps", "diversity", "ranks", "losses", "l2"):
        assert (out / f"{name}.csv").is_file(), name
    assert {row["method"] for row in document["table_1"]} == {"base", "hypernoise", "direct", "best-of-n", "reno"}
    assert all(row["images"] == 6 for row in document["table_1"])
    costs = {row["method"]: row["generator_evaluations_per_image"] for row in document["table_1"]}
    assert costs == {"base": 1, "hypernoise": 1, "direct": 1, "best-of-n": 2, "reno": 2}
    base = document["table_1"][0]
    assert base["gain"]["reward"]["value"] == 0
    gains = {row["method"]: row["gain"]["reward"]["value"] for row in document["table_1"]}
    assert gains["best-of-n"] >= 0
    assert gains["reno"] >= 0
    logged = map(json.loads, (out / "runs/direct/metrics.jsonl").read_text().splitlines())
    validated = {line["validation"]["scores"]["reward"]["samples"] for line in logged if "validation" in line}
    assert validated == {4}  # the flag's, not the 64 of a comparison without it
    page = (out / "report.html").read_text()
    assert "What a noise hypernetwork buys" in page
    assert page.count("<h2>") == page.count('<a href="#s'), "a section that was not run is left out"
    assert "hnkit compare --backend sana --prompts prompts.json --methods base,hypernoise,direct,best-of-n,reno" in page
    assert "No frontier of reward per nat: prompt 'a red house': 4 rewards of the base; give 8 or more" in page
    assert page.count("data:image/png;base64") >= 3
    assert json.loads((out / "report.json").read_text())["table_1"] == json.loads(json.dumps(document["table_1"]))
    assert lead(document).endswith(document["l2"][0]["l2_verdict"]["text"])
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_quick_comparison_trains_few_steps_unless_told_otherwise(tmp_path):
    """The bundled adapter has thousands; direct LoRA, trained as long beside it, took three quarters of an hour."""
    for quick, wanted, given in ((True, 400, 0), (False, 3000, 0), (True, 7, 7)):
        comparison = object.__new__(run_module._Session)
        comparison.plan = replace(Plan(), train_steps=given)
        comparison.settings = SimpleNamespace(quick=quick)
        comparison.config = resolve_config(backend="toy", overrides=["train.steps=3000"])
        assert comparison.train_steps == wanted
    comparison.plan, comparison.settings = Plan(), SimpleNamespace(quick=True)
    comparison.config = resolve_config(backend="toy", overrides=["train.steps=5"])
    assert comparison.train_steps == 5


@pytest.mark.parametrize(
    ("ema", "steps", "here", "expected"),
    [(0.998, 6000, 400, 0.97), (0.99, 500, 500, 0.99), (0.99, 500, 900, 0.99), (0.0, 500, 5, 0.0), (0.9, 500, 5, 0.0)],
)
def test_an_average_spans_the_same_share_of_a_shorter_training(ema, steps, here, expected):
    assert networks.average_of(TrainConfig(ema=ema, steps=steps), here) == pytest.approx(expected)


@pytest.mark.parametrize(("quick", "small", "asked"), [
    (True, True, ["auto"]), (False, True, ["auto", "lanczos"]), (True, False, ["auto", "arnoldi"]),
])  # fmt: skip
def test_a_stochastic_kl_beside_the_exact_one_is_no_part_of_a_quick_comparison(quick, small, asked):
    """Golub and Kahan's took three times as long as all images of `compare --backend digits --quick`."""
    comparison, found = object.__new__(run_module._Session), []
    comparison.settings, comparison.networks = SimpleNamespace(quick=quick), {"hypernoise": None}
    comparison.measured = {}

    def measured(name: str, method: str = "auto") -> SimpleNamespace:
        found.append(method)
        of = ("exact" if small else "lanczos") if method == "auto" else method
        return SimpleNamespace(figures={"method": of, "local_norm": {"max": 14.0 if small else 0.5}})

    comparison._measured = measured
    rows = comparison._closeness()
    assert found == asked
    assert len(rows) == len(asked)


def test_a_quick_comparison_shortens_the_average_of_what_it_trains(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_module, "trained", lambda _, config, *rest: asked.append(config.train))
    comparison = object.__new__(run_module._Session)
    comparison.plan, comparison.networks, comparison.folder, comparison.again = Plan(), {}, tmp_path, None
    comparison.settings = SimpleNamespace(quick=True, adapter=None, overrides=(), backend="sana")
    comparison.config = resolve_config(backend="sana", overrides=["train.steps=6000", "train.ema=0.998"])
    comparison._network("direct")
    (found,) = asked
    assert (found.steps, found.ema) == (400, pytest.approx(0.97))


def test_resumption_repeats_nothing_and_changes_nothing(finished):
    out, document = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    again = COMPARISON("sana", resume=out)
    assert {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()} == before
    assert json.loads(json.dumps(again["table_1"])) == json.loads(json.dumps(document["table_1"]))


CONTRADICTIONS = [
    ({"seeds": 3}, "--seeds: .*it has 2"),
    ({"methods": ["base", "reno"]}, "--methods"),
    ({"quick": True}, "--quick"),
    ({"prompts": ["a red house"]}, "--prompts"),
    ({"adapter": "somewhere"}, "--adapter"),
    ({"overrides": ["compare.best_of=3"]}, "--set compare.best_of=3.*it has 2"),
    ({"overrides": ["train.batch=4"]}, "--set train.batch=4"),
    ({"overrides": ["compare.nonesuch=4"]}, "nonesuch"),
]


@pytest.mark.parametrize(("flags", "words"), CONTRADICTIONS, ids=str)
def test_resumption_refuses_flags_that_ask_for_another_comparison(flags, words, finished):
    with pytest.raises(InputError, match=words):
        COMPARISON("sana", resume=finished[0], **flags)


def test_resumption_accepts_the_flags_it_was_begun_with(finished, overrides):
    out, _ = finished
    settings = run_module.read_plan(out, "sana")
    same = {"methods": settings.plan.methods, "prompts": PROMPTS, "seeds": 2, "overrides": overrides}
    run_module.require_same(out, settings, quick=False, **same)


def test_a_plan_cannot_switch_downloads_on(overrides, tmp_path):
    lifting = "backend.local_files_only=false"
    plan, others = make_plan(quick=True, methods=None, seeds=None, overrides=[])
    settings = run_module.Settings("sana", plan, None, {}, ("a cat",), (*others, lifting), True)
    assert lifting not in settings.to_json()["overrides"]  # it is not passed on
    folder = new_run_folder(tmp_path / "run", "compare")
    write_sealed(folder / "plan.json", settings.to_json())
    assert run_module.read_plan(folder, "sana").overrides == tuple(others)
    for text in (lifting, "rewards.clipscore.local_files_only = 0"):
        write_sealed(folder / "plan.json", settings.to_json() | {"overrides": [text]})
        with pytest.raises(InputError, match="only your own flag may allow that"):
            COMPARISON("sana", resume=folder)


def test_an_interrupted_comparison_ends_as_an_uninterrupted_one(finished, overrides, tmp_path, monkeypatch):
    """It stops in table 1, which is the same whatever other tables there are."""
    _, document = finished
    from hnkit.scaled.compare import evaluation

    few = [*overrides, "compare.ranks=[]", "compare.losses=[]", "compare.steps=[1]", "compare.diversity_prompts=0"]
    written = 0
    write = evaluation.write_sealed

    def interrupt(path, content):
        nonlocal written
        written += 1
        if written == 4:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(evaluation, "write_sealed", interrupt)
    methods = ["base", "hypernoise", "direct", "best-of-n", "reno"]
    with pytest.raises(KeyboardInterrupt) as ended:
        COMPARISON("sana", methods=methods, prompts=PROMPTS, seeds=2, overrides=few, out=tmp_path / "my run")
    monkeypatch.setattr(evaluation, "write_sealed", write)
    words = shlex.split(describe_error(ended.value)[0].partition("go on with ")[2])  # as it is printed
    assert words[:5] == ["hnkit", "compare", "--backend", "sana", "--resume"]
    resumed = COMPARISON("sana", resume=words[5])
    for one, two in zip(document["table_1"], resumed["table_1"], strict=True):
        assert one["scores"] == two["scores"]
        assert one["gain"] == two["gain"]


def test_damaged_parts_are_found_out_again(finished, tmp_path):
    """One digit changed in each kind of part, and one bit of the grid: all come back as they were."""
    out, document = finished
    run = tmp_path / "run"
    shutil.copytree(out, run, copy_function=shutil.copyfile)
    kinds = ("base-", "reno-", "diversity-", "blocks-of-hypernoise/kl-")
    damaged = [next((run / "parts").glob(f"{kind}*.json")) for kind in kinds]
    images = [run / "parts" / name for name in ("grid.safetensors", "direct-steps1-seed0-from0.safetensors")]
    before = {path: path.read_bytes() for path in [*damaged, *images]}
    for path in damaged:
        altered = re.sub(r"\.\d", lambda found: f".{9 - int(found[0][1])}", path.read_text(), count=1)
        assert altered.encode() != before[path]
        path.write_text(altered)
    for path in images:
        altered = bytearray(before[path])
        altered[-9] ^= 16
        path.write_bytes(altered)
    again = COMPARISON("sana", resume=run)
    assert again["table_1"][0]["scores"] == document["table_1"][0]["scores"]
    assert again["l2"] == document["l2"]
    for path, content in before.items():
        if not path.name.startswith(("base-", "reno-")):  # these hold seconds as well
            assert path.read_bytes() == content, path.name


def test_scores_that_are_not_finite_are_shown_and_end_nothing(overrides, tmp_path):
    """One prompt's reward, and every image of a held-out score: a comparison ends with all else that it found."""
    run, small = tmp_path / "run", ["compare.ranks=[]", "compare.losses=[]"]
    plain, distance = Scorer.__call__, run_module.pixel_distance

    def scores(self, images, prompts):
        found = plain(self, images, prompts)
        broken = torch.tensor([prompt == PROMPTS[1] for prompt in prompts])
        return {"reward": found["reward"].masked_fill(broken, math.nan), "held": found["reward"] * math.inf * 0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "__call__", scores)
        patch.setattr(run_module, "pixel_distance", lambda images: distance(images) * math.nan)
        methods = ["base", "best-of-n"]
        made = COMPARISON("sana", methods=methods, prompts=PROMPTS, seeds=2, overrides=[*overrides, *small], out=run)
    again = COMPARISON("sana", resume=run)  # from its parts
    for document in (made, again):
        base = document["table_1"][0]["scores"]
        assert math.isnan(base["reward"]["value"])
        assert math.isnan(base["held"]["value"])
        assert math.isnan(document["diversity"][0]["metrics"]["pixel_distance"]["value"])
    written = json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["table_1"][0]["scores"]["held"] == {"value": None, "stderr": None}
    assert (run / "report.html").is_file()
    chunk = read_sealed(run / "parts" / "base-steps1-seed0-from0.json")
    assert [row["scores"]["reward"] is None for row in chunk["rows"]] == [prompt == PROMPTS[1] for prompt in PROMPTS]
    table, shown = COMPARISON.printed(again)
    assert [row[1] for row in table.rows] == ["–", "–"]
    assert shown.sentence


LOGS = [
    '{"step": "1"}', '{"step": true}',
    "1", "[]", '{"step": 1.5}', '{"step": 1, "validation": 3}', '{"step": 1, "validation": {"scores": []}}',
    '{"step": 1, "validation": {"scores": {"reward": {"role": "reward", "base": "\\u001b[2J", "steered": 1}}}}',
    '{"step": 1, "validation": {"scores": {"held": {"role": "held-out", "base": 1, "steered": 1}}}}',
]  # fmt: skip


@pytest.mark.parametrize("line", LOGS)
def test_a_log_that_is_not_one_of_a_training_is_one_line(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged \(.*\): give the adapter's folder alone"):
        networks._records(path)


FOREIGN = [
    ("rows", []), ("rows", 3), ("rows", [{"prompt": "a red house"}]), ("cost", {"seconds": "\x1b[2J"}), ("cost", []),
    ("scores", {"reward": "\x1b[2J"}), ("scores", {}), ("scores", 1), ("pool", 3), ("category", 3),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FOREIGN)
def test_a_part_that_holds_something_else_is_made_again(key, value, tmp_path):
    """Its SHA-256 shows damage, not who wrote it."""
    row = {"seed": 0, "category": "", "scores": {"reward": 1.0, "held": None}, "pool": [1.0, 2.0]}
    cost = {"generator": 3, "seconds": 0.5}
    document = {"prompts": PROMPTS, "rows": [{"prompt": prompt, **row} for prompt in PROMPTS], "cost": cost}
    path = tmp_path / "part.json"
    evaluation.write_part(path, document, "these")
    assert evaluation._read(path, PROMPTS, "these") is not None
    original = dict(document)
    if key in document:
        document[key] = value
    else:
        document["rows"][0] = {**document["rows"][0], key: value}
    evaluation.write_part(path, document, "these")
    assert evaluation._read(path, PROMPTS, "these") is None
    evaluation.write_part(path, original, "others")
    assert evaluation._read(path, PROMPTS, "these") is None
    evaluation.write_part(tmp_path / "other.json", original, "these")
    path.write_bytes((tmp_path / "other.json").read_bytes())
    assert evaluation._read(path, PROMPTS, "these") is None


def test_a_folder_that_is_replaced_or_in_use_is_left_alone(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished[0], tmp_path / "run", copy_function=shutil.copyfile)
    with run_lock(run), pytest.raises(InputError, match=rf"in use by another process \(process {os.getpid()} on"):
        COMPARISON("sana", resume=run)
    next((run / "parts").glob("base-*.json")).unlink()
    other = shutil.copytree(run, tmp_path / "other", copy_function=shutil.copyfile)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    plain = evaluation.write_sealed

    def replaced(path, content):
        if other.exists():
            run.rename(tmp_path / "away")
            other.rename(run)
        plain(path, content)

    monkeypatch.setattr(evaluation, "write_sealed", replaced)
    with pytest.raises(InputError, match="is no longer the folder that this run writes to"):
        COMPARISON("sana", resume=run)
    after = {path: (run / path.relative_to(other)).read_bytes() for path in before}
    assert after == before
    assert len([path for path in run.rglob("*") if path.is_file()]) == len(before)


def test_parts_made_with_another_adapter_are_not_mixed_in(finished, overrides, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(finished[0] / "runs" / "hypernoise" / "adapter", adapter)
    few = [*overrides, "compare.ranks=[]", "compare.losses=[]", "compare.steps=[1]"]
    run = tmp_path / "run"
    document = COMPARISON(
        "sana", methods=["base", "hypernoise"], adapter=adapter, prompts=PROMPTS, seeds=1, overrides=few, out=run
    )
    for name in ("README.md", "verdict.json"):
        (adapter / name).write_text("{}")  # what it says of itself is in no image
    again = COMPARISON("sana", resume=run)
    assert again["table_1"] == document["table_1"]
    adapter = adapter.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="name where it lies now with --adapter DIR"):
        COMPARISON("sana", resume=run)
    for again in (COMPARISON("sana", resume=run, adapter=adapter), COMPARISON("sana", resume=run)):
        assert again["table_1"] == document["table_1"]
    with pytest.raises(InputError, match="it trains its own"):
        COMPARISON("sana", resume=finished[0], adapter=adapter)
    weights = next(adapter.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3f")
    with pytest.raises(InputError, match="is gone or has changed since"):
        COMPARISON("sana", resume=run)
    shutil.rmtree(adapter)
    with pytest.raises(InputError, match="is gone or has changed since"):
        COMPARISON("sana", resume=run)


def test_a_base_model_exchanged_behind_a_comparison_is_refused(overrides, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("sana"), tmp_path / "model")
    few = [*overrides, "compare.ranks=[]", "compare.losses=[]", "compare.steps=[1]", "compare.diversity_prompts=0"]
    run = tmp_path / "run"
    few = [*few, f"backend.model_id={model}"]
    COMPARISON("sana", methods=["base"], prompts=PROMPTS[:1], seeds=1, overrides=few, out=run)
    (record,) = recorded_provenance(run)
    assert record["model"] == read_sealed(run / "plan.json")["model"]
    assert record["prompts"] == prompts_digest(PROMPTS[:1])
    assert record.keys() == {"code", "versions", "asked", "model", "prompts"}
    COMPARISON("sana", resume=run)
    assert recorded_provenance(run) == [record]
    weights = next((model / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"base model has changed since \(SHA-256 .* then, .* now"):
        COMPARISON("sana", resume=run)


def test_a_comparison_goes_on_with_a_model_that_was_moved(overrides, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("sana"), tmp_path / "model")
    few = [*overrides, "compare.ranks=[]", "compare.losses=[]", "compare.steps=[1]", "compare.diversity_prompts=0"]
    run, methods = tmp_path / "run", ["base", "hypernoise"]
    few = [*few, f"backend.model_id={model}"]
    document = COMPARISON("sana", methods=methods, prompts=PROMPTS[:1], seeds=1, overrides=few, out=run)
    moved = model.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="there is no folder"):
        COMPARISON("sana", resume=run)
    shutil.rmtree(run / "parts")  # the images and figures are to be made again, the network is trained
    again = COMPARISON("sana", resume=run, overrides=[f"backend.model_id={moved}"])
    assert [row["scores"] for row in again["table_1"]] == [row["scores"] for row in document["table_1"]]
    assert again["config"]["backend"]["model_id"] == str(moved)
    assert COMPARISON("sana", resume=run)["table_1"] == again["table_1"]  # it is found from now on
    with pytest.raises(InputError, match="base model has changed since"):
        COMPARISON("sana", resume=run, overrides=[f"backend.model_id={checkpoint('sana', 1)}"])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [([], "needs a proposer: --set compare.proposer=MODEL"), (["compare.proposer=absent"], "prompt proposer 'absent'")],
)
def test_a_proposer_is_looked_for_before_anything_is_made(chosen, message, overrides, tmp_path):
    methods = ["base", "prompt-optimisation"]
    with pytest.raises(InputError, match=message):
        COMPARISON("sana", methods=methods, prompts=PROMPTS, overrides=[*overrides, *chosen], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_by_default_prompts_are_optimised_only_where_something_writes_them(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module._Session, "run", lambda *_: {})
    COMPARISON("sana", prompts=PROMPTS[:1], seeds=1, overrides=overrides, out=tmp_path / "run")
    assert read_plan(tmp_path / "run", "sana").plan.methods == METHODS[:-1]
    assert METHODS[-1] == "prompt-optimisation"


def test_a_damaged_plan_is_refused(finished, tmp_path):
    folder = new_run_folder(tmp_path / "run", "compare")
    (folder / "plan.json").write_text((finished[0] / "plan.json").read_text().replace('"seeds": 2', '"seeds": 3'))
    with pytest.raises(InputError, match=r"plan\.json is missing or damaged"):
        COMPARISON("sana", resume=folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["base", "magic"]}, "unknown method magic: accepted are base, hypernoise"),
        ({"methods": []}, "unknown method"),
        ({"overrides": ["compare.best_of=0"]}, "compare.best_of = 0: accepted is 1 or more"),
        ({"overrides": ["compare.best_off=2"]}, "unknown key 'best_off'.*did you mean 'best_of'"),
        ({"overrides": ["compare.steps=[0]"]}, "step counts of 1 or more"),
        ({"overrides": ["compare.losses=['l3']"]}, "names 'l3'"),
        ({"overrides": ["compare.seeds=x"]}, "an integer"),
        ({"overrides": ["compare.seeds"]}, "write compare.KEY=VALUE"),
        ({"resume": "nowhere"}, "no run is there"),
        ({"adapter": "nowhere"}, "is not a folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(arguments, message, tmp_path):
    from pathlib import Path

    for key in ("resume", "adapter"):
        if key in arguments:
            arguments = {**arguments, key: tmp_path / arguments[key]}
    with pytest.raises(InputError, match=message) as caught:
        COMPARISON("sana", prompts=PROMPTS, out=tmp_path / "run", **arguments)
    assert "\n" not in str(caught.value)
    assert not Path(tmp_path / "run").exists()


def test_errors_are_over_prompts_and_gains_are_paired():
    values = {"a": (1.0, 3.0), "b": (5.0, 7.0), "c": (0.0, 2.0)}
    rows = [Row(p, s, "x" if p != "c" else "y", {"r": v[s]}) for p, v in values.items() for s in (0, 1)]
    whole = estimate(rows, "r")
    means = torch.tensor([2.0, 6.0, 1.0])
    assert whole["value"] == pytest.approx(3.0)
    assert whole["stderr"] == pytest.approx(float(means.std(unbiased=True)) / math.sqrt(3))
    shifted = [Row(r.prompt, r.seed, r.category, {"r": r.scores["r"] + 0.5}) for r in rows]
    gain = estimate(shifted, "r", rows)
    assert gain["value"] == pytest.approx(0.5)
    assert gain["stderr"] == pytest.approx(0.0, abs=1e-12)
    parts = by_category(rows, "r")
    assert parts["x"]["value"] == pytest.approx(4.0)
    assert parts["y"] == {"value": 1.0, "stderr": None}  # one prompt: its error is not known
    mean = category_mean(rows, "r")
    assert mean["value"] == pytest.approx(2.5)
    assert mean["stderr"] is None


def test_an_image_does_not_depend_on_batch_order_or_number_of_prompts(make_backend, tmp_path):
    backend = make_backend("sana")
    scorer = Scorer(RewardSum([CallableReward("redness", 1.0, lambda images, _: redness(images))]), RewardSum([]), None)

    def scores(batch, prompts):
        found = Job(
            "best-of-n", BestOfN(scorer.rewards, n=3), backend, prompts, scorer, seeds=2, steps=2, batch=batch, seed=5,
            folder=tmp_path / f"{batch} {len(prompts)}",
        ).result()  # fmt: skip
        return {(row.prompt, row.seed): torch.tensor([row.scores["reward"], *row.pool]) for row in found.rows}

    whole = scores(7, tiny.PROMPTS)
    assert len({float(values[1]) for values in whole.values()}) == len(whole)
    for batch, prompts in ((1, tiny.PROMPTS), (3, tiny.PROMPTS[::-1]), (2, tiny.PROMPTS[2:])):
        for image, values in scores(batch, prompts).items():
            torch.testing.assert_close(values, whole[image], atol=1e-6, rtol=0)


def test_the_grid_shows_the_images_that_were_scored(make_backend, tmp_path, monkeypatch):
    """A method that takes minutes an image is not run again for a picture, and by one process while others wait."""
    backend, made = make_backend("sana"), []
    scorer = Scorer(RewardSum([CallableReward("redness", 1.0, lambda images, _: redness(images))]), RewardSum([]), None)
    shown = 3  # more than a chunk, and not all
    job = Job(
        "base", Base("base"), backend, tiny.PROMPTS, scorer, seeds=2, steps=1, batch=2, seed=5, folder=tmp_path,
        shown=shown,
    )  # fmt: skip
    rows = [row for row in job.result().rows if row.seed == 0][:shown]
    counted = evaluation.images_of
    monkeypatch.setattr(evaluation, "images_of", lambda *words: made.append(words[2]) or counted(*words))
    images = job.shown_images()
    assert not made
    assert images.dtype == torch.float32
    assert redness(images).tolist() == pytest.approx([row.scores["reward"] for row in rows], abs=1e-6)
    assert len({row.scores["reward"] for row in rows}) == shown
    (kept,) = tmp_path.glob("*seed0-from0.safetensors")
    content = kept.read_bytes()
    for damage in (content[:-1] + bytes([content[-1] ^ 1]), None):
        kept.unlink() if damage is None else kept.write_bytes(damage)
        made.clear()
        assert torch.equal(job.shown_images(), images)
        assert made == [tiny.PROMPTS[:2]]
        assert kept.read_bytes() == content
    assert job.result().rows[:1] == tuple(rows[:1])
    # four batches: two of each noise
    assert not evaluation.without_images(job, SimpleNamespace(count=4))
    assert evaluation.without_images(job, SimpleNamespace(count=6)).startswith(
        "4 batches of prompts and seeds for 6 processes, so that 2 make no images: a compare.batch below 2 "
    )


def test_methods_take_turns_and_their_seconds_are_medians(make_backend, tmp_path, monkeypatch):
    """A machine that is busy during one chunk, or at the start, makes no method slower than another."""
    backend, turns, clock = make_backend("sana"), [], iter(range(10**6))
    scorer = Scorer(RewardSum([CallableReward("redness", 1.0, lambda images, _: redness(images))]), RewardSum([]), None)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: float(next(clock)))

    @dataclass(frozen=True)
    class Slow(Base):
        """The base, which takes 100 seconds for its first chunk and 3 for any other."""

        def __call__(self, *arguments, **named):
            turns.append(self.name)
            for _ in range(100 if turns.count(self.name) == 1 else 2):
                next(clock)
            return super().__call__(*arguments, **named)

    jobs = [
        Job(name, Slow(name), backend, tiny.PROMPTS[:2], scorer, seeds=3, steps=1, batch=2, seed=5, folder=tmp_path)
        for name in ("one", "two")
    ]
    evaluation.evaluate_in_turn(jobs)
    assert turns == ["one", "two"] * 3
    one, two = (job.result() for job in jobs)
    assert one.seconds == two.seconds < 5
    assert one.cost.seconds > 100
    jobs[0].warm_up()
    assert len(turns) == 7, "a warm-up is made anew"
    assert jobs[0].result() == one, "and kept nowhere"


def test_the_command_in_a_report_makes_it_again(tmp_path):
    """Every flag, default or not, is read back to the same plan and overrides."""
    plan, others = make_plan(
        quick=True,
        methods=["base", "reno"],
        seeds=3,
        overrides=["compare.steps=[1, 4]", "compare.dino=x", "train.lr=0.1"],
    )
    settings = Settings("digits", plan, None, {}, ("a one", "a two"), tuple(others), True)
    words = shlex.split(reproducing_command(settings, ["a one", "a two"]))
    assert words[:3] == ["hnkit", "compare", "--backend"]
    assert "--prompts" not in words
    flags = [word for flag, word in itertools.pairwise(words) if flag == "--set"]
    again, rest = make_plan(
        quick="--quick" in words, methods=words[words.index("--methods") + 1].split(","),
        seeds=int(words[words.index("--seeds") + 1]), overrides=flags,
    )  # fmt: skip
    assert (again, rest) == (plan, others)
    assert "--prompts prompts.json" in reproducing_command(settings, ["a one"])


def test_plan_round_trips():
    plan, others = make_plan(
        quick=True, methods=["base"], seeds=3, overrides=["compare.steps=[1, 4]", "train.lr=0.1", "compare.dino=x"]
    )
    assert others == ["train.lr=0.1"]
    assert (plan.methods, plan.seeds, plan.steps, plan.dino, plan.best_of) == (("base",), 3, (1, 4), "x", 8)
    assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(InputError, match="not the plan of a comparison"):
        plan_from_json({"seeds": 1})
    assert Plan().best_of == 50


def test_csv_is_the_table(finished):
    out, document = finished
    table = all_tables(document)["table-1"]
    assert (out / "table-1.csv").read_text() == to_csv(table)


def test_an_adapter_is_compared_as_its_run_left_it(make_backend, checkpoint, tmp_path):
    """Model, options, training and rewards are the run's; flags come on top; an adapter alone says what it records."""
    options = tiny.options("sana", checkpoint("sana"), instruction=True, dtype="bfloat16")
    made = resolve_config(
        backend="sana",
        overrides=[*(f"backend.{key}={tiny.text(value)}"
                     for key, value in options.items()),
                   "train.alpha=0.25", "train.kl=second-order", "train.batch=6"],
        rewards=["redness=3.0"],
    )  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(made.to_toml())
    make_backend("sana", instruction=True).save_adapter(run / "adapter")
    for folder in (run, run / "adapter"):
        found = configuration("sana", folder, ["train.lr=0.5"])
        assert found.options == made.options
        assert {name: spec.weight for name, spec in found.rewards.items()} == {"redness": 3.0}
        assert (found.train.alpha, found.train.kl, found.train.lr) == (0.25, "second-order", 0.5)
    alone = configuration("sana", shutil.copytree(run / "adapter", tmp_path / "alone"), [])
    assert (alone.options.rank, alone.options.lora_alpha, alone.options.size) == (4, 8.0, 32)
    assert alone.options.instruction
    assert alone.options.model_id == str(checkpoint("sana"))
    plain = (run / "config.toml").read_text()
    looked = plain.replace("[heldout]\n", '[heldout]\n"mine.mod:look" = 1.0\nclipscore = 1.0\n')
    (run / "config.toml").write_text(looked)
    assert set(configuration("sana", run, []).heldout) == {"clipscore"}, "a function of its user's is not here"
    text = plain.replace("[rewards.redness]", '[rewards."mine.mod:score"]')
    (run / "config.toml").write_text(text)
    with pytest.raises(InputError, match=r"mine\.mod:score.*names an installed reward to compare by"):
        configuration("sana", run, [])
    named = configuration("sana", run, ["rewards.redness=2.0"])
    assert {name: spec.weight for name, spec in named.rewards.items()} == {"redness": 2.0}
    with pytest.raises(InputError, match="is for backend 'sana', not 'digits'"):
        configuration("digits", run, [])


@pytest.mark.slow
def test_a_comparison_of_what_injects_noise(overrides, tmp_path):
    """Training, images and nats are of what is deployed; the losses beside it, and direct tuning, have none of it."""
    chosen = [*overrides, "train.injection=0.5", "compare.ranks=[]", "compare.steps=[1]",
              "compare.losses=['l2']"]  # fmt: skip
    methods = ["base", "hypernoise", "direct"]
    document = COMPARISON("sana", methods=methods, prompts=PROMPTS, seeds=2, overrides=chosen, out=tmp_path / "run")
    injected = document["l2"][0]["injected"]
    assert injected["nats"] > 0
    assert "at most" in lead(document)
    (row,) = document["losses"]
    assert "injected" not in row["along_training"][-1]
    config = (tmp_path / "run" / "runs" / "hypernoise" / "config.toml").read_text()
    assert "injection = 0.5" in config
    assert "injection = 0.0" in (tmp_path / "run" / "runs" / "direct" / "config.toml").read_text()
