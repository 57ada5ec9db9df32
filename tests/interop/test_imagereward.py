"""ImageReward (THUDM/ImageReward at c1392c6), PickScore (yuvalkirstain/PickScore at f79607f), presets with both.

What ImageReward does, in our words: the published file is the state dict of the whole module
(`ImageReward/ImageReward.py` 71-78), which a loader reads as it is (`utils.py` 72-79, not strictly). Its BLIP keeps two
linear layers to 256 for contrastive training (`models/BLIP/blip_pretrain.py` 41-42) whose four tensors are in the file
and unused in the score: the CLS state of the text encoder, attending to the patches of a 224-pixel image, goes through
an MLP and is standardised (84-100). Prompts are padded or cut to 35 tokens (110).

What PickScore does (README, "Inference with PickScore"): transformers' own CLIP from `yuvalkirstain/PickScore_v1`, the
tokenizer of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, and exp(logit_scale) times the cosine.

The default preset of the three real backends trains on these two, HPSv2 and CLIPScore (HyperNoise, ExplainableML at
bbe3ab4, `rewards/utils.py` 16-70), each found by its published name: here in a hub cache of tiny models.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hnkit.config import resolve_config
from hnkit.scaled.rewards import blip, clip
from hnkit.training.run import train
from tests.interop.published import write_bert_tokenizer, write_clip, write_hpsv2, write_imagereward
from tests.scaled import tiny

REVISION = "0" * 40


def snapshot(home: Path, name: str) -> Path:
    """The folder of a repository in the hub cache under `home`, as huggingface_hub lays it out."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A hub cache with tiny reward models under their published names and in their published layouts."""
    home = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    write_hpsv2(snapshot(home, clip.HPS))
    write_imagereward(snapshot(home, blip.REPOSITORY))
    write_bert_tokenizer(snapshot(home, "bert-base-uncased"))
    laion = write_clip(snapshot(home, clip.LAION_H14))
    pickscore = snapshot(home, clip.PICKSCORE)  # published with weights; its tokenizer is LAION's
    for name in ("config.json", "model.safetensors"):
        shutil.copy(laion / name, pickscore)
    return home


@pytest.mark.parametrize(
    "name", ["sana", pytest.param("sd-turbo", marks=pytest.mark.slow), pytest.param("flux", marks=pytest.mark.slow)]
)
def test_the_default_preset_starts_with_the_published_files(name, hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\na cat and two dogs\n")
    options = tiny.options(name, checkpoint(name))
    settings = {"steps": 2, "batch": 2, "accumulate": 1, "measure_samples": 2, "validate_samples": 2}
    flags = [f"backend.{key}={tiny.text(value)}" for key, value in options.items()]
    flags += [f"train.{key}={value}" for key, value in ({"prompts": tmp_path / "prompts.txt"} | settings).items()]
    config = resolve_config(backend=name, overrides=flags)
    named = {"hpsv2": 5.0, "imagereward": 1.0, "pickscore": 0.05, "clipscore": 0.01}
    assert {reward: spec.weight for reward, spec in config.rewards.items()} == named
    result = train(config, out=tmp_path / "run", console=Console(file=io.StringIO()))
    assert result.finished
    assert named.keys() <= result.report["validation"]["scores"].keys()
    assert result.report["measurement"]["kl"] is not None
    (weights,) = (tmp_path / "run" / "adapter").glob("*.safetensors")
    assert any(float(value.abs().max()) > 0 for key, value in load_file(weights).items() if "lora_B" in key)
