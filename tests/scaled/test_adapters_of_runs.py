"""Adapters of the real pipelines from run to run: exported, started from, and on a model that has moved."""

from __future__ import annotations

import io
import json
import shutil

import diffusers
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hnkit.adapters import adapter_folder, load_trained
from hnkit.backend import backend_factory
from hnkit.config import resolve_config
from hnkit.errors import InputError
from hnkit.scaled.attach import attach
from hnkit.scaled.lora.adapter import CONFIG, _config_checksum
from hnkit.training.export import export_adapter
from hnkit.training.run import train
from tests.hnkit.cli.test_app import run as command
from tests.scaled import tiny
from tests.scaled.conftest import perturb


def config(name, model, tmp_path, *more, resume=None, **settings):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a tree\na boat\na lamp\n")
    options = tiny.options(name, model)
    values = {
        "prompts": prompts, "steps": 3, "batch": 2, "accumulate": 1, "optimizer": "adamw", "lr": 0.01, "warmup": 0,
        "momentum": 0.0, "alpha": 0.001, "reduction": "sum", "checkpoint_every": 1, "measure_samples": 2,
        "validate_samples": 1,
    } | settings  # fmt: skip
    flags = [f"backend.{key}={tiny.text(value)}" for key, value in options.items() if key not in ("rank", "lora_alpha")]
    flags += [f"backend.rank={options['rank']}", f"backend.lora_alpha={options['lora_alpha']}"] * ("rank" not in more)
    flags += [f"train.{key}={value}" for key, value in values.items()]
    return resolve_config(backend=name, overrides=flags, rewards=["redness=1.0"], resume=resume)


def quietly(settings, **folders):
    return train(settings, console=Console(file=io.StringIO()), **folders)


def weights(folder):
    (file,) = adapter_folder(folder).glob("*.safetensors")
    return load_file(file)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_an_exported_checkpoint_is_an_adapter_like_any_other(checkpoint, tmp_path, capsys):
    model = checkpoint("sana")
    quietly(config("sana", model, tmp_path), out=tmp_path / "run")
    quietly(config("sana", model, tmp_path, steps=2), out=tmp_path / "two")
    made = export_adapter(tmp_path / "run" / "checkpoints" / "step-00000002", out=tmp_path / "made")
    assert equal(weights(made["adapter"]), weights(tmp_path / "two"))
    shutil.copytree(made["adapter"], tmp_path / "alone")  # the folder by itself, as it is passed on
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "output_type": "pt", "use_resolution_binning": False, "num_inference_steps": 1,
            "intermediate_timesteps": None}  # fmt: skip
    images = {
        name: attach(pipe, tmp_path / name)("a fox", generator=torch.Generator().manual_seed(0), **call).images
        for name in ("made", "alone", "two")
    }
    assert torch.equal(images["made"], images["two"])
    assert torch.equal(images["alone"], images["two"])
    small = ["backend.device=cpu", "backend.dtype=float32", "backend.cache_dir=", "backend.size=32"]
    pictures = []
    for name in ("alone", "two"):
        arguments = ["generate", "--backend", "sana", "--adapter", tmp_path / name, "--prompt", "a fox", "-n", 1]
        sets = [word for text in small for word in ("--set", text)]
        assert command(capsys, *arguments, *sets, "--out", tmp_path / f"images-{name}")[0] == 0
        pictures.append({p.name: p.read_bytes() for p in (tmp_path / f"images-{name}").rglob("*.png")})
    assert pictures[0] == pictures[1]
    with pytest.raises(InputError, match="is a checkpoint of a run: hnkit export"):
        attach(pipe, tmp_path / "run" / "checkpoints" / "step-00000002")


def test_a_run_starts_from_a_published_adapter_depthwise_layers_and_all(checkpoint, make_backend, tmp_path):
    """Without our block, with dense LoRA beside the depthwise convolutions: all of it is trained on, and resumed."""
    model, backend = checkpoint("sana"), make_backend("sana", rank=2, lora_alpha=6.0)
    names = [n for n, m in backend._base.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in names:
        layer = backend._base.get_submodule(name)
        out, *ins = layer.weight.shape
        a = (2, layer.in_channels, *ins[1:]) if len(ins) > 1 else (2, *ins)
        b = (out, 2, 1, 1) if len(ins) > 1 else (out, 2)
        for side, shape in (("A", a), ("B", b)):
            state[f"{name}.lora_{side}.weight"] = (0.1 * torch.randn(shape, generator=generator)).bfloat16()
    published = tmp_path / "published"
    published.mkdir()
    torch.save(state, published / "adapter_model.bin")
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": None, "target_modules": names}
    (published / "adapter_config.json").write_text(json.dumps(document))

    settings = {steps: config("sana", model, tmp_path, "rank", steps=steps, from_adapter=published) for steps in (1, 3)}
    assert (settings[3].options.rank, settings[3].options.lora_alpha) == (2, 6.0), "what it fixes need not be repeated"
    assert settings[3].options.instruction is False
    quietly(settings[3], out=tmp_path / "whole")
    quietly(settings[1], out=tmp_path / "parts")
    resumed = config("sana", model, tmp_path, "rank", resume=tmp_path / "parts", from_adapter=published)
    assert quietly(resumed, resume=tmp_path / "parts").finished
    whole = weights(tmp_path / "whole")
    assert equal(whole, weights(tmp_path / "parts"))
    assert {key.removeprefix("base_model.model.") for key in whole} == set(state)
    moved = {key: float((value - state[key.removeprefix("base_model.model.")].float()).abs().max())
             for key, value in whole.items()}  # fmt: skip
    assert min(moved.values()) > 1e-4, "every layer is trained"
    assert max(moved.values()) < 0.05, "three steps of a small rate from where the adapter was"
    again = export_adapter(tmp_path / "parts", out=tmp_path / "made")
    assert equal(weights(again["adapter"]), whole)
    with pytest.raises(InputError, match=r"rank 2 and alpha 6, this backend 4 and 8: set backend.rank = 2"):
        quietly(config("sana", model, tmp_path, from_adapter=published), out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_guidance_and_conditioning_of_the_adapter_go_with_it(checkpoint, make_backend, tmp_path):
    backend = make_backend("sana", guidance=2.5, instruction=True)
    perturb(backend)
    backend.save_adapter(tmp_path / "first")
    flags = [f"backend.{key}={tiny.text(value)}" for key, value in tiny.options("sana", checkpoint("sana")).items()]
    start = f"train.from_adapter={tmp_path / 'first'}"
    settings = resolve_config(backend="sana", overrides=[*flags, start]).options
    assert (settings.guidance, settings.instruction) == (2.5, True), "though the preset says 4.5 and no instruction"
    other = make_backend("sana", guidance=1.0)
    other.load_adapter(tmp_path / "first")
    other.save_adapter(tmp_path / "second")
    block = json.loads((tmp_path / "second" / "adapter_config.json").read_text())["hnkit"]
    assert block["guidance"] == 2.5, "what f is given, not what the generator is"


@pytest.mark.parametrize("guidance", [3, 1.5])
def test_f_and_generator_take_the_guidance_that_is_recorded_however_it_is_written(
    guidance, checkpoint, make_backend, tmp_path
):
    backend = make_backend("sana", guidance=guidance)
    backend.save_adapter(tmp_path / "first")
    assert json.loads((tmp_path / "first" / CONFIG).read_text())["hnkit"]["guidance"] == guidance
    kept = {key: value for key, value in tiny.options("sana", checkpoint("sana")).items() if "rank" not in key}
    flags = [f"backend.{key}={tiny.text(value)}" for key, value in kept.items() if key != "lora_alpha"]
    loaded, _ = load_trained("sana", tmp_path / "first", flags)
    assert loaded.options.guidance == loaded.hypernetwork.guidance == guidance


def test_what_is_recorded_and_cannot_be_read_is_refused_never_left_to_a_default(checkpoint, make_backend, tmp_path):
    make_backend("sana").save_adapter(tmp_path / "first")
    document = json.loads((tmp_path / "first" / CONFIG).read_text())
    for number, (name, spoilt) in enumerate({
        "guidance": {"guidance": "3"},
        "guidance is": {"guidance": True},
        "size": {"conditioning": {"size": "32"}},
        "instruction": {"conditioning": {"instruction": 1}},
        "conditioning": {"conditioning": [1]},
    }.items()):  # fmt: skip
        block = document["hnkit"] | spoilt
        block |= {"config_sha256": _config_checksum(document | {"hnkit": block})}
        folder = shutil.copytree(tmp_path / "first", tmp_path / str(number))
        (folder / CONFIG).write_text(json.dumps(document | {"hnkit": block}))
        with pytest.raises(InputError, match=name.removesuffix(" is")):
            backend_factory("sana").adapter_options(folder)


def test_images_go_on_with_a_model_that_has_moved(checkpoint, tmp_path, capsys):
    model = shutil.copytree(checkpoint("sana"), tmp_path / "model")
    sets = [
        word
        for key, value in tiny.options("sana", model).items()
        for word in ("--set", f"backend.{key}={tiny.text(value)}")
    ]
    code, _, err = command(
        capsys, "generate", "--backend", "sana", "--prompt", "a fox", "--prompt", "a boat", "-n", 1, *sets,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    picture = tmp_path / "run" / "prompt-001" / "base-00.png"
    before = picture.read_bytes()
    (tmp_path / "run" / "prompt-001" / "prompt.txt").unlink()
    picture.unlink()
    moved = model.rename(tmp_path / "elsewhere")
    resume = ["generate", "--resume", tmp_path / "run"]
    for flags, message in (
        ([], "there is no folder"),
        (["--model-id", checkpoint("sana", 1)], "base model has changed since"),
        (["--model-id", moved, "--set", "backend.size=64"], "keeps its settings"),
    ):
        code, _, err = command(capsys, *resume, *flags)
        assert (code, message in err) == (2, True), err
    code, _, err = command(capsys, *resume, "--model-id", moved)
    assert code == 0, err
    assert picture.read_bytes() == before


def test_a_model_that_has_moved_is_resumed_and_another_one_is_not(checkpoint, tmp_path, capsys):
    old = tmp_path / "disk" / "tiny-sana"
    shutil.copytree(checkpoint("sana"), old)
    quietly(config("sana", old, tmp_path), out=tmp_path / "whole")
    quietly(config("sana", old, tmp_path, steps=1), out=tmp_path / "run")
    new = tmp_path / "nas" / "tiny-sana"
    new.parent.mkdir()
    old.rename(new)
    shutil.copytree(checkpoint("sana", 1), tmp_path / "nas" / "tiny-sana-2")
    flags = ["train", "--backend", "sana", "--resume", tmp_path / "run", "--steps", 3]
    kept = (tmp_path / "run" / "config.toml").read_bytes()
    code, _, err = command(capsys, *flags)
    assert code == 2
    assert "there is no folder" in err
    code, _, err = command(capsys, *flags, "--model-id", tmp_path / "nas" / "tiny-sana-2")
    assert code == 2
    assert "the base model" in err
    assert "not the one of the checkpoint" in err or "that of the checkpoint" in err
    assert (tmp_path / "run" / "config.toml").read_bytes() == kept
    code, _, err = command(capsys, *flags, "--model-id", new)
    assert code == 0, err
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert resolve_config(resume=tmp_path / "run").options.model_id == str(new)
