"""What takes a folder or a file takes it as text and as a path."""

from __future__ import annotations

import inspect
import typing
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hnkit.backend import backend_factory
from hnkit.config import GenerateSettings
from hnkit.errors import InputError
from hnkit.generate import GeneratePlan
from hnkit.scaled.compare.baselines import TextGenerationProposer
from hnkit.scaled.compare.diversity import DinoSimilarity, Lpips
from hnkit.scaled.digits.checkpoint import JUDGE_FILE, model_folder, verified_folder
from hnkit.scaled.digits.judge import Judge
from hnkit.scaled.digits.rewards import legibility, scorer
from hnkit.scaled.rewards import blip, clip
from tests.interop import published
from tests.scaled import tiny

KINDS = (str, Path)
PUBLIC = (
    "hnkit", "hnkit.adapters", "hnkit.backend", "hnkit.config", "hnkit.frontier", "hnkit.generate", "hnkit.prompts",
    "hnkit.training.export", "hnkit.training.run", "hnkit.toy.backend", "hnkit.scaled.attach",
    "hnkit.scaled.compare.baselines", "hnkit.scaled.compare.diversity", "hnkit.scaled.digits.checkpoint",
    "hnkit.scaled.digits.judge", "hnkit.scaled.digits.rewards", "hnkit.scaled.lora.adapter",
    "hnkit.scaled.pipelines.backend", "hnkit.scaled.pipelines.factory", "hnkit.scaled.pipelines.loading",
    "hnkit.scaled.rewards.blip", "hnkit.scaled.rewards.clip", "hnkit.scaled.rewards.weights",
)  # fmt: skip


def callables(module):
    """Public functions, classes and methods of a module, by name."""
    for name, value in vars(import_module(module)).items():
        made_here = getattr(value, "__module__", "") == module or module == "hnkit"
        if name.startswith("_") or not made_here:
            continue
        if inspect.isclass(value) and name != "TrainResult":  # which is only returned
            for part, method in inspect.getmembers(value, callable):
                if part == "__init__" or not part.startswith("_"):
                    yield f"{module}.{name}.{part}", method
        elif inspect.isfunction(value):
            yield f"{module}.{name}", value


@pytest.mark.parametrize("module", PUBLIC)
def test_whatever_takes_a_path_takes_text(module):
    for name, function in callables(module):
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError):
            hints = getattr(function, "__annotations__", {})
        for parameter, kind in hints.items():
            if parameter != "return" and kind in (Path, Path | None, "Path", "Path | None"):
                pytest.fail(f"{name} takes {parameter} as a Path alone")


@pytest.mark.parametrize("kind", KINDS)
def test_models_rewards_and_metrics(kind, tmp_path):
    torch.manual_seed(0)
    images, prompts = torch.rand(2, 3, 40, 40), ["a red cat", "two dogs"]
    clips = published.write_clip(tmp_path / "clip")
    for name in ("hps", "imagereward"):
        (tmp_path / name).mkdir()
    published.write_hpsv2(tmp_path / "hps")
    published.write_imagereward(tmp_path / "imagereward")
    bert = published.write_bert_tokenizer(tmp_path / "bert")
    save_file({"weight": torch.ones(1, published.EMBED), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    made = [
        clip.clipscore(model_id=kind(clips)),
        clip.pickscore(model_id=kind(clips)),
        clip.hpsv2(model_id=kind(tmp_path / "hps"), tokenizer_id=kind(clips)),
        blip.imagereward(model_id=kind(tmp_path / "imagereward"), tokenizer_id=kind(bert)),
        clip.aesthetic(model_id=kind(clips), head=kind(tmp_path / "head.safetensors")),
    ]
    for reward in made:
        assert reward(images, prompts).shape == (2,)
    absent = kind(tmp_path / "absent")
    for build in (
        lambda: clip.clipscore(model_id=absent), lambda: clip.pickscore(model_id=absent),
        lambda: clip.hpsv2(model_id=absent), lambda: blip.imagereward(model_id=absent),
        lambda: clip.aesthetic(model_id=clips, head=absent), lambda: DinoSimilarity(absent), lambda: Lpips(absent),
        lambda: TextGenerationProposer(absent),
    ):  # fmt: skip
        with pytest.raises(InputError, match="absent"):
            build()


@pytest.mark.parametrize("kind", KINDS)
def test_the_miniatures_parts(kind):
    folder = model_folder()
    assert verified_folder(kind(folder)) == folder
    images = torch.rand(2, 3, 32, 32)
    assert legibility(kind(folder))(images, ["a three", "a two"]).shape == (2,)
    assert scorer(kind(folder))(images, ["a three", "a two"]).shape == (2,)
    assert Judge.load(kind(folder / JUDGE_FILE)).read(images)[1].shape == (2,)


@pytest.mark.parametrize("kind", KINDS)
def test_backends_and_their_adapters(kind, checkpoint, tmp_path):
    factory = backend_factory("sana")
    model = kind(checkpoint("sana"))
    options = tiny.options("sana", checkpoint("sana"), model_id=model, cache_dir=kind(tmp_path / "c"))
    backend = factory.load(factory.options(**options))
    backend.encode(["a fox"])
    backend.save_adapter(kind(tmp_path / "a"))
    backend.load_adapter(kind(tmp_path / "a"))
    assert factory.recorded(kind(tmp_path / "a"))["model_id"] == str(checkpoint("sana"))
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")
    toy = backend_factory("toy")
    toy.load(toy.options()).save_adapter(kind(tmp_path / "toy"))
    assert toy.recorded(kind(tmp_path / "toy"))["problem"] == toy.options().problem
    plan = GeneratePlan("sana", GenerateSettings(), ("a fox",), {})
    (tmp_path / "plan").mkdir()
    plan.write(kind(tmp_path / "plan"))
    assert GeneratePlan.read(kind(tmp_path / "plan")) == plan
