"""The adapter of a checkpoint is the one of a run that ended there, and a run may start from an adapter."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from hnkit import InputError
from hnkit.adapters import adapter_folder, load_trained
from hnkit.config import resolve_config
from hnkit.training.export import export_adapter
from tests.hnkit.cli.test_app import run as command
from tests.hnkit.training.training_runs import fake_config, resume, run, small


def weights(folder):
    (file,) = adapter_folder(folder).glob("*.safetensors")
    return load_file(file)


def constant(*overrides):
    return small("schedule=constant", "warmup=0", "keep=9", "measure_every=0", *overrides)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("more", [(), ("ema=0.8",)])
def test_the_adapter_of_a_checkpoint_is_that_of_a_run_that_ended_there(tmp_path, more):
    """The oracle is a run of so many steps: equal noise and prompts, and the trainer's own way of saving."""
    run(constant(*more), tmp_path / "whole")
    run(constant("steps=6", *more), tmp_path / "short")
    checkpoints = tmp_path / "whole" / "checkpoints"
    for source, oracle, step in ((checkpoints / "step-00000006", "short", 6), (tmp_path / "whole", "whole", 20)):
        document = export_adapter(str(source), out=str(tmp_path / f"export-{step}"))
        assert document["step"] == step
        assert equal(weights(document["adapter"]), weights(tmp_path / oracle))
        assert not equal(weights(document["adapter"]), weights(tmp_path / ("whole" if step == 6 else "short")))
        card = (tmp_path / f"export-{step}" / "adapter" / "README.md").read_text()
        assert f"- Training: {step} steps of 8 samples" in card
        for given in (document["run_folder"], document["adapter"]):
            _, alpha = load_trained("toy", given)
            assert alpha == load_trained("toy", tmp_path / oracle)[1]
    (measured,) = (r for r in map(json.loads, (tmp_path / "whole/metrics.jsonl").read_text().splitlines())
                   if r.get("measurement") and r["step"] == 20)  # fmt: skip
    assert f"{measured['measurement']['kl']:.3g}"[:4] in card


def test_the_command_and_what_it_refuses(tmp_path, fake, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(fake_config(checkpoint_every=2), tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    code, out, _ = command(capsys, "export", "--checkpoint", newest, "--out", "made", "--json")
    assert code == 0
    assert json.loads(out) == {
        "run_folder": "made", "adapter": "made/adapter", "checkpoint": str(newest), "step": 6,
    }  # fmt: skip
    assert equal(weights(tmp_path / "made"), weights(tmp_path / "run"))
    with pytest.raises(InputError, match=r"hnkit export --checkpoint .*step-00000006 makes an adapter of it"):
        load_trained("fake", newest)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    whole = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    lines = {
        (): "no checkpoint given: use --checkpoint RUN/checkpoints/step-N",
        ("--checkpoint", newest): "is not a whole checkpoint (the SHA-256 of tensors.safetensors does not match",
        ("--checkpoint", tmp_path / "run"): "name the one to export, such as",
        ("--checkpoint", tmp_path / "made"): "is a run of 'export', not of 'train'",
        ("--checkpoint", tmp_path): "no run is there (.hnkit-run is missing)",
        ("--checkpoint", newest, "--set", "train.steps=1"): "only backend.KEY=VALUE applies here",
        ("--checkpoint", newest, "--out", "made"): "--out made exists already",
    }
    for arguments, line in lines.items():
        code, _, err = command(capsys, "export", *arguments)
        assert code == 2
        assert line in err
    (newest / "tensors.safetensors").write_bytes(before[newest / "tensors.safetensors"])
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before, "the run is only read"
    assert not (tmp_path / "runs").exists()


def test_a_run_starts_from_an_adapter_and_resumes_to_the_bit(tmp_path, monkeypatch):
    run(constant("steps=6"), tmp_path / "first")
    start = f"from_adapter={tmp_path / 'first'}"
    frozen = run(constant("steps=1", "lr=1e-30", start), tmp_path / "frozen")
    assert frozen.finished
    assert equal(weights(tmp_path / "frozen"), weights(tmp_path / "first"))
    assert "- Started from: the adapter" in (tmp_path / "frozen/adapter/README.md").read_text()
    settings = constant(start)
    run(settings, tmp_path / "whole")
    saved = resolve_config(config_file=tmp_path / "whole" / "config.toml")
    assert saved.train.from_adapter == str(tmp_path / "first")
    run(constant("steps=12", start), tmp_path / "parts")
    assert resume(settings, tmp_path / "parts").finished
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_the_starting_adapter_may_be_moved_but_not_exchanged(tmp_path):
    run(constant("steps=6"), tmp_path / "first")
    run(constant("steps=7"), tmp_path / "other")
    settings = constant("steps=8", f"from_adapter={tmp_path / 'first'}")
    run(constant("steps=4", f"from_adapter={tmp_path / 'first'}"), tmp_path / "run")
    config = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(InputError, match="is not the adapter that the run started from"):
        resume(constant("steps=8", f"from_adapter={tmp_path / 'other'}"), tmp_path / "run")
    (tmp_path / "first" / "adapter" / "README.md").write_text("what it says of itself")
    (tmp_path / "first").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="say with --from-adapter where it is"):
        resume(settings, tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").read_bytes() == config, "what is refused changes nothing"
    moved = resolve_config(
        resume=tmp_path / "run", overrides=["train.steps=8", f"train.from_adapter={tmp_path / 'moved'}"]
    )
    assert resume(moved, tmp_path / "run").finished
    assert resolve_config(resume=tmp_path / "run").train.from_adapter == str(tmp_path / "moved")


def test_moved_prompts_are_the_same_prompts(tmp_path, fake):
    for name in ("here", "there"):
        (tmp_path / f"{name}.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "others.txt").write_text("a\nb\nc\ne\n")
    settings = {name: fake_config(prompts=str(tmp_path / f"{name}.txt")) for name in ("here", "there", "others")}
    run(settings["here"], tmp_path / "whole")
    run(fake_config(prompts=str(tmp_path / "here.txt"), steps=3), tmp_path / "run")
    longer = fake_config(prompts=str(tmp_path / "others.txt"))
    with pytest.raises(InputError, match="the prompts have changed"):
        resume(longer, tmp_path / "run")
    assert resume(settings["there"], tmp_path / "run").finished
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert "there.txt" in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.parametrize(
    ("given", "line"),
    [("absent", "is not a folder: name the folder of a trained adapter"), ("empty", "adapter.json")],
)
def test_what_cannot_be_started_from(tmp_path, given, line):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=line):
        constant(f"from_adapter={tmp_path / given}")


def test_an_adapters_own_options_are_the_defaults(tmp_path):
    wide = resolve_config(backend="toy", preset="item-e", overrides=[
        "backend.hypernetwork=mlp", "backend.width=9", "train.steps=1", "train.batch=2", "train.measure_samples=2",
        "train.validate_samples=2"])  # fmt: skip
    run(wide, tmp_path / "wide")
    start = f"train.from_adapter={tmp_path / 'wide'}"
    assert resolve_config(backend="toy", preset="item-e", overrides=[start]).options == wide.options
    narrow = resolve_config(backend="toy", preset="item-e", overrides=[start, "backend.width=3", "train.steps=1"])
    assert narrow.options.width == 3
    with pytest.raises(InputError, match="has width = 9, this backend width = 3"):
        run(narrow, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    file = tmp_path / "here.toml"
    file.write_text('[train]\nfrom_adapter = "wide"\n[backend]\nseed = 5\n')
    assert resolve_config(backend="toy", config_file=file).options.width == 9
    assert resolve_config(backend="toy", config_file=file).options.seed == 5
