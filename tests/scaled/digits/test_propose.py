"""Rewordings of the digits grammar keep the meaning: every scene of a rewording satisfies the original."""

from __future__ import annotations

import random

import pytest
import torch

from hnkit import InputError
from hnkit.scaled.digits.propose import propose, rewordings
from hnkit.scaled.digits.scenes import all_prompts, eval_prompts, sample_scene


@pytest.mark.parametrize("text", eval_prompts()[::7])
def test_rewordings_imply_the_prompt(text):
    rng = random.Random(0)
    wanted = all_prompts()[text]
    for other in rewordings(text):
        assert other != text
        for _ in range(4):
            assert wanted.holds(sample_scene(all_prompts()[other], rng).cells)


def test_rewordings_name_the_other_order_and_what_was_open():
    assert "a seven and a three" in rewordings("a three and a seven")
    assert "a nine right of a two" in rewordings("a two left of a nine")
    assert "a blue seven and a red three" in rewordings("a red three and a blue seven")
    assert "a red five" in rewordings("a five")
    assert "a red five" not in rewordings("a blue five")
    assert "a two left of a nine" not in rewordings("a nine left of a two")
    assert rewordings("three fours") == []


def test_propose_is_fresh_and_seeded():
    generator = torch.Generator().manual_seed(0)
    first = propose("a five", [("a five", 0.0), ("a red five", 1.0)], 3, generator)
    assert len(set(first)) == 3
    assert "a red five" not in first
    assert first == propose("a five", [("a five", 0.0), ("a red five", 1.0)], 3, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="unknown word"):
        propose("a dog", [], 3, generator)
