"""Reward loaders against independent forwards written on the published key layouts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertTokenizerFast,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizerFast,
)

from hnkit import InputError
from hnkit.backend import Reward, load_installed
from hnkit.scaled.rewards import Redness, blip, clip
from hnkit.scaled.rewards.preprocess import CLIP_MEAN, CLIP_STD, preprocess
from hnkit.scaled.rewards.weights import read_state_dict

WIDTH, LAYERS, HEADS, EMBED, CONTEXT, VOCAB, IMAGE, PATCH = 32, 2, 2, 24, 12, 40, 28, 14
PROMPTS = ["a red cat", "two dogs and a cat on a red mat in a red house far away"]


def clip_config() -> CLIPConfig:
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
             "num_attention_heads": HEADS, "hidden_act": "gelu", "projection_dim": EMBED}  # fmt: skip
    return CLIPConfig(
        projection_dim=EMBED,
        text_config={**tower, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
                     "bos_token_id": 1, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 1},
        vision_config={**tower, "image_size": IMAGE, "patch_size": PATCH},
    )  # fmt: skip


@pytest.fixture
def clip_tokenizer_folder(tmp_path):
    words = ["<unk>", "<|startoftext|>", "a</w>", "red</w>", "cat</w>", "two</w>", "dogs</w>", "and</w>"]
    vocabulary = {word: i for i, word in enumerate(words)} | {f"w{i}": i for i in range(len(words), VOCAB - 1)}
    vocabulary["<|endoftext|>"] = VOCAB - 1
    backend = Tokenizer(models.WordLevel({w.removesuffix("</w>"): i for w, i in vocabulary.items()}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", VOCAB - 1)],
    )
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<unk>",
        pad_token="<|endoftext|>", model_max_length=CONTEXT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


class OpenClip(nn.Module):
    """OpenCLIP's layout, written from its architecture: packed projections, (width, embed) output matrices."""

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resblocks = nn.ModuleList()
            for _ in range(LAYERS):
                block = nn.Module()
                block.ln_1, block.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
                block.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
                block.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})
                self.resblocks.append(block)

        def forward(self, x, mask=None):
            for block in self.resblocks:
                h = block.ln_1(x)
                x = x + block.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
                x = x + block.mlp["c_proj"](F.gelu(block.mlp["c_fc"](block.ln_2(x))))
            return x

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.visual.positional_embedding = nn.Parameter(torch.randn((IMAGE // PATCH) ** 2 + 1, WIDTH))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.visual.transformer = self.Tower()
        self.visual.proj = nn.Parameter(torch.randn(WIDTH, EMBED))
        self.token_embedding = nn.Embedding(VOCAB, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        self.transformer = self.Tower()
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(20.0)))
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, 1.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.2)

    def cosine(self, pixels, ids):
        patches = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        start = self.visual.class_embedding.expand(len(pixels), 1, WIDTH)
        x = self.visual.ln_pre(torch.cat([start, patches], 1) + self.visual.positional_embedding)
        image = self.visual.ln_post(self.visual.transformer(x)[:, 0]) @ self.visual.proj
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        t = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        text = t[torch.arange(len(ids)), (ids == VOCAB - 1).int().argmax(-1)] @ self.text_projection
        return F.cosine_similarity(image, text)


def test_hpsv2_loads_the_published_layout(tmp_path, clip_tokenizer_folder, monkeypatch):
    monkeypatch.setenv("HNKIT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    original = OpenClip().eval()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in original.state_dict().items()}},
               tmp_path / clip.HPS_FILE)  # fmt: skip
    reward = clip.hpsv2(
        weight=5.0, model_id=str(tmp_path), tokenizer_id=str(clip_tokenizer_folder), config=clip_config()
    )
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
    # the second load comes from the converted file
    assert len(list((tmp_path / "cache" / "hnkit" / "rewards").glob("*.safetensors"))) == 1
    again = clip.hpsv2(model_id=str(tmp_path), tokenizer_id=str(clip_tokenizer_folder), config=clip_config())
    assert torch.equal(again(images, PROMPTS), reward(images, PROMPTS))


def test_clipscore_and_pickscore_are_scaled_cosines(tmp_path, clip_tokenizer_folder):
    torch.manual_seed(1)
    model = CLIPModel(clip_config())
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    CLIPTokenizerFast.from_pretrained(clip_tokenizer_folder).save_pretrained(folder)
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


def test_reward_gradient_through_preprocessing_is_that_of_the_score(tmp_path, clip_tokenizer_folder):
    torch.manual_seed(2)
    folder = tmp_path / "clip"
    CLIPModel(clip_config()).save_pretrained(folder)
    CLIPTokenizerFast.from_pretrained(clip_tokenizer_folder).save_pretrained(folder)
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


@pytest.mark.parametrize("size", [(28, 28), (56, 56), (40, 64), (64, 40), (20, 20)])
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
    left, top = (picture.width - IMAGE) // 2, (picture.height - IMAGE) // 2
    picture = picture.crop((left, top, left + IMAGE, top + IMAGE))
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    # Pillow rounds to bytes after each of its two passes
    torch.testing.assert_close(((result[0] * std) + mean), expected, atol=2.5 / 255, rtol=0)


class OriginalImageReward(nn.Module):
    """ImageReward's own layout: a timm-style ViT, BERT with cross-attention, an MLP with dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.blip = nn.Module()
        vit = self.blip.visual_encoder = nn.Module()
        vit.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        vit.pos_embed = nn.Parameter(torch.randn(1, 5, WIDTH))
        vit.patch_embed = nn.Module()
        vit.patch_embed.proj = nn.Conv2d(3, WIDTH, 16, stride=16)
        vit.blocks = nn.ModuleList()
        for _ in range(LAYERS):
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
            block.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
            block.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 64), "fc2": nn.Linear(64, WIDTH)})
            vit.blocks.append(block)
        vit.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        bert = self.blip.text_encoder = nn.Module()
        bert.embeddings = nn.Module()
        bert.embeddings.word_embeddings = nn.Embedding(VOCAB, WIDTH)
        bert.embeddings.position_embeddings = nn.Embedding(CONTEXT, WIDTH)
        bert.embeddings.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
        bert.embeddings.register_buffer("position_ids", torch.arange(CONTEXT)[None])
        bert.encoder = nn.Module()
        bert.encoder.layer = nn.ModuleList()
        for _ in range(LAYERS):
            layer = nn.Module()
            for name in ("attention", "crossattention"):
                part = nn.Module()
                part.self = nn.ModuleDict({k: nn.Linear(WIDTH, WIDTH) for k in ("query", "key", "value")})
                part.output = nn.Module()
                part.output.dense, part.output.LayerNorm = (
                    nn.Linear(WIDTH, WIDTH),
                    nn.LayerNorm(WIDTH, eps=1e-12),
                )
                setattr(layer, name, part)
            layer.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, 64)})
            layer.output = nn.Module()
            layer.output.dense, layer.output.LayerNorm = nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)
            bert.encoder.layer.append(layer)
        self.mlp = nn.Module()
        self.mlp.layers = nn.Sequential(
            nn.Linear(WIDTH, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    @staticmethod
    def attend(query, key, value, mask=None):
        split = lambda t: t.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
        out = F.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=mask)
        return out.transpose(1, 2).flatten(2)

    def forward(self, pixels, ids, mask):
        vit, bert = self.blip.visual_encoder, self.blip.text_encoder
        x = vit.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
        for block in vit.blocks:
            x = x + block.attn["proj"](self.attend(*block.attn["qkv"](block.norm1(x)).chunk(3, -1)))
            x = x + block.mlp["fc2"](F.gelu(block.mlp["fc1"](block.norm2(x))))
        patches = vit.norm(x)
        h = bert.embeddings.LayerNorm(
            bert.embeddings.word_embeddings(ids) + bert.embeddings.position_embeddings.weight[: ids.shape[1]]
        )
        keep = mask[:, None, None, :].bool()
        for layer in bert.encoder.layer:
            for name, source, allowed in (("attention", h, keep), ("crossattention", patches, None)):
                part = getattr(layer, name)
                source = h if name == "attention" else patches
                mixed = self.attend(
                    part.self["query"](h), part.self["key"](source), part.self["value"](source), allowed
                )
                h = part.output.LayerNorm(part.output.dense(mixed) + h)
            h = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate["dense"](h))) + h)
        return (self.mlp.layers(h[:, 0]).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_loads_the_published_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("HNKIT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(4)
    original = OriginalImageReward().eval()
    torch.save(original.state_dict(), tmp_path / blip.FILE)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "two", "dogs", "and", "on"]
    (tmp_path / "vocab.txt").write_text("\n".join(words + [f"w{i}" for i in range(len(words), VOCAB)]))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    reward = blip.imagereward(
        model_id=str(tmp_path), tokenizer_id=str(tmp_path / "bert"),
        vision_config=BlipVisionConfig(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, image_size=32, patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu"),
        text_config=BlipTextConfig(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, encoder_hidden_size=WIDTH, vocab_size=VOCAB, max_position_embeddings=CONTEXT,
            is_decoder=True, hidden_act="gelu", bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0),
    )  # fmt: skip
    tokens = BertTokenizerFast.from_pretrained(tmp_path / "bert")(
        PROMPTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = original((images - mean) / std, tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=3e-6, rtol=1e-5)


def test_redness_is_the_papers():
    images = torch.zeros(3, 3, 4, 4)
    images[0, 0], images[1, 1], images[2] = 1.0, 1.0, 1.0
    assert Redness()(images, ["", "", ""]).tolist() == pytest.approx([0.01, -0.005, 0.0])
    assert load_installed("hnkit.rewards", "redness")(weight=2.0).weight == 2.0


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
    ("damage", "message"),
    [
        (lambda s: s.pop("visual.proj"), "missing"),
        (lambda s: s.update({"visual.extra": torch.zeros(1)}), "not a name of OpenCLIP's"),
        (lambda s: s.update({"visual.proj": torch.zeros(3, 3)}), "another shape"),
    ],
)
def test_foreign_weights_are_refused(tmp_path, clip_tokenizer_folder, monkeypatch, damage, message):
    monkeypatch.setenv("HNKIT_CACHE", str(tmp_path / "cache"))
    state = dict(OpenClip().state_dict())
    damage(state)
    torch.save({"state_dict": state}, tmp_path / clip.HPS_FILE)
    with pytest.raises(InputError, match=message):
        clip.hpsv2(model_id=str(tmp_path), tokenizer_id=str(clip_tokenizer_folder), config=clip_config())


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


def test_a_truncated_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HNKIT_CACHE", str(tmp_path / "cache"))
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
