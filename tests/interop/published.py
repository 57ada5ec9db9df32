"""Tiny random-weight reward models in the layouts that are published, and the folders a loader finds them in.

Sources read: HPSv2 (tgxs002/HPSv2 at 866735e, `hpsv2/img_score.py` 54-56: a dict with `state_dict`, OpenCLIP's names),
ImageReward (THUDM/ImageReward at c1392c6, `ImageReward/ImageReward.py` 40-78 and `models/BLIP/blip_pretrain.py` 30-42:
the plain state dict of BLIP with an MLP, its two contrastive projections included), PickScore and CLIPScore
(yuvalkirstain/PickScore at f79607f, README: transformers' own format).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from hnkit.scaled.rewards import blip, clip

WIDTH, LAYERS, HEADS, EMBED, CONTEXT, VOCAB, IMAGE, PATCH = 32, 2, 2, 24, 12, 40, 28, 14


def clip_config() -> CLIPConfig:
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
             "num_attention_heads": HEADS, "hidden_act": "gelu", "projection_dim": EMBED}  # fmt: skip
    return CLIPConfig(
        projection_dim=EMBED,
        text_config={**tower, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
                     "bos_token_id": 1, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 1},
        vision_config={**tower, "image_size": IMAGE, "patch_size": PATCH},
    )  # fmt: skip


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
        # for BLIP's contrastive training; the score does not use them, the file holds them
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(WIDTH, 256), nn.Linear(WIDTH, 256)
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


def write_clip_tokenizer(folder: Path) -> Path:
    words = ["<unk>", "<|startoftext|>", "a</w>", "red</w>", "cat</w>", "two</w>", "dogs</w>", "and</w>"]
    vocabulary = {word: i for i, word in enumerate(words)} | {f"w{i}": i for i in range(len(words), VOCAB - 1)}
    vocabulary["<|endoftext|>"] = VOCAB - 1
    backend = Tokenizer(models.WordLevel({w.removesuffix("</w>"): i for w, i in vocabulary.items()}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", VOCAB - 1)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<unk>",
        pad_token="<|endoftext|>", model_max_length=CONTEXT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_clip(folder: Path) -> Path:
    """A CLIP model in transformers' format with its tokenizer, as LAION's CLIP-H and PickScore are published."""
    CLIPModel(clip_config()).save_pretrained(folder)
    return write_clip_tokenizer(folder)


def write_hpsv2(folder: Path) -> OpenClip:
    """HPSv2's file, and the configuration that weights of another size need."""
    original = OpenClip().eval()
    state = {f"module.{key}": value for key, value in original.state_dict().items()}
    clip_config().save_pretrained(folder)
    torch.save({"epoch": 3, "state_dict": state}, folder / clip.HPS_FILE)
    return original


def blip_config() -> BlipConfig:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    vision = BlipVisionConfig(**sizes, image_size=32, patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu")
    text = BlipTextConfig(
        **sizes, encoder_hidden_size=WIDTH, vocab_size=VOCAB, max_position_embeddings=CONTEXT, is_decoder=True,
        hidden_act="gelu", bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


def write_imagereward(folder: Path) -> OriginalImageReward:
    """ImageReward's file, and the configuration that weights of another size need."""
    original = OriginalImageReward().eval()
    blip_config().save_pretrained(folder)
    torch.save(original.state_dict(), folder / blip.FILE)
    return original


def write_bert_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "two", "dogs", "and", "on"]
    (folder / "vocab.txt").write_text("\n".join(words + [f"w{i}" for i in range(len(words), VOCAB)]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
