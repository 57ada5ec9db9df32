"""PickScore (yuvalkirstain/PickScore at f79607f) and CLIPScore: transformers' own CLIP, run as the README runs it.

What the README's section "Inference with PickScore" does, in our words: prompts and images go through the processor of
LAION's CLIP-H (padded to the longest, cut at 77 tokens), the two embeddings are divided by their norms, and the score
is exp(logit_scale) times their inner product. HyperNoise (ExplainableML at bbe3ab4, `rewards/pickscore.py` 39-56,
`rewards/clip.py` 40-55) does the same on tensors, and trains on the score. CLIP configurations of before transformers'
pull request 24773 say `eos_token_id` 2, and mean the token of the largest number; both kinds are tried.
"""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from hnkit.scaled.rewards import clip
from hnkit.scaled.rewards.preprocess import CLIP_MEAN, CLIP_STD
from tests.interop.published import CONTEXT, IMAGE, clip_config, write_clip_tokenizer

PROMPTS = ["a red cat", "a", "two dogs and a cat " * 12]


@pytest.mark.parametrize(("name", "build"), [("pickscore", clip.pickscore), ("clipscore", clip.clipscore)])
@pytest.mark.parametrize("end", [2, None])
def test_the_score_is_the_readmes(tmp_path, name, build, end):
    config = clip_config().to_dict()
    if end is not None:
        config["text_config"]["eos_token_id"] = end
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig.from_dict(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms at their initial ones and zeros would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    write_clip_tokenizer(tmp_path)
    images = torch.rand(len(PROMPTS), 3, IMAGE, IMAGE)
    tokens = CLIPTokenizerFast.from_pretrained(tmp_path)(
        PROMPTS, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        image = model.get_image_features(pixel_values=(images - mean) / std).pooler_output
        text = model.get_text_features(**{key: tokens[key] for key in ("input_ids", "attention_mask")}).pooler_output
        cosine = (image / image.norm(dim=-1, keepdim=True) * (text / text.norm(dim=-1, keepdim=True))).sum(-1)
        expected = model.logit_scale.exp() * cosine
    reward = build(model_id=str(tmp_path), weight=0.05)
    assert (reward.name, reward.weight) == (name, 0.05)
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-5, rtol=1e-5)
