"""HPSv2 (tgxs002/HPSv2 at 866735e) through OpenCLIP (the package open_clip_torch, which is run here).

What HPSv2 does, in our words: it builds its own copy of OpenCLIP's ViT-H-14, loads `checkpoint["state_dict"]` strictly
(`hpsv2/img_score.py` 54-55), tokenises with OpenCLIP's tokenizer (56, 74) and returns the cosine of the two embeddings
(77-81). The tokenizer mends Unicode with ftfy, unescapes HTML twice, collapses white space and lowers the case
(`hpsv2/src/open_clip/tokenizer.py` 61-72, 141), cuts at 77 tokens and keeps the end token (182-186). Its image
transform leaves an RGBA image as it is (`transform.py` 52-56), which the model then refuses.

open_clip 3.3.0's transformer and tokenizer are those of that copy; its package imports torchvision for residual
networks and image files, which nothing here uses: a stand-in takes that one name while the modules are loaded.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPConfig, CLIPTokenizerFast

from hnkit.scaled.rewards import clip
from hnkit.scaled.rewards.preprocess import CLIP_MEAN, CLIP_STD, Tokens

WIDTH, LAYERS, HEADS, EMBED, IMAGE, PATCH = 32, 2, 2, 24, 28, 14
PROMPTS = [
    "a photo of a red cat",
    "Caf&eacute; &amp;amp; bar,  MENU on the wall",
    "a <3 of &amp;amp; and &amp;lt;b&amp;gt;",  # ftfy leaves entities alone where there is a bracket
    "the dog\u2019s \u201cbest\u201d friend",
    "schÃ¶n, it\u00e2\u20ac\u2122s mended",
    "ﬁne ﬂowers … １２３\u3000wide\u00a0space\ttab\nnew line",
    "\ufeffa mark, e\u0301 apart, \u202eturned\u202c",
    "日本語 🎨👩‍🎨 İstanbul ΟΔΟΣ Straße",
    "don't you'll we've I'm it's he'd they're 3.14 #5 !!! <|x|>",
    " ".join(["a very long prompt about a lighthouse,"] * 20),
    "",
]


@pytest.fixture(scope="module")
def open_clip() -> Any:
    """OpenCLIP's modules `model` and `tokenizer`."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None, "open_clip_torch is a tool of the tests: see noxfile.py"
    misc = ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = nn.Identity
    package = ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations or [])
    stand_ins = {"open_clip": package, "torchvision.ops.misc": misc}
    stand_ins |= {name: ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        package.model = importlib.import_module("open_clip.model")
        package.tokenizer = importlib.import_module("open_clip.tokenizer")
    for name in set(sys.modules) - before:
        if name.startswith("open_clip."):
            del sys.modules[name]
    return package


@pytest.fixture(scope="module")
def tokenizer_folder(open_clip, tmp_path_factory):
    """The CLIP tokenizer that transformers reads, from the vocabulary that open_clip ships."""
    original = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in original.encoder.items()}
    merges = gzip.decompress(open(open_clip.tokenizer.default_bpe(), "rb").read()).decode().split("\n")  # noqa: PTH123, SIM115
    pairs = [tuple(merge.split()) for merge in merges[1 : 49152 - 256 - 2 + 1]]
    folder = tmp_path_factory.mktemp("tokenizer")
    CLIPTokenizerFast(vocab=vocabulary, merges=pairs).save_pretrained(folder)
    return folder


def words(ids: torch.Tensor) -> list[list[int]]:
    """Token ids up to the end token, which has the largest number; what follows is padding."""
    return [row[: int(row.argmax()) + 1].tolist() for row in ids]


def test_prompts_become_the_same_tokens(open_clip, tokenizer_folder):
    expected = words(open_clip.tokenizer.SimpleTokenizer()(PROMPTS))
    tokenizer = CLIPTokenizerFast.from_pretrained(tokenizer_folder)
    found = words(Tokens(tokenizer, 77, clip.clean_text)(PROMPTS, torch.zeros(1))["input_ids"])
    assert found == expected
    plain = words(Tokens(tokenizer, 77)(PROMPTS, torch.zeros(1))["input_ids"])
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) >= 4  # without cleaning they are others


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), max_size=30)
    | st.lists(st.sampled_from(["&amp;", "&lt", "&#39;", "â€™", "\u2028", "\x85", "\x1c", "\x1f", " ", "a", "é"])).map(
        "".join
    )
)
def test_any_text_is_cleaned_alike(open_clip, text):
    assert clip.clean_text(text) == open_clip.tokenizer.get_clean_fn("lower")(text)


def test_the_published_file_gives_the_published_score(open_clip, tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=EMBED,
        vision_cfg={"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH,
                    "image_size": IMAGE},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": LAYERS},
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # norms at their initial ones and zeros would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / clip.HPS_FILE)
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
             "num_attention_heads": HEADS, "hidden_act": "gelu", "projection_dim": EMBED}  # fmt: skip
    CLIPConfig(
        projection_dim=EMBED,
        text_config={**tower, "vocab_size": 49408, "max_position_embeddings": 77},
        vision_config={**tower, "image_size": IMAGE, "patch_size": PATCH},
    ).save_pretrained(tmp_path)
    reward = clip.hpsv2(model_id=str(tmp_path), tokenizer_id=str(tokenizer_folder))
    images = torch.rand(len(PROMPTS), 3, IMAGE, IMAGE)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        image = model.encode_image((images - mean) / std, normalize=True)
        text = model.encode_text(open_clip.tokenizer.SimpleTokenizer()(PROMPTS), normalize=True)
    torch.testing.assert_close(reward(images, PROMPTS), (image * text).sum(-1), atol=2e-6, rtol=0)


def test_the_published_architecture_has_the_published_shapes(open_clip):
    """ViT-H-14 as open_clip's own configuration file has it, on the meta device: names and shapes without numbers."""
    import json
    from pathlib import Path

    from transformers import CLIPModel

    file = Path(open_clip.__path__[0]) / "model_configs" / "ViT-H-14.json"
    published = json.loads(file.read_text())
    with torch.device("meta"):
        original = open_clip.model.CLIP(
            published["embed_dim"], published["vision_cfg"], published["text_cfg"]
        ).state_dict()
        ours = CLIPModel(clip.vit_h14_config()).state_dict()
        converted = clip.convert_open_clip(original)
    assert {key: value.shape for key, value in converted.items()} == {k: v.shape for k, v in ours.items()}
    heads = published["vision_cfg"]["width"] // published["vision_cfg"]["head_width"]
    config = clip.vit_h14_config()
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (
        heads, published["text_cfg"]["heads"],
    )  # fmt: skip
