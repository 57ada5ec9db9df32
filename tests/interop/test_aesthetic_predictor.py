"""LAION's aesthetic predictor (christophschuhmann/improved-aesthetic-predictor at 6934dd8).

What `simple_inference.py` does, in our words: it loads a plain state dict of ten tensors with `torch.load` (94-96) into
five linear layers 768-1024-128-64-16-1 with dropout, off at inference, between the first four (46-61): the keys are
`layers.0`, `2`, `4`, `6` and `7`; it embeds the image with OpenAI's CLIP ViT-L/14 (103, 113), divides by the Euclidean
norm (84-89, 115) and applies the layers (117). The files of the repository whose names hold `linear` have these keys
(read with `torch.load(weights_only=True)`); the one whose name holds `relu` has `layers.0`, `3`, `6`, `9` and `11`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPModel

from hnkit import InputError
from hnkit.scaled.rewards import clip
from hnkit.scaled.rewards.preprocess import CLIP_MEAN, CLIP_STD
from tests.interop.published import EMBED, IMAGE, VOCAB, clip_config


def published_head(width: int, *, relu: bool = False) -> nn.Module:
    between: list[list[nn.Module]] = [[nn.ReLU()] if relu else [] for _ in range(4)]
    head = nn.Module()
    head.layers = nn.Sequential(
        nn.Linear(width, 1024), *between[0], nn.Dropout(0.2),
        nn.Linear(1024, 128), *between[1], nn.Dropout(0.2),
        nn.Linear(128, 64), *between[2], nn.Dropout(0.1),
        nn.Linear(64, 16), *between[3],
        nn.Linear(16, 1),
    )  # fmt: skip
    return head.eval()


def test_the_five_layers_fold_into_one():
    torch.manual_seed(0)
    head = published_head(768)
    folded = clip.linear_head(head.state_dict())
    embeddings = nn.functional.normalize(torch.randn(64, 768), dim=-1)
    with torch.no_grad():
        expected = head.double().layers(embeddings.double())
    found = embeddings.double() @ folded["weight"].double().T + folded["bias"].double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_published_file_gives_the_published_score(tmp_path):
    torch.manual_seed(1)
    model, head = CLIPModel(clip_config()), published_head(EMBED)
    model.save_pretrained(tmp_path / "clip")
    torch.save(head.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    reward = clip.aesthetic(
        model_id=str(tmp_path / "clip"), head=str(tmp_path / "sac+logos+ava1-l14-linearMSE.pth"), weight=0.5
    )
    images = torch.rand(3, 3, IMAGE, IMAGE)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        embedding = model.eval()(
            pixel_values=(images - mean) / std, input_ids=torch.tensor([[1, VOCAB - 1]] * 3)
        ).image_embeds
        expected = head.layers(embedding / embedding.norm(dim=-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(reward(images, [""] * 3), expected, atol=1e-6, rtol=1e-6)


def test_the_head_with_activations_is_refused(tmp_path):
    torch.save(published_head(EMBED, relu=True).state_dict(), tmp_path / "ava+logos-l14-reluMSE.pth")
    with pytest.raises(InputError, match="not linear"):
        clip.aesthetic(model_id=str(tmp_path / "clip"), head=str(tmp_path / "ava+logos-l14-reluMSE.pth"))
