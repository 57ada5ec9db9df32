"""`hnkit generate`: runs that are cut short at any write go on and end alike; what cannot be an image is an error."""

from __future__ import annotations

import errno
import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import hnkit.generate
from hnkit.cli import app as cli
from hnkit.errors import InputError, NonFiniteError
from hnkit.generate import (
    PLAN,
    PROMPTS,
    SEAL,
    GeneratePlan,
    GenerateSettings,
    complete_prompts,
    generate_pairs,
    require_images,
)
from hnkit.injection import NoiseInjection
from hnkit.internal.files import read_sealed, write_sealed
from tests.hnkit.fake_backend import FakeBackend, FakeFactory, Options

COMMAND = ["generate", "--backend", "fake", "--adapter", "mine", "--prompt", "a cat", "--prompt", "a longer dog",
           "--count", "3", "--batch", "2"]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with an adapter of the fake backend."""
    factory = FakeFactory()
    for module in ("hnkit.backend", "hnkit.adapters"):
        monkeypatch.setattr(f"{module}.backend_factory", lambda _: factory)
    monkeypatch.chdir(tmp_path)
    backend = FakeBackend(Options())
    backend.hypernetwork.bias.data += 0.7
    backend.save_adapter(tmp_path / "mine")
    return tmp_path


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.app([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, by its path."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".lock"}


def test_a_run_that_is_cut_short_at_any_write_goes_on_as_printed_and_ends_alike(here, capsys, monkeypatch):
    command = COMMAND
    assert run(capsys, *command, "--out", "whole")[0] == 0
    whole = files(here / "whole")
    write, writes = hnkit.generate.atomic_write, 0

    def count(path, content):
        nonlocal writes
        writes += 1
        if writes == stop:
            raise failure
        write(path, content)

    monkeypatch.setattr(hnkit.generate, "atomic_write", count)
    full = OSError(errno.ENOSPC, "No space left on device", "x.png")
    for stop, failure in [(k, full) for k in (1, 4, 7, 8, 15)] + [(9, KeyboardInterrupt()), (2, KeyboardInterrupt())]:
        writes, out = 0, f"cut; {stop} {type(failure).__name__}"
        code, printed, err = run(capsys, *command, "--out", out, "--json")
        assert not (here / out / "report.json").exists()  # a folder without it is not finished
        if failure is full:
            assert code == 2
            document = json.loads(printed)
            assert document["finished"] is False
            assert document["images"] == 6 * ((stop > 7) + (stop > 14))
            assert "no space left on device" in err
        else:
            assert (code, printed) == (130, "")
        assert err.count("\n") == 1
        writes = 100
        words = shlex.split(err.strip().partition("go on with ")[2])
        assert words[0] == "hnkit"
        code, _, err = run(capsys, *words[1:])
        assert code == 0, err
        assert files(here / out) == whole
    monkeypatch.setattr(FakeBackend, "generate", None)
    assert run(capsys, *words[1:])[0] == 0  # a finished run makes no image again
    assert files(here / out) == whole


@pytest.mark.parametrize("source", ["nothing", "words", "file"])
def test_the_command_in_a_report_makes_its_images_again(source, here, capsys):
    """Its prompts are the backend's own, the user's words, or in the run folder with what their file said of them."""
    records = [
        {"prompt": prompt, "tag": "single_object", "include": []} for prompt in ("a cat", "it's two \u201cd\u201d")
    ]
    (here / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    given = {
        "nothing": (),
        "words": ("--prompt", "a cat", "--prompt", 'it\'s "two"'),
        "file": ("--prompts", "asked.jsonl", "--layout", "geneval"),
    }[source]
    command = ("generate", "--backend", "fake", "--adapter", "mine", *given, "--count", "2", "--seed", "3")
    assert run(capsys, *command, "--out", "whole")[0] == 0
    (here / "asked.jsonl").unlink()
    page = html.unescape((here / "whole" / "report.html").read_text(encoding="utf-8"))
    program, *words = shlex.split(re.search("Reproduce</h2>.*?<pre>(.*?)</pre>", page)[1])
    assert program == "hnkit"
    if source == "file":
        words[words.index("--prompts") + 1] = f"whole/{PROMPTS}"  # the page says that it is meant from there
    else:
        assert sorted(words) == sorted(str(here / word) if word == "mine" else word for word in command)
    assert run(capsys, *words, "--out", "again")[0] == 0
    assert files(here / "again") == files(here / "whole")


def test_images_do_not_depend_on_the_batch_or_on_the_other_prompts(here, capsys):
    def images(out, *flags):
        assert run(capsys, "generate", "--backend", "fake", "--adapter", "mine", *flags, "--out", out)[0] == 0
        prompts = json.loads((here / out / "report.json").read_text())["prompts"]
        return {
            (prompts[int(path.parent.name[-3:])], path.name): path.read_bytes()
            for path in (here / out).rglob("prompt-*/*.png")
        }

    many = ("--count", "7", "--steps", "3")
    whole = images("whole", "--prompt", "a cat", "--prompt", "a longer dog", *many)
    assert len(set(whole.values())) == len(whole) == 28
    for batch in ("1", "3"):
        found = images(f"by {batch}", "--prompt", "a longer dog", "--prompt", "a cat", *many, "--batch", batch)
        assert found == whole
    few = images("few", "--prompt", "a longer dog", "--count", "2", "--steps", "3")
    assert few.items() <= whole.items()


def test_injected_noise_is_each_image_s_own(tmp_path):
    """Steered images have fresh noise of their own, whatever the batch and the other prompts; base images have none."""

    def images(folder, prompts, batch, injection):
        backend = FakeBackend(Options())
        backend.injection = injection
        (tmp_path / folder).mkdir()
        generate_pairs(backend, prompts, GenerateSettings(count=5, batch=batch), tmp_path / folder)
        return {
            (prompts[int(path.parent.name[-3:])], path.name): path.read_bytes()
            for path in (tmp_path / folder).rglob("prompt-*/*.png")
        }

    prompts = ["a cat", "a longer dog"]
    plain, whole = images("plain", prompts, 8, None), images("whole", prompts, 8, NoiseInjection(0.5))
    for key, image in whole.items():
        assert (image == plain[key]) == key[1].startswith("base")
    assert len({whole[key] for key in whole if key[1].startswith("steered")}) == 10
    assert images("one by one", prompts[::-1], 1, NoiseInjection(0.5)) == whole
    # f = 0 here: next to nothing injected is next to the base image
    assert images("little", ["a cat"], 2, NoiseInjection(1e-9)).items() <= plain.items()


def test_a_layout_that_was_cut_short_is_made_again(here, capsys, monkeypatch):
    write_layout = hnkit.generate.write_layout
    (here / "p.jsonl").write_text('{"prompt": "a cat", "tag": "x", "include": [{"class": "cat", "count": 1}]}\n')
    command = ["generate", "--backend", "fake", "--adapter", "mine", "--prompts", "p.jsonl", "--layout", "geneval"]
    assert run(capsys, *command, "--out", "whole")[0] == 0
    whole = files(here / "whole")
    assert not [name for name in whole if ".tmp" in name]
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full", "y")))
    assert run(capsys, *command, "--out", "cut")[0] == 2
    assert not (here / "cut" / "geneval-base").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    for module in ("hnkit.backend", "hnkit.adapters"):
        monkeypatch.setattr(f"{module}.backend_factory", lambda _: FakeFactory())
    assert hnkit.generate.write_layout is write_layout
    assert run(capsys, "generate", "--resume", "cut")[0] == 0
    assert files(here / "cut") == whole


def _lose(folder):
    (folder / "steered-02.png").unlink()


def _swap(folder):
    (folder / "base-00.png").write_bytes((folder / "base-01.png").read_bytes())


def _cut(folder):
    (folder / "base-00.png").write_bytes((folder / "base-00.png").read_bytes()[:-9])


def _other_text(folder):
    (folder / "prompt.txt").write_text("a longer dog\n")


def _other_prompt(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("prompt-001"), folder)


def _other_seed(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parents[1] / "other" / folder.name, folder)


def _reseal(folder):
    seal = read_sealed(folder / SEAL)
    write_sealed(folder / SEAL, {**seal, "images": {"base-00.png": seal["images"]["base-00.png"]}})


def _no_seal(folder):
    (folder / SEAL).write_text("[3]")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_lose, "steered-02.png was missing"), (_swap, "base-00.png was not the image that had been written"),
        (_cut, "base-00.png was not the image"), (_other_text, "prompt.txt was missing, or was not the text"),
        (_other_prompt, "prompt.txt was missing, or was not the text"), (_other_seed, "its images were another run's"),
        (_reseal, "its images were another run's"), (_no_seal, "images.json was damaged"),
    ],
)  # fmt: skip
def test_a_prompt_whose_images_are_not_as_they_were_written_is_made_again(spoil, said, here, capsys):
    asked = [{"prompt": prompt, "tag": "x", "include": []} for prompt in ("a cat", "a longer dog")]
    (here / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    command = ["generate", "--backend", "fake", "--adapter", "mine", "--prompts", "asked.jsonl", "--count", "3",
               "--layout", "geneval"]  # fmt: skip
    assert run(capsys, *command, "--seed", "5", "--out", "other")[0] == 0
    assert run(capsys, *command, "--out", "run")[0] == 0
    whole = files(here / "run")
    (here / "run" / "prompt-000" / "NOTES.txt").write_text("mine")
    next((here / "run" / "geneval-base").rglob("*.png")).unlink()
    spoil(here / "run" / "prompt-000")
    notes = {"prompt-000/NOTES.txt": b"mine"} if (here / "run" / "prompt-000" / "NOTES.txt").exists() else {}
    plan = GeneratePlan.read(here / "run")
    assert complete_prompts(here / "run", plan) == 1
    code, _, err = run(capsys, "generate", "--resume", "run")
    assert (code, err.count("\n"), said in err) == (0, 1, True), err
    assert files(here / "run") == whole | notes
    assert complete_prompts(here / "run", plan) == 2
    assert run(capsys, "generate", "--resume", "run")[2] == ""  # and of what is whole nothing is said


def test_what_a_run_depends_on_may_not_change_behind_it(here, capsys, monkeypatch):
    assert run(capsys, *COMMAND, "--out", "run")[0] == 0
    plan = read_sealed(here / "run" / PLAN)
    assert plan["prompts"] == ["a cat", "a longer dog"]
    assert set(plan["adapter_files"]) == {"adapter.safetensors"}
    monkeypatch.setattr(FakeBackend, "model_digest", lambda _: "other", raising=False)
    code, _, err = run(capsys, "generate", "--resume", "run")
    assert code == 2
    assert "base model has changed" in err
    backend = FakeBackend(Options())
    backend.save_adapter(here / "mine")
    code, _, err = run(capsys, "generate", "--resume", "run")
    assert code == 2
    assert "its adapter" in err


def test_a_model_of_unknown_content_is_not_replaced_on_resume(here, capsys):
    assert run(capsys, *COMMAND, "--out", "run")[0] == 0
    for flags in (["--model-id", "other"], ["--set", "backend.model_id=other"]):
        code, _, err = run(capsys, "generate", "--resume", "run", *flags)
        assert code == 2
        assert "does not know its models by their content" in err


def test_a_new_card_of_the_adapter_makes_no_image_again(here, capsys):
    assert run(capsys, *COMMAND, "--out", "run")[0] == 0
    whole = files(here / "run")
    for name in ("README.md", "verdict.json", ".hnkit-files"):
        (here / "mine" / name).write_text("{}")
    (here / "run" / "prompt-001" / "prompt.txt").unlink()
    code, _, err = run(capsys, "generate", "--resume", "run")
    assert (code, err.count("made again")) == (0, 1), err
    after = files(here / "run")
    assert {name for name in after if name not in whole or after[name] != whole[name]} == set()


def test_an_adapter_that_was_moved_is_named_once_and_known_by_its_content(here, capsys):
    assert run(capsys, *COMMAND, "--out", "run")[0] == 0
    whole = files(here / "run")
    (here / "mine").rename(here / "moved")
    next((here / "run").rglob("prompt-001/prompt.txt")).unlink()
    code, _, err = run(capsys, "generate", "--resume", "run")
    assert (code, "name where it lies now with --adapter DIR" in err) == (2, True), err
    assert run(capsys, "generate", "--resume", "run", "--adapter", "moved")[0] == 0
    changed = {name for name, content in files(here / "run").items() if content != whole.get(name)}
    assert changed <= {PLAN, "report.html"}  # where the adapter lies is in both, in the page as a part of the command
    page = (here / "run" / "report.html").read_bytes()
    assert page.replace(bytes(here / "moved"), bytes(here / "mine")) == whole["report.html"]
    (here / "run" / "prompt-000" / "prompt.txt").unlink()
    assert run(capsys, "generate", "--resume", "run")[0] == 0
    (here / "other").mkdir()
    (here / "other" / "adapter.safetensors").write_bytes(b"other")
    code, _, err = run(capsys, "generate", "--resume", "run", "--adapter", "other")
    assert (code, "has changed since" in err) == (2, True), err
    assert run(capsys, "generate", "--backend", "fake", "--prompt", "a cat", "--out", "base")[0] == 0
    code, _, err = run(capsys, "generate", "--resume", "base", "--adapter", "moved")
    assert (code, "its images are made without one" in err) == (2, True), err


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_folder_that_is_removed_or_replaced_under_a_run_is_left_alone(replaced, here, capsys, monkeypatch):
    assert run(capsys, *COMMAND, "--out", "other")[0] == 0
    other = files(here / "other")
    plain, writes = hnkit.generate.atomic_write, iter(range(100))

    def write(path, content):
        if next(writes) == 3:
            (here / "run").rename(here / "away")
            if replaced:
                (here / "other").rename(here / "run")
        plain(path, content)

    monkeypatch.setattr(hnkit.generate, "atomic_write", write)
    code, _, err = run(capsys, *COMMAND, "--out", "run")
    assert (code, "is no longer the folder that this run writes to" in err) == (2, True), err
    assert (files(here / "run") if replaced else (here / "run").exists()) == (other if replaced else False)
    monkeypatch.setattr(hnkit.generate, "atomic_write", plain)
    shutil.rmtree(here / "run", ignore_errors=True)
    (here / "away").rename(here / "run")
    assert run(capsys, "generate", "--resume", "run")[0] == 0
    assert files(here / "run") == other


def test_links_in_a_run_folder_are_not_followed(here, capsys):
    assert run(capsys, *COMMAND, "--out", "run")[0] == 0
    (here / "elsewhere").mkdir()
    for path in (here / "run" / "prompt-000").iterdir():
        path.unlink()
    (here / "run" / "prompt-000").rmdir()
    (here / "run" / "prompt-000").symlink_to(here / "elsewhere")
    code, _, err = run(capsys, "generate", "--resume", "run")
    assert code == 2
    assert "is a symbolic link" in err
    assert not list((here / "elsewhere").iterdir())


def test_a_plan_reads_back_and_lifts_no_restriction(tmp_path):
    plan = GeneratePlan(
        "fake", GenerateSettings(count=2, seed=5), ("a", "b"), {"a": {"item_id": 3}}, ("backend.size=3",), "mine",
        {"w": "0"}, "digest",
    )  # fmt: skip
    plan.write(tmp_path)
    assert GeneratePlan.read(tmp_path) == plan
    write_sealed(tmp_path / PLAN, read_sealed(tmp_path / PLAN) | {"overrides": ["backend.local_files_only=false"]})
    with pytest.raises(InputError, match="only your own flag may allow that"):
        GeneratePlan.read(tmp_path)


def test_every_prompt_is_tried_before_anything_is_written(here, capsys, monkeypatch):
    encode = FakeBackend.encode

    def refuse(self, prompts):
        if any("dog" in prompt for prompt in prompts):
            raise InputError(f"prompt {prompts[0]!r} is not one that this model knows")
        return encode(self, prompts)

    monkeypatch.setattr(FakeBackend, "encode", refuse)
    code, _, err = run(capsys, *COMMAND, "--out", "run")
    assert code == 2
    assert "a longer dog" in err
    assert not (here / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fault", ["base", "steered", "delta"])
def test_outputs_that_are_not_finite_are_an_error_and_no_black_image(fault, value, tmp_path, monkeypatch):
    backend = FakeBackend(Options())
    if fault == "delta":
        backend.hypernetwork.bias.data[1] = value
    else:
        generate, calls = backend.generate, []

        def broken(noise, condition, steps=1):
            images = generate(noise, condition, steps)
            calls.append(images)
            if len(calls) == {"base": 1, "steered": 2}[fault]:
                images[-1, 0, 0, 0] = value
            return images

        monkeypatch.setattr(backend, "generate", broken)
    with pytest.raises(NonFiniteError, match=f"{fault}.*'a cat'"):
        generate_pairs(backend, ["a cat"], GenerateSettings(count=2), str(tmp_path))
    assert not list(tmp_path.rglob("*.png"))


def test_a_guidance_that_is_not_finite_is_refused_before_the_model_is_loaded(here, capsys, monkeypatch):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Guided(Options):
        guidance: float = 1.0

    factory = FakeFactory(options=Guided)
    monkeypatch.setattr("hnkit.adapters.backend_factory", lambda _: factory)
    factory.recorded = lambda _: {"guidance": float("nan")}
    code, _, err = run(capsys, *COMMAND, "--out", "run")
    assert code == 2
    assert "guidance = nan" in err
    assert not factory.loaded
    factory.recorded = lambda _: {"guidance": 1.5, "prompts": 7}
    assert run(capsys, *COMMAND, "--set", "backend.device=cpu", "--out", "run")[0] == 0
    assert factory.loaded[0].options == Guided(guidance=1.5, prompts=7)  # another --set does not drop what is recorded


def test_huge_weights_are_an_error(tmp_path):
    backend = FakeBackend(Options())
    backend.hypernetwork.weight.data += 3e38
    backend.hypernetwork.bias.data += 3e38
    with pytest.raises(NonFiniteError, match="delta"):
        generate_pairs(backend, ["a very long prompt about cats"], GenerateSettings(count=2), tmp_path)
    require_images(backend, ["a cat"], GenerateSettings())  # the base images are sound
    assert torch.isfinite(backend.generate(torch.zeros(1, 3, 4, 4), backend.encode(["a"]))).all()


@pytest.mark.parametrize("longest", range(8, 40))
def test_a_long_prompt_is_cut_between_words(longest):
    prompt = "a red fox beside two blue cats on a roof"
    shown = hnkit.generate._shortened(prompt, longest)
    assert len(shown) <= longest
    assert shown.endswith("...")
    assert f"{prompt} ".startswith(f"{shown.removesuffix('...')} ")


def test_a_path_reaches_the_terminal_without_what_it_obeys(here, capsys):
    code, printed, err = run(capsys, *COMMAND, "--out", "e\x1b[31m")
    assert (code, "\x1b" in printed + err) == (0, False)
    assert r"report: e\x1b[31m/report.html" in printed


def test_an_adapter_that_may_not_be_read_is_not_told_to_be_written_elsewhere(here, capsys, monkeypatch):
    plain = Path.is_file

    def denied(path):
        if "mine" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "is_file", denied)
    code, _, err = run(capsys, *COMMAND, "--out", "run")
    assert (code, "adapter mine cannot be read (Permission denied: mine/" in err, "--out" in err) == (2, True, False), (
        err
    )
    assert not (here / "run").exists()
