"""The configuration: strict types, one line per mistake, and a file that reads back to the same record."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hnkit import InputError
from hnkit.config import (
    PERMISSIONS,
    GenerateSettings,
    RewardSpec,
    RunConfig,
    TrainConfig,
    differing_keys,
    own_rewards,
    parse_reward_flag,
    resolve_config,
    resume_command,
)
from hnkit.injection import NoiseInjection
from hnkit.internal.values import described, field_types


@dataclass(frozen=True)
class Options:
    size: int = 4
    scale: float = 1.0
    label: str = "plain"
    folder: Path | None = None
    mode: Literal["a", "b"] = "a"
    shape: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 2.0)
    fast: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"backend.size = {self.size}: accepted is at least 1")


@dataclass(frozen=True)
class Factory:
    name: str = "fake"
    summary: str = ""
    options: type = Options
    presets: dict = dataclasses.field(
        default_factory=lambda: {
            "default": {"train.lr": 0.5, "backend.size": 7},
            "big": {"backend.size": 9, "rewards.redness": 2.0},
        }
    )


@pytest.fixture(autouse=True)
def _fake_backend(monkeypatch):
    monkeypatch.setattr("hnkit.backend.backend_factory", lambda name: Factory())


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_sources_win(tmp_path):
    file = write(tmp_path / "c.toml", '[train]\nlr = 0.25\nsteps = 3\n[backend]\nname = "fake"\nscale = 2\n')
    config = resolve_config(config_file=file, overrides=["train.steps=5", "backend.label=other"])
    assert config.backend == "fake"
    assert (config.train.lr, config.train.steps) == (0.25, 5)  # file over preset, flag over file
    assert (config.options.size, config.options.scale, config.options.label) == (7, 2.0, "other")
    assert isinstance(config.options.scale, float)


def test_presets_stack_on_the_default_one():
    config = resolve_config(backend="fake", preset="big")
    assert (config.options.size, config.train.lr) == (9, 0.5)
    assert config.rewards == {"redness": RewardSpec(2.0)}


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("backend.size=12", "size", 12),
        ("backend.scale=3", "scale", 3.0),
        ("backend.label=12", "label", "12"),
        ('backend.label="a b"', "label", "a b"),
        ("backend.folder=/tmp/x", "folder", Path("/tmp/x")),
        ("backend.folder=none", "folder", None),
        ("backend.mode=b", "mode", "b"),
        ("backend.shape=[3, 4]", "shape", (3, 4)),
        ("backend.pair=[3, 4]", "pair", (3, 4.0)),
        ("backend.fast=true", "fast", True),
    ],
)
def test_flags_are_read_by_the_type_of_their_key(override, field, value):
    assert getattr(resolve_config(backend="fake", overrides=[override]).options, field) == value


BAD = [
    ("train.stepz=1", "unknown key 'stepz' (did you mean 'steps'?)"),
    ("train.steps=1.0", "an integer"),
    ("train.steps=true", "an integer"),
    ("train.steps=0", "train.steps = 0: accepted is a value >= 1"),
    ("train.steps=ten", "an integer"),
    ("train.lr=0", "train.lr = 0.0: accepted is a value > 0"),
    ("train.lr=nan", "a finite number"),
    ("train.lr=inf", "a finite number"),
    ("train.lr=1" + "0" * 400, "a finite number"),
    ("train.alpha=-1", "train.alpha"),
    ("train.alpha=0", "train.alpha"),
    ("train.ema=1", "< 1"),
    ("train.reward_clip=-1", "train.reward_clip = -1.0: accepted is a value >= 0"),
    ("train.reward_clip=nan", "a finite number"),
    ("train.kl=l3", "one of 'l2', 'second-order', 'arnoldi', 'exact'"),
    ("train.kl=", "one of 'l2'"),
    ("train.nesterov=1", "true or false"),
    ("train.trackers=mlflow", "'tensorboard'"),
    ("train.seed=-1", "train.seed"),
    ("train.seed=9223372036854775808", "train.seed"),
    ("train.nesterov=true", "train.nesterov"),
    ("train.accumulate=3", "not a multiple"),
    ("backend.mode=c", "one of 'a', 'b'"),
    ("backend.shape=[1.5]", "a list, each entry an integer"),
    ("backend.pair=[1]", "a list of 2 entries"),
    ("backend.size=0", "accepted is at least 1"),
    ("backend.colour=red", "accepted are fast, folder, label"),
    ("other.x=1", "TABLE"),
    ("train", "TABLE.KEY=VALUE"),
    ("train=3", "TABLE.KEY=VALUE"),
    ("=", "TABLE.KEY=VALUE"),
    ("", "TABLE.KEY=VALUE"),
    ("rewards.redness=heavy", "a finite weight"),
    ("rewards.pkg.mod:fn=1", "import path"),
    ("train.prompts=\udc80", "a string"),
]


@pytest.mark.parametrize(("override", "expected"), BAD)
def test_bad_values_are_one_line_that_says_what_is_accepted(override, expected):
    with pytest.raises(InputError) as raised:
        resolve_config(backend="fake", overrides=[override])
    message = str(raised.value)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train", "is not TOML"),
        ("steps = 3", "unknown table or key 'steps'"),
        ("train = 3", "is not a table"),
        ("[training]\nsteps = 3", "unknown table or key 'training'"),
        ("[train]\nstep = 3", "unknown key 'step'"),
        ("[train]\nsteps = '3'", "steps = '3': accepted is an integer"),
        ("[train]\nlr = inf", "a finite number"),
        ("[rewards]\nredness = true", "a finite weight"),
        ("[rewards]\nredness = { weight = 1, colours = [1] }", "redness.colours"),
        ("[rewards]\n'pkg.mod:fn' = 1.0", "code is never taken from a file"),
        ("[heldout]\n'pkg.mod:fn' = 1.0", "code is never taken from a file"),
        ("[train]\nsteps = " + "9" * 5000, "is not TOML"),
        ("a = " + "[" * 5000, "is not TOML"),
    ],
)
def test_bad_files(tmp_path, text, expected):
    with pytest.raises(InputError) as raised:
        resolve_config(backend="fake", config_file=write(tmp_path / "c.toml", text))
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"[train]\nprompts = '\xff'")
    for path, expected in (
        (tmp_path / "missing.toml", "cannot be read"),
        (tmp_path, "cannot be read"),
        (tmp_path / "binary.toml", "not UTF-8"),
    ):
        with pytest.raises(InputError, match=expected):
            resolve_config(backend="fake", config_file=path)


def test_no_backend_and_unknown_preset():
    with pytest.raises(InputError, match="no backend given"):
        resolve_config()
    with pytest.raises(InputError, match=r"unknown preset 'huge'.*default, big"):
        resolve_config(backend="fake", preset="huge")


@pytest.mark.parametrize(
    "flag", ["", "=1", "redness=", "redness=heavy", "redness=nan", "redness=inf", "redness=\u0661", "redness=1_0"]
)
def test_bad_reward_flags(flag):
    with pytest.raises(InputError, match="NAME=WEIGHT"):
        parse_reward_flag(flag)


def test_reward_flags_replace_the_table_and_may_name_code(tmp_path):
    file = write(tmp_path / "c.toml", "[rewards]\nredness = 3\n[heldout]\nhpsv2 = { weight = 2, folder = '/w' }\n")
    config = resolve_config(backend="fake", config_file=file, rewards=["pkg.mod:fn=0.5", "clipscore"])
    assert config.rewards == {"pkg.mod:fn": RewardSpec(0.5), "clipscore": RewardSpec(1.0)}
    assert config.heldout == {"hpsv2": RewardSpec(2.0, {"folder": "/w"})}


def test_set_reaches_into_rewards():
    config = resolve_config(
        backend="fake", rewards=["redness=2"], overrides=["rewards.redness.folder=/w", "heldout.hpsv2=0.5"]
    )
    assert config.rewards == {"redness": RewardSpec(2.0, {"folder": "/w"})}
    assert config.heldout == {"hpsv2": RewardSpec(0.5)}


def test_resuming_starts_from_the_saved_configuration(tmp_path):
    saved = resolve_config(backend="fake", preset="big", overrides=["train.steps=7"])
    write(tmp_path / "config.toml", saved.to_toml())
    assert resolve_config(resume=tmp_path) == saved
    longer = resolve_config(resume=tmp_path, overrides=["train.steps=9"])
    assert differing_keys(saved.to_dict(), longer.to_dict()) == ["train.steps"]
    with pytest.raises(InputError, match="keeps its own configuration"):
        resolve_config(resume=tmp_path, preset="big")


def test_resuming_a_run_with_code_needs_the_flag_again(tmp_path):
    saved = resolve_config(backend="fake", rewards=["pkg.mod:fn=0.5"])
    write(tmp_path / "config.toml", saved.to_toml())
    with pytest.raises(InputError, match=r"give --reward pkg\.mod:fn=WEIGHT"):
        resolve_config(resume=tmp_path)
    assert resolve_config(resume=tmp_path, rewards=["pkg.mod:fn=0.5"]) == saved


CODE = {"rewards": ["pkg.mod:fn=0.5", "redness=2"], "heldout": ["pkg.mod:look=3", "clipscore"]}


def test_a_run_with_code_in_either_table_goes_on_with_the_flags_that_name_the_code(tmp_path):
    saved = resolve_config(backend="fake", **CODE, overrides=["rewards.redness.folder=/w"])
    write(tmp_path / "config.toml", saved.to_toml())
    for flags, missing in (
        ({}, r"\[rewards\] names the import path .* give --reward pkg\.mod:fn=WEIGHT"),
        ({"heldout": CODE["heldout"]}, "give --reward"),
        ({"rewards": CODE["rewards"]}, r"\[heldout\] names the import path .* give --heldout pkg\.mod:look=WEIGHT"),
        ({"rewards": [*CODE["rewards"], "pkg.mod:look"]}, "give --heldout"),
    ):
        with pytest.raises(InputError, match=missing):
            resolve_config(resume=tmp_path, **flags)
    alone = {"rewards": ["pkg.mod:fn=0.5"], "heldout": ["pkg.mod:look=3"]}
    unweighed = {"rewards": ["pkg.mod:fn"], "heldout": ["pkg.mod:look"]}
    for flags in (CODE, alone, unweighed):
        assert resolve_config(resume=tmp_path, **flags) == saved
        assert resolve_config(resume=str(tmp_path), **flags) == saved
    changed = resolve_config(resume=tmp_path, rewards=["pkg.mod:fn=0.7"], heldout=["pkg.mod:look"])
    assert differing_keys(saved.to_dict(), changed.to_dict()) == ["rewards.pkg.mod:fn"]


def test_the_command_that_goes_on_with_a_run_works_as_it_is_printed(tmp_path):
    run = tmp_path / "my run; touch x"
    run.mkdir()
    saved = resolve_config(backend="fake", **CODE)
    write(run / "config.toml", saved.to_toml())
    program, command, *words = shlex.split(resume_command(saved, run))
    assert (program, command) == ("hnkit", "train")
    given = {"--resume": [], "--reward": [], "--heldout": []}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        given[flag].append(value)
    assert resolve_config(resume=given["--resume"][0], rewards=given["--reward"], heldout=given["--heldout"]) == saved
    assert resume_command(resolve_config(backend="fake"), Path("runs/a")) == "hnkit train --resume runs/a"


def test_a_saved_configuration_with_code_serves_a_new_run_that_names_it(tmp_path):
    saved = resolve_config(backend="fake", **CODE)
    file = write(tmp_path / "config.toml", saved.to_toml())
    assert resolve_config(config_file=file, **CODE) == saved
    other = resolve_config(config_file=file, rewards=["redness"], heldout=["clipscore"])  # the tables are replaced
    assert (other.rewards, other.heldout) == ({"redness": RewardSpec(1.0)}, {"clipscore": RewardSpec(1.0)})
    with pytest.raises(InputError, match="code is never taken from a file"):
        resolve_config(config_file=file, rewards=CODE["rewards"])


def test_only_training_asks_for_the_rewards_of_a_run(tmp_path):
    saved = resolve_config(backend="fake", **CODE, overrides=["train.alpha=3"])
    write(tmp_path / "config.toml", saved.to_toml())
    used = resolve_config(resume=tmp_path, rewards_of_files="none")
    assert (used.options, used.train) == (saved.options, saved.train)
    assert not used.rewards
    assert not used.heldout
    measured = resolve_config(resume=tmp_path, rewards_of_files="installed")
    assert measured.rewards == {name: spec for name, spec in saved.rewards.items() if ":" not in name}
    assert measured.heldout == {name: spec for name, spec in saved.heldout.items() if ":" not in name}
    assert own_rewards(tmp_path) == [name for name in saved.rewards if ":" in name] != []


@dataclass(frozen=True)
class Downloading:
    model_id: str = "some/model"
    folder: Path | None = None
    local_files_only: bool = True


@pytest.fixture
def downloading(monkeypatch):
    factory = Factory(options=Downloading, presets={})
    monkeypatch.setattr("hnkit.backend.backend_factory", lambda name: factory)


def test_a_file_cannot_switch_downloads_on(tmp_path, downloading):
    flag = "backend.local_files_only=false"
    mine = resolve_config(backend="fake", overrides=[flag])
    assert mine.options.local_files_only is False
    write(tmp_path / "config.toml", mine.to_toml())
    assert "local_files_only" not in mine.to_toml()  # leave to download is not passed on with the run
    again = resolve_config(resume=tmp_path)
    assert again.options.local_files_only is True
    assert not differing_keys(mine.to_dict(), again.to_dict())
    for text, wanted in (
        ("[backend]\nlocal_files_only = false\n", flag),
        ("[rewards]\nx = { local_files_only = false }\n", "rewards.x.local_files_only=false"),
        ("[heldout]\nx = { local_files_only = 0 }\n", "heldout.x.local_files_only=0"),
    ):
        file = write(tmp_path / "received.toml", text)
        for source in ({"config_file": file}, {"resume": tmp_path}):
            write(tmp_path / "config.toml", text)
            with pytest.raises(InputError, match=f"a file cannot allow that, give --set {wanted}"):
                resolve_config(backend="fake", **source)
        with pytest.raises(InputError, match="a file cannot allow that"):
            resolve_config(backend="fake", resume=tmp_path, rewards_of_files="none")
    file = write(tmp_path / "received.toml", "[backend]\nlocal_files_only = false\n")
    assert resolve_config(backend="fake", config_file=file, overrides=[flag]) == mine
    assert resolve_config(backend="fake", config_file=write(file, "[backend]\nlocal_files_only = true\n"))


def test_paths_in_a_file_are_looked_for_beside_it_first(tmp_path, downloading, monkeypatch):
    for place in ("here", "there"):
        (tmp_path / place / "models/mine").mkdir(parents=True)
        (tmp_path / place / "p.txt").touch()
    (tmp_path / "here/only.txt").touch()
    monkeypatch.chdir(tmp_path / "here")
    document = (
        '[train]\nprompts = "p.txt"\nvalidation_prompts = "only.txt"\n[backend]\nmodel_id = "models/mine"\n'
        'folder = "models"\n[rewards]\nx = { head = "p.txt", device = "cpu" }\n'
    )
    file = write(tmp_path / "there/c.toml", document)
    config = resolve_config(backend="fake", config_file="../there/c.toml")
    assert config.train.prompts == "../there/p.txt"
    assert config.train.validation_prompts == "only.txt"  # not beside the file, so of the working directory
    assert config.options == Downloading("../there/models/mine", Path("../there/models"))
    assert config.rewards["x"].options == {"head": "../there/p.txt", "device": "cpu"}
    absolute = resolve_config(backend="fake", config_file=file)
    assert absolute.train.prompts == str(tmp_path / "there/p.txt")
    (tmp_path / "there/t.csv").touch()
    write(file, '[train]\nprompts = "t.csv:a caption"\nvalidation_prompts = "hf:org/name:test:caption"\n')
    columns = resolve_config(backend="fake", config_file=file).train
    assert columns.prompts == f"{tmp_path / 'there/t.csv'}:a caption"
    assert columns.validation_prompts == "hf:org/name:test:caption"
    write(file, document)
    flags = ["train.prompts=p.txt", "backend.model_id=models/mine"]
    typed = resolve_config(backend="fake", config_file=file, overrides=flags)
    assert (typed.train.prompts, typed.options.model_id) == ("p.txt", "models/mine")


def test_every_setting_says_what_it_is():
    for record in (TrainConfig, GenerateSettings):
        assert set(described(record)) == set(field_types(record))


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
scalars = st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | text
specs = st.builds(
    RewardSpec,
    st.floats(allow_nan=False, allow_infinity=False),
    st.dictionaries(text.filter(lambda key: key not in {"weight", *PERMISSIONS}), scalars, max_size=3),
)
rewards = st.dictionaries(text.filter(lambda name: ":" not in name), specs, max_size=3)
options = st.builds(
    Options,
    size=st.integers(1, 2**40),
    label=text,
    scale=st.floats(allow_nan=False, allow_infinity=False),
    folder=st.none() | text.map(Path),
    mode=st.sampled_from(["a", "b"]),
    shape=st.lists(st.integers(), max_size=4).map(tuple),
    fast=st.booleans(),
)
trains = st.builds(
    TrainConfig,
    lr=st.floats(1e-300, 3e38),
    seed=st.integers(0, 2**63 - 1),
    prompts=text,
    trackers=st.sampled_from([(), ("tensorboard",), ("wandb", "tensorboard")]),
    kl=st.sampled_from(["l2", "exact"]),
)


@settings(max_examples=60, deadline=None)
@given(trains, options, rewards, rewards)
def test_a_saved_configuration_reads_back_equal(tmp_path_factory, train, chosen, trained, heldout):
    config = RunConfig("fake", chosen, train, trained, heldout)
    path = write(tmp_path_factory.mktemp("toml") / "config.toml", config.to_toml())
    assert resolve_config(config_file=path) == config


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_no_override_ever_raises_anything_but_an_input_error(key, value):
    for override in (f"train.{key}={value}", f"backend.{key}={value}", f"{key}={value}", f"train.steps={value}"):
        line = ""
        try:
            assert isinstance(resolve_config(backend="fake", overrides=[override]), RunConfig)
        except InputError as error:
            line = str(error)
        assert "\n" not in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"injection": 1.0}, "train.injection = 1.0: accepted"),
        ({"injection": 0.5, "kl": "exact"}, "train.injection with train.kl = 'exact'"),
        ({"injection": 0.5, "objective": "direct"}, "moves no noise"),
        ({"draws": 4}, "train.draws = 4 with train.reward_gradient = 'pathwise', which takes one"),
        ({"draws": 2, "injection": 0.5}, "train.draws = 2 with train.reward_gradient = 'pathwise', which takes one"),
        ({"max_delta": 2.0}, "train.max_delta = 2.0 without train.injection"),
        ({"reward_gradient": "score-function"}, "'score-function' without train.injection"),
        ({"reward_gradient": "score-function", "injection": 0.5}, "train.draws = 2 or more"),
    ],
)
def test_injected_noise_is_asked_for_before_what_is_about_it(settings, words):
    with pytest.raises(InputError) as caught:
        TrainConfig(**settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_how_a_hypernetwork_is_deployed():
    assert TrainConfig().deployment is None
    assert TrainConfig(injection=0.5).deployment == NoiseInjection(0.5)
    assert TrainConfig(injection=0.2, max_delta=3.0).deployment == NoiseInjection(0.2, 3.0)
