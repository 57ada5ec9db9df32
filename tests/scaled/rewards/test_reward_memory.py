"""Reward models in bfloat16 and off the card: the scores and gradients that they have otherwise."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPModel

from hnkit import InputError
from hnkit.config import RewardSpec
from hnkit.rewards import RewardSum, load_reward
from hnkit.scaled.rewards import blip, clip
from hnkit.scaled.rewards.memory import OffCard
from hnkit.training.plan.ledger import counting
from tests.interop.published import clip_config, write_bert_tokenizer, write_clip_tokenizer, write_imagereward

PROMPTS = ["a red cat", "two dogs and a cat on a red mat", "a mat"]
LOADERS = ("clipscore", "imagereward")


@pytest.fixture
def load(tmp_path):
    """`load(name, **options)`: a small reward of the published layout."""
    torch.manual_seed(1)
    folder = write_clip_tokenizer(tmp_path / "clip")
    CLIPModel(clip_config()).save_pretrained(folder)
    (tmp_path / "blip").mkdir()
    write_imagereward(tmp_path / "blip")
    words = write_bert_tokenizer(tmp_path / "bert")

    def get(name, **options):
        if name == "clipscore":
            return clip.clipscore(weight=2.0, model_id=str(folder), **options)
        return blip.imagereward(weight=2.0, model_id=str(tmp_path / "blip"), tokenizer_id=str(words), **options)

    return get


def images(height=40, width=56):
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("name", LOADERS)
def test_off_the_card_scores_and_gradients_are_the_same(name, load):
    found = []
    for offload in (False, True):
        reward, given = load(name, offload=offload), images()
        assert isinstance(reward, OffCard) == offload
        assert (reward.name, reward.weight) == (name, 2.0)
        total = RewardSum([reward])(given, PROMPTS)
        # rows have factors of their own: the gradient that was taken at once is each row's, times its factor
        (total * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        found.append((total.detach(), given.grad))
        with torch.no_grad():
            torch.testing.assert_close(reward(given, PROMPTS) * 2.0, total)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", LOADERS)
def test_off_the_card_nothing_of_the_network_is_kept_for_the_backward_pass(name, load):
    kept = {}
    for offload in (False, True):
        reward, given = load(name, offload=offload), images(12, 12)
        with counting() as ledger:
            ledger.enter("scoring")
            scores = reward(given, PROMPTS)
            kept[offload] = ledger.live
        assert scores.requires_grad
    assert kept[True] == given.numel() * 4 + scores.numel() * 4  # the gradient of the images, and the scores
    assert kept[False] > 2 * kept[True]


def test_weights_that_visit_the_card_go_back_also_when_scoring_fails(load):
    reward = load("clipscore", offload=True)
    homes = [parameter.data_ptr() for parameter in reward.parameters()]
    away = []

    def failing(*_, **__):
        away.extend(parameter.data_ptr() for parameter in reward.parameters())
        raise InputError("of the user's")

    reward.reward.forward = failing
    with pytest.raises(InputError, match="of the user's"):
        reward(images(), PROMPTS)
    assert all(here != home for here, home in zip(away, homes, strict=True))
    assert [parameter.data_ptr() for parameter in reward.parameters()] == homes


@pytest.mark.parametrize("name", LOADERS)
def test_in_bfloat16_scores_are_float32_and_near(name, load):
    full, half = load(name), load(name, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} >= {torch.bfloat16}
    expected, found = full(images(), PROMPTS), half(images(), PROMPTS)
    assert found.dtype == torch.float32
    size = float(expected.detach().abs().max())
    assert 0 < float((found - expected).detach().abs().max()) < 0.03 * size
    assert not torch.equal(found, found.bfloat16().float())  # no step of bfloat16's


def test_an_unknown_type_is_one_line(load):
    with pytest.raises(InputError, match="option 'dtype' of reward 'clipscore'"):
        load_reward("clipscore", RewardSpec(1.0, {"dtype": "int3"}), torch.device("cpu"))
