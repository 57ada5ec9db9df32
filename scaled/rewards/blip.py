"""ImageReward in transformers' BLIP classes. Source: arXiv 2304.05977."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizerFast, BlipConfig, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from hnkit.errors import InputError
from hnkit.scaled.internal.hub import hub_file, local_folder, pretrained
from hnkit.scaled.rewards.memory import PRECISIONS, OffCard, Precision, placed
from hnkit.scaled.rewards.preprocess import NoWords, Tokens, check_images, preprocess
from hnkit.scaled.rewards.weights import architecture, load_strict, read_state_dict, without_wrapper
from hnkit.training.plan.skeleton import countable

REPOSITORY = "THUDM/ImageReward"
FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the raw score over the authors' data: the published score is standardised."""


class ImageReward(nn.Module):
    """ImageReward: an MLP on the CLS state of BLIP's text encoder cross-attending to the image, standardised."""

    def __init__(
        self,
        weight: float,
        vision: BlipVisionModel,
        text: BlipTextModel,
        mlp: nn.Sequential,
        tokenizer: BertTokenizerFast,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        self.name, self.weight = "imagereward", weight
        kind = PRECISIONS[dtype]
        self.vision, self.text = (part.eval().requires_grad_(False).to(kind) for part in (vision, text))
        self.mlp = mlp.eval().requires_grad_(False).float()
        self._tokens = Tokens(tokenizer, min(35, int(text.config.max_position_embeddings)))
        self._tokens.require_fit(self.name, text.config.vocab_size)
        self._size = int(vision.config.image_size)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of `images` `(n, 3, H, W)` in [0, 1] for `prompts`: `(n,)` float32. Prompts are cut at 35 tokens."""
        check_images(self.name, images, prompts)
        with torch.autocast(images.device.type, enabled=False):
            pixels = preprocess(images, self._size).to(self.vision.dtype)
            patches = self.vision(pixel_values=pixels).last_hidden_state
            state = self.text(
                **self._tokens(prompts, images),
                encoder_hidden_states=patches,
                encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
                is_decoder=False,
            ).last_hidden_state[:, 0]
            score: Tensor = self.mlp(state.float()).squeeze(-1)
            return (score - MEAN) / STD


def _skeleton(
    *, weight: float = 1.0, model_id: str = "", dtype: Precision = "float32", offload: bool = False
) -> ImageReward | OffCard:
    """The reward of the published size, or of the folder `model_id`, for counting: its weights are never read."""
    folder = local_folder(model_id) if model_id else None
    known = folder is not None and (folder / "config.json").is_file()
    config = BlipConfig.from_pretrained(folder) if known else published_config()
    vision, text = BlipVisionModel(config.vision_config), BlipTextModel(config.text_config, add_pooling_layer=False)
    head = score_head(text.config.hidden_size)
    words: Any = NoWords()
    reward = ImageReward(weight, vision, text, head, words, dtype)
    return OffCard(reward, torch.device("cpu")) if offload else reward


@countable(_skeleton)
def imagereward(
    *,
    weight: float = 1.0,
    model_id: str | Path = REPOSITORY,
    tokenizer_id: str | Path = "bert-base-uncased",
    device: str = "cpu",
    dtype: Precision = "float32",
    offload: bool = False,
    local_files_only: bool = True,
) -> ImageReward | OffCard:
    """ImageReward from its published file (a hub name, or a local folder that holds `ImageReward.pt`).

    Weights of another size have a `config.json` beside them, written by `BlipConfig.save_pretrained`.

    Args:
        weight: its weight in a sum of rewards.
        model_id: where `ImageReward.pt` is.
        tokenizer_id: BERT's tokenizer, by hub name or local folder.
        device: where it runs.
        dtype: what its networks compute in; the score is float32.
        offload: keep its weights off the device but while it scores.
        local_files_only: never download.
    """
    what = "reward 'imagereward'"
    file = hub_file(model_id, FILE, what=what, local_files_only=local_files_only)
    config = architecture(file, published_config(), what=what)
    state = convert_imagereward(read_state_dict(file, what=what), what=what)
    vision = BlipVisionModel(config.vision_config)
    text = BlipTextModel(config.text_config, add_pooling_layer=False)
    mlp = score_head(text.config.hidden_size)
    for part, prefix in ((vision, "vision."), (text, "text."), (mlp, "mlp.")):
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        load_strict(part, own, what=what)
    load: Any = BertTokenizerFast.from_pretrained
    tokenizer = pretrained(load, tokenizer_id, what=what, local_files_only=local_files_only)
    return placed(ImageReward(weight, vision, text, mlp, tokenizer, dtype), device, offload)


def score_head(width: int) -> nn.Sequential:
    """The published MLP: linear layers `width`-1024-128-64-16-1 with nothing between them at inference."""
    widths = (width, 1024, 128, 64, 16, 1)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def published_config() -> BlipConfig:
    """ViT-L/16 at 224 pixels, and BERT-base with cross-attention to it."""
    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
        patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu",
    )  # fmt: skip
    text = BlipTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=30524,
        encoder_hidden_size=1024, max_position_embeddings=512, is_decoder=True, hidden_act="gelu",
    )  # fmt: skip
    return BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


_VISION = (
    (re.compile(r"^blocks\."), "encoder.layers."),
    (re.compile(r"\.attn\.proj\."), ".self_attn.projection."),
    (re.compile(r"\.attn\."), ".self_attn."),
    (re.compile(r"\.norm([12])\."), r".layer_norm\1."),
    (re.compile(r"^norm\."), "post_layernorm."),
    (re.compile(r"^patch_embed\.proj\."), "embeddings.patch_embedding."),
    (re.compile(r"^pos_embed$"), "embeddings.position_embedding"),
    (re.compile(r"^cls_token$"), "embeddings.class_embedding"),
)
_HEAD = {"0": "0", "2": "1", "4": "2", "6": "3", "7": "4"}  # dropout layers have no weights, but numbers
_UNUSED = {
    *(f"blip.{part}_proj.{kind}" for part in ("vision", "text") for kind in ("weight", "bias")),
    "blip.text_encoder.embeddings.position_ids",
}
"""Tensors of the published file that its score does not use: BLIP's projections for contrastive training, and a buffer
that transformers builds itself."""


def convert_imagereward(state: Mapping[str, Tensor], *, what: str = "ImageReward weights") -> dict[str, Tensor]:
    """Rename the published keys to `vision.*`, `text.*` (transformers' BLIP names) and `mlp.*`.

    Args:
        state: the published state dict (a `module.` prefix is dropped). The tensors that the score does not use are
            left out: BLIP's projections for contrastive training, and a buffer of positions.
        what: named in errors.

    Raises:
        InputError: a key is not ImageReward's.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in without_wrapper(state, what=what).items():
        if key in _UNUSED:
            continue
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for pattern, replacement in _VISION:
                name = pattern.sub(replacement, name)
            converted[f"vision.{name}"] = tensor
        elif key.startswith("blip.text_encoder."):
            converted[f"text.{key.removeprefix('blip.text_encoder.')}"] = tensor
        elif (match := re.match(r"^mlp\.layers\.(\d)\.(weight|bias)$", key)) and match[1] in _HEAD:
            converted[f"mlp.{_HEAD[match[1]]}.{match[2]}"] = tensor
        else:
            raise InputError(f"{what}: {key!r} is not a name of ImageReward's: these are not the published weights")
    return converted
