"""The hypernetwork that comes with the miniature: found by name, intact, and as good as its card says."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from diffusers import SanaSprintPipeline

from hnkit import InputError, noise_kl
from hnkit.adapters import BUNDLED, load_trained, named_adapter
from hnkit.cli.app import app
from hnkit.internal.stats import mean_and_stderr
from hnkit.scaled.attach import attach
from hnkit.scaled.digits import checkpoint
from hnkit.scaled.digits.scenes import eval_prompts
from hnkit.scaled.digits.train import adapter as stage

Z = 4.0
"""Two-sided false-alarm rate of 6e-5 for each of the looks below; the seed is fixed."""


@pytest.fixture(scope="module")
def steered():
    backend, alpha = load_trained("digits", BUNDLED)
    return backend, alpha


def figures():
    return stage.read_figures(checkpoint.model_folder())


def test_the_name_means_the_folder_of_the_model_and_a_path_means_itself(tmp_path, monkeypatch):
    assert named_adapter("digits", BUNDLED) == checkpoint.model_folder() / checkpoint.ADAPTER_FOLDER
    monkeypatch.chdir(tmp_path)
    (tmp_path / BUNDLED).mkdir()
    assert str(named_adapter("digits", f"./{BUNDLED}/x").parent) == BUNDLED
    assert named_adapter("digits", tmp_path) == tmp_path
    assert named_adapter("digits", None) is None


@pytest.mark.parametrize("backend", ["toy", "sana"])
def test_a_backend_without_one_says_so(backend):
    with pytest.raises(InputError, match=f"{backend} comes without an adapter: train one"):
        named_adapter(backend, BUNDLED)


def test_it_loads_with_the_temperature_and_options_of_its_training(steered):
    backend, alpha = steered
    assert alpha == 0.3
    assert backend.options.rank == 16
    x = torch.randn(3, *backend.noise_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        delta = backend.map_for(["a three", "two fours", "a red one and a blue two"])(x)
    assert float(delta.flatten(1).norm(dim=1).min()) > 0.05


def test_it_names_no_path_of_the_machine_it_was_made_on():
    folder = checkpoint.model_folder() / checkpoint.ADAPTER_FOLDER
    for name in ("adapter_config.json", "config.toml", "README.md", stage.FIGURES_FILE):
        text = (folder / name).read_text(encoding="utf-8")
        assert not any(root in text for root in ("/work", "/home", "/tmp", "/root"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "hnkit-digits"


def test_a_damaged_one_is_refused(tmp_path, monkeypatch):
    damaged = tmp_path / "model"
    shutil.copytree(checkpoint.model_folder(), damaged)
    with (damaged / checkpoint.ADAPTER_FOLDER / "config.toml").open("a") as file:
        file.write("\n# more\n")
    monkeypatch.setattr(checkpoint, "model_folder", lambda: damaged)
    with pytest.raises(InputError, match="does not match its checksum"):
        named_adapter("digits", BUNDLED)


def test_its_figures_hold_on_other_noises(steered):
    """Reward, legibility, L2 term and KL integrand on noises that the card's figures are not from."""
    backend, _ = steered
    claimed, texts = figures(), list(eval_prompts())
    found = stage.held_out_figures(backend, texts[::4], images=2, kl_images=1, base_images=24, seed=1)
    for name in ("reward_gain", "legibility_gain", "judge_gain"):
        (value, error), (said, uncertain) = found[name], claimed[name]
        assert abs(value - said) < Z * math.hypot(error, uncertain), name
    # the KL integrand is skewed: means of 20 samples are compared on the scale of the logarithm
    spread = math.hypot(found["kl"][1] / found["kl"][0], claimed["kl"][1] / claimed["kl"][0])
    assert abs(math.log(found["kl"][0] / claimed["kl"][0])) < Z * spread
    assert claimed["reward_gain"][0] > 2.33 * claimed["reward_gain"][1]  # above nothing, one-sided at 1 %


def test_figures_are_paired_gains_and_the_exact_integrand(steered):
    """Against the same written out for two sentences, image by image."""
    backend, _ = steered
    texts = ["a three", "two fours"]
    found = stage.held_out_figures(backend, texts, images=2, kl_images=1, base_images=64)
    gains, rows = [], []
    for index, text in enumerate(texts):
        noise = torch.randn(64, *backend.noise_shape, generator=stage.generator_for(0, "adapter figures", index))
        one = []
        for x in noise[:2]:
            condition = backend.encode([text])
            with torch.no_grad():
                moved = x[None] + backend.hypernetwork(x[None], condition)
                images = [backend.generate(z, condition) for z in (x[None], moved)]
                before, after = (float(backend.default_reward(image, [text])) for image in images)
            one.append(after - before)
        gains.append(sum(one) / 2)
        rows.append(noise[:1])
    assert found["reward_gain"] == pytest.approx(mean_and_stderr(torch.tensor(gains)), rel=1e-3)
    kl = noise_kl(backend.map_for(texts), torch.cat(rows), method="exact")
    assert found["kl"] == pytest.approx((kl.value, kl.stderr), rel=1e-6)
    assert found["efficiency"] == pytest.approx([value / found["frontier"] for value in found["reward_gain"]])


def test_the_card_says_the_figures():
    folder = checkpoint.model_folder() / checkpoint.ADAPTER_FOLDER
    text, said = (folder / stage.CARD_FILE).read_text(encoding="utf-8"), figures()
    head, _, rest = text.partition("## Held-out figures\n")
    assert rest
    assert text == stage.card(said, head + "## Use\n" + rest.partition("## Use\n")[2])


def test_it_steers_the_plain_pipeline():
    folder = checkpoint.model_folder()
    pipe = SanaSprintPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 32, "width": 32, "num_inference_steps": 1, "intermediate_timesteps": None,
                 "use_resolution_binning": False, "complex_human_instruction": None, "max_sequence_length": 8,
                 "output_type": "pt"}  # fmt: skip
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    base = pipe("two fours", latents=noise, **arguments).images
    pipe = attach(pipe, folder / checkpoint.ADAPTER_FOLDER)
    assert float((pipe("two fours", latents=noise, **arguments).images - base).abs().max()) > 1e-3


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        app(list(arguments))
    return int(stop.value.code or 0)


def stop_with(seen: dict[str, object], given: object) -> None:
    """What a command was about to look at, without the minutes that it takes."""
    seen["given"] = given
    raise InputError("far enough")


def test_commands_take_it_by_name(tmp_path, capsys, monkeypatch):
    digits = ("--backend", "digits", "--adapter", BUNDLED)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a three\ntwo fours\n")
    out = tmp_path / "images"
    assert command("generate", *digits, "--prompt", "two fours", "-n", "1", "--out", str(out)) == 0
    assert len(list(out.rglob("*.png"))) >= 2
    # a path of this machine would make no image elsewhere
    assert f"--adapter {BUNDLED}" in (out / "report.html").read_text(encoding="utf-8")
    frontier = ("frontier", *digits, "--prompts", str(prompts), "--base-samples", "8", "--samples", "2")
    assert command(*frontier, "--method", "second-order", "--out", str(tmp_path / "frontier")) == 0
    seen: dict[str, object] = {}
    monkeypatch.setattr(
        "hnkit.checks.verify_backend.verify_backend", lambda backend, *_, **__: stop_with(seen, backend)
    )
    assert command("verify-bound", *digits, "--prompts", str(prompts), "--samples", "2") == 2
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float(seen["given"].map_for(["a three"])(x).norm()) > 0.05
    monkeypatch.setattr(
        "hnkit.cli.compare.comparison_runner", lambda _: lambda *_, adapter, **__: stop_with(seen, adapter)
    )
    assert command("compare", *digits, "--prompts", str(prompts)) == 2
    assert seen["given"] == checkpoint.model_folder() / checkpoint.ADAPTER_FOLDER
    assert command("generate", "--backend", "sana", "--adapter", BUNDLED) == 2
    assert "comes without an adapter" in capsys.readouterr().err
