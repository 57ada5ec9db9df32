"""Reward loaders against independent forwards written on the published key layouts."""

from __future__ import annotations

import inspect
import re
import textwrap
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast, CLIPConfig, CLIPModel, CLIPTokenizerFast

from hnkit import InputError
from hnkit.backend import Reward, load_installed
from hnkit.config import RewardSpec
from hnkit.rewards import CallableReward, load_rewards, score
from hnkit.scaled.rewards import Redness, blip, clip
from hnkit.scaled.rewards.preprocess import CLIP_MEAN, CLIP_STD, Tokens, preprocess
from hnkit.scaled.rewards.weights import architecture, read_state_dict
from tests.interop import published
from tests.interop.published import (
    CONTEXT,
    EMBED,
    IMAGE,
    VOCAB,
    OpenClip,
    clip_config,
    write_bert_tokenizer,
    write_clip,
    write_clip_tokenizer,
    write_hpsv2,
    write_imagereward,
)

PROMPTS = ["a red cat", "two dogs and a cat on a red mat in a red house far away"]


@pytest.fixture
def clip_tokenizer_folder(tmp_path):
    return write_clip_tokenizer(tmp_path / "tokenizer")


def test_hpsv2_loads_the_published_layout(tmp_path, clip_tokenizer_folder):
    torch.manual_seed(0)
    original = write_hpsv2(tmp_path)
    reward = clip.hpsv2(weight=5.0, model_id=str(tmp_path), tokenizer_id=str(clip_tokenizer_folder))
    images = torch.rand(2, 3, IMAGE, IMAGE)
    ids = CLIPTokenizerFast.from_pretrained(clip_tokenizer_folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )["input_ids"]
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = original.cosine((images - mean) / std, ids)
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=2e-6, rtol=0)
    assert reward.weight == 5.0
    assert isinstance(reward, Reward)


def test_clipscore_and_pickscore_are_scaled_cosines(tmp_path):
    torch.manual_seed(1)
    model = CLIPModel(clip_config())
    folder = write_clip_tokenizer(tmp_path / "clip")
    model.save_pretrained(folder)
    images = torch.rand(2, 3, 40, 56, requires_grad=True)
    score = clip.clipscore(weight=0.01, model_id=str(folder))(images, PROMPTS)
    assert score.shape == (2,)
    assert torch.equal(score, clip.pickscore(model_id=str(folder))(images, PROMPTS))
    assert float(score.detach().abs().max()) <= float(model.logit_scale.detach().exp()) * (1 + 1e-6)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert float(gradient.abs().max()) > 0
    # a bfloat16 region around it does not round the score
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip.clipscore(model_id=str(folder))(images, PROMPTS), score)


def test_reward_gradient_through_preprocessing_is_that_of_the_score(tmp_path):
    torch.manual_seed(2)
    folder = write_clip(tmp_path / "clip")
    reward = clip.clipscore(model_id=str(folder))
    images = torch.rand(1, 3, 40, 30, requires_grad=True)
    direction = torch.randn_like(images)
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:1]).sum(), images)
    step = 1e-2
    with torch.no_grad():
        up = reward(images + step * direction, PROMPTS[:1])
        down = reward(images - step * direction, PROMPTS[:1])
    difference = float((up - down) / (2 * step))
    assert difference == pytest.approx(float((gradient * direction).sum()), rel=0.02)


@pytest.mark.parametrize("size", [(28, 28), (56, 56), (40, 64), (64, 40), (20, 20), (28, 31), (33, 28), (29, 28)])
def test_preprocess_is_resize_crop_normalise(size):
    from PIL import Image

    torch.manual_seed(3)
    levels = torch.randint(80, 176, (3, *size))  # no overshoot to clip
    result = preprocess(levels[None] / 255, IMAGE)
    assert result.shape == (1, 3, IMAGE, IMAGE)
    height, width = size
    short = min(size)
    picture = Image.fromarray(levels.permute(1, 2, 0).byte().numpy())
    picture = picture.resize((IMAGE * width // short, IMAGE * height // short), Image.Resampling.BICUBIC)
    left, top = (round((side - IMAGE) / 2.0) for side in picture.size)  # torchvision 0.24, functional.center_crop
    picture = picture.crop((left, top, left + IMAGE, top + IMAGE))
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    # Pillow rounds to bytes after each of its two passes
    torch.testing.assert_close(((result[0] * std) + mean), expected, atol=2.5 / 255, rtol=0)


@pytest.fixture
def imagereward_folder(tmp_path):
    """A folder with ImageReward's file, a function that loads it, and the model that wrote it."""
    torch.manual_seed(4)
    original = write_imagereward(tmp_path)
    bert = write_bert_tokenizer(tmp_path / "bert")
    return tmp_path, lambda: blip.imagereward(model_id=str(tmp_path), tokenizer_id=str(bert)), original


def test_imagereward_loads_the_published_layout(imagereward_folder):
    folder, load, original = imagereward_folder
    tokens = BertTokenizerFast.from_pretrained(folder / "bert")(
        PROMPTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = original((images - mean) / std, tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(load()(images, PROMPTS), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("blip.vision_proj.weight", True),
        ("blip.text_proj.bias", True),
        ("module.blip.text_encoder.embeddings.position_ids", True),
        ("vision_proj.weight", False),
        ("blip.itm_head.weight", False),
        ("blip.visual_encoder_m.cls_token", False),
        ("mlp.position_ids", False),
        ("mlp.layers.8.weight", False),
    ],
)
def test_imagereward_skips_the_tensors_it_does_not_use_and_no_others(key, known):
    if known:
        assert blip.convert_imagereward({key: torch.zeros(1)}) == {}
    else:
        with pytest.raises(InputError, match="not a name of ImageReward's"):
            blip.convert_imagereward({key: torch.zeros(1)})


@pytest.mark.parametrize("content", ['{"model_type": "blip"', '{"model_type": "blip", "text_config": 3}'])
def test_a_damaged_configuration_beside_the_weights_is_refused(imagereward_folder, content):
    folder, load, _ = imagereward_folder
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        load()


def test_weights_of_another_size_need_their_configuration(imagereward_folder):
    folder, load, _ = imagereward_folder
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 3}')  # of another model: not read
    published = blip.published_config()
    assert architecture(folder / blip.FILE, published, what="reward") is published
    with torch.device("meta"), pytest.raises(InputError, match="weights are"):
        load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": VOCAB - 1}, f"up to {VOCAB - 1}, and the model knows {VOCAB - 1}"),
        ({"eos_token_id": 7}, f"ends prompts with token {VOCAB - 1}, and the model reads token 7"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path, change, message):
    folder = write_clip_tokenizer(tmp_path / "clip")
    config = clip_config().to_dict()
    config["text_config"] |= change
    CLIPModel(CLIPConfig.from_dict(config)).save_pretrained(folder)
    for build in (clip.clipscore, clip.pickscore):
        with pytest.raises(InputError, match=message):
            build(model_id=str(folder))


def test_a_tokenizer_without_padding_is_refused(tmp_path, imagereward_folder):
    folder, _, _ = imagereward_folder
    tokenizer = BertTokenizerFast.from_pretrained(folder / "bert")
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="no token to pad with"):
        Tokens(tokenizer, 8).require_fit("imagereward", VOCAB)


def test_redness_is_the_papers():
    images = torch.zeros(3, 3, 4, 4)
    images[0, 0], images[1, 1], images[2] = 1.0, 1.0, 1.0
    assert Redness()(images, ["", "", ""]).tolist() == pytest.approx([0.01, -0.005, 0.0])
    assert load_installed("hnkit.rewards", "redness")(weight=2.0).weight == 2.0


@pytest.mark.parametrize("name", sorted(point.name for point in entry_points(group="hnkit.rewards")))
def test_a_reward_with_weights_runs_where_it_is_told_to(name):
    taken = inspect.signature(load_installed("hnkit.rewards", name)).parameters
    assert "device" in taken or name == "redness"  # which has no weights


def test_the_rewards_of_the_miniature_run_where_the_images_are():
    images = torch.empty(2, 3, 32, 32, device="meta")
    rewards = load_rewards({"legibility": RewardSpec()}, None, torch.device("meta"))
    assert rewards(images, ["the digit 3"] * 2).device.type == "meta"


def test_scores_from_elsewhere_are_brought_to_the_images():
    reward = CallableReward("far", 1.0, lambda images, prompts: torch.zeros(len(prompts)))
    assert score(reward, torch.empty(2, 3, 4, 4, device="meta"), ["", ""]).device.type == "meta"


def test_the_example_of_contributing_is_a_reward():
    page = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = (
        textwrap.dedent(text) for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "darkness" in text
    )
    namespace: dict[str, Any] = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), namespace)
    reward = namespace["darkness"](weight=2.0, power=2.0)
    assert isinstance(reward, Reward)
    assert (reward.name, reward.weight) == ("darkness", 2.0)
    assert reward(torch.full((2, 3, 4, 4), 0.25), ["", ""]).tolist() == pytest.approx([0.5625, 0.5625])


def test_aesthetic_head_is_linear_in_the_normalised_embedding(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(5)
    model = CLIPModel(clip_config())
    model.save_pretrained(tmp_path / "clip")
    head = {"weight": torch.randn(1, EMBED), "bias": torch.randn(1)}
    save_file(head, tmp_path / "head.safetensors")
    reward = clip.aesthetic(model_id=str(tmp_path / "clip"), head=str(tmp_path / "head.safetensors"))
    images = torch.rand(2, 3, IMAGE, IMAGE)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        embedding = model(pixel_values=(images - mean) / std, input_ids=torch.tensor([[1, VOCAB - 1]] * 2)).image_embeds
    expected = embedding @ head["weight"][0] + head["bias"]
    torch.testing.assert_close(reward(images, ["", ""]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "missing"),
        ({"weight": torch.zeros(1, 3)}, "neither"),
        # the published head with ReLUs numbers its layers otherwise
        ({f"layers.{n}.{k}": torch.zeros(1, 1) for n in (0, 3, 6, 9, 11) for k in ("weight", "bias")}, "not linear"),
        ({f"layers.{n}.{k}": torch.zeros(2, 3) for n in (0, 2, 4, 6, 7) for k in ("weight", "bias")}, "do not follow"),
    ],
)
def test_heads_that_are_not_linear_are_refused(state, message):
    with pytest.raises(InputError, match=message) as caught:
        clip.linear_head(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("visual.proj"), "missing"),
        (lambda s: s.update({"visual.extra": torch.zeros(1)}), "not a name of OpenCLIP's"),
        (lambda s: s.update({"visual.proj": torch.zeros(3, 3)}), "another shape"),
    ],
)
def test_foreign_weights_are_refused(tmp_path, clip_tokenizer_folder, damage, message):
    state = dict(OpenClip().state_dict())
    damage(state)
    clip_config().save_pretrained(tmp_path)
    torch.save({"state_dict": state}, tmp_path / clip.HPS_FILE)
    with pytest.raises(InputError, match=message):
        clip.hpsv2(model_id=str(tmp_path), tokenizer_id=str(clip_tokenizer_folder))


class Payload:
    def __reduce__(self):
        import os

        return (os.mkdir, ("should-not-exist",))


def test_a_pickle_with_code_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": Payload()}}, "evil.pt")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        read_state_dict(tmp_path / "evil.pt", what="reward")
    assert not (tmp_path / "should-not-exist").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_either_age_are_read(tmp_path, zipped):
    saved = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(2, dtype=torch.float16)}
    saved["z"] = saved["x"]  # several names for one tensor
    torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    read = read_state_dict(tmp_path / "w.pt", what="reward")
    assert read.keys() == saved.keys()
    assert all(torch.equal(read[key], saved[key]) for key in saved)


def test_a_changed_file_is_read_anew(tmp_path):
    """Same size, same time: nothing but the file itself says what is in it."""
    import os

    for value in (0.0, 1.0):
        torch.save({"x": torch.full((100,), value)}, tmp_path / "w.pt")
        os.utime(tmp_path / "w.pt", (1, 1))
        assert float(read_state_dict(tmp_path / "w.pt", what="reward")["x"][0]) == value


def test_a_truncated_file_is_refused(tmp_path):
    torch.save({"x": torch.zeros(100)}, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "w.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"w\.pt"):
            read_state_dict(tmp_path / "w.pt", what="reward")


def test_a_missing_model_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for build in (clip.clipscore, clip.hpsv2, blip.imagereward):
        with pytest.raises(InputError, match="not in the local cache") as caught:
            build(model_id="nobody/no-such-model")
        assert "\n" not in str(caught.value)


def test_rewards_download_where_the_one_switch_says_so_and_not_else(monkeypatch):
    """The backend's `local_files_only` reaches every loader; the refusal names it and is whole."""
    asked = []

    def missing(*_, local_files_only, **__):
        asked.append(local_files_only)
        raise OSError("there is no network here")

    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", missing)
    monkeypatch.setattr("hnkit.scaled.internal.hub.hf_hub_download", missing)
    names = ("clipscore", "pickscore", "hpsv2", "imagereward")
    for local in (True, False):
        for name in names:
            with pytest.raises(InputError) as caught:
                load_rewards({name: RewardSpec()}, None, torch.device("cpu"), local_files_only=local)
            assert ("--set backend.local_files_only=false" in str(caught.value)) == local
            assert ("there is no network here" in str(caught.value)) != local
            assert str(caught.value).endswith("or give the path of a folder that holds it")
    assert asked == [True] * len(names) + [False] * len(names)
    with pytest.raises(InputError):
        load_rewards(
            {"clipscore": RewardSpec(1.0, {"local_files_only": True})},
            None,
            torch.device("cpu"),
            local_files_only=False,
        )
    assert asked[-1] is True, "what is said of one reward wins"


@pytest.mark.parametrize("fault", ["twice", "not finite"])
@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_a_file_with_a_doubled_name_or_values_that_are_not_finite_is_refused(name, fault, tmp_path):
    write, build, file, key = {
        "hpsv2": (published.write_hpsv2, clip.hpsv2, clip.HPS_FILE, "ln_final.bias"),
        "imagereward": (published.write_imagereward, blip.imagereward, blip.FILE, "mlp.layers.7.bias"),
    }[name]
    state = write(tmp_path).state_dict()
    changed = {key: state[key] + torch.nan} if fault == "not finite" else {f"module.{key}": state[key] + 1}
    torch.save({**state, **changed}, tmp_path / file)
    with pytest.raises(InputError, match="is there twice" if fault == "twice" else "not finite"):
        build(model_id=tmp_path)
