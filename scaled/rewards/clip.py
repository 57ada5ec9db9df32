"""CLIP-family rewards in transformers' own classes: CLIPScore, PickScore, HPSv2.1, and an aesthetic head on CLIP.

Sources: CLIPScore arXiv 2104.08718, PickScore arXiv 2305.01569, HPSv2 arXiv 2306.09341.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from hnkit.errors import InputError
from hnkit.scaled.internal.hub import hub_file, local_folder, pretrained
from hnkit.scaled.rewards.memory import PRECISIONS, OffCard, Precision, placed
from hnkit.scaled.rewards.preprocess import NoWords, Tokens, check_images, preprocess
from hnkit.scaled.rewards.weights import architecture, load_strict, read_state_dict, without_wrapper
from hnkit.training.plan.skeleton import countable

LAION_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
HPS = "xswu/HPSv2"
HPS_FILE = "HPS_v2.1_compressed.pt"


class ClipReward(nn.Module):
    """Cosine of CLIP's image and prompt embeddings, times `exp(logit_scale)` where `scaled` is true.

    Attributes:
        name: how reports call it.
        weight: its weight in a sum of rewards.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        model: CLIPModel,
        tokenizer: CLIPTokenizerFast,
        *,
        scaled: bool,
        clean: Callable[[str], str] = str,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        self.name, self.weight, self._scaled = name, weight, scaled
        self.model = model.eval().requires_grad_(False).to(PRECISIONS[dtype])
        text = model.config.text_config
        self._tokens = Tokens(tokenizer, min(77, int(text.max_position_embeddings)), clean)
        # 2 stands in configurations of old, and means the token of the largest number
        self._tokens.require_fit(name, text.vocab_size, None if text.eos_token_id == 2 else text.eos_token_id)
        self._size = int(model.config.vision_config.image_size)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of `images` `(n, 3, H, W)` in [0, 1] for `prompts`: `(n,)` float32. Prompts are cut at 77 tokens."""
        check_images(self.name, images, prompts)
        # never under autocast: in bfloat16 a score near 0.28 moves in steps of 0.002
        with torch.autocast(images.device.type, enabled=False):
            pixels = preprocess(images, self._size).to(self.model.dtype)
            output = self.model(pixel_values=pixels, **self._tokens(prompts, images))
            embeds: list[Tensor] = [output.image_embeds, output.text_embeds]
            if pixels.dtype != torch.float32:  # lengths of 1 are rounded, too
                embeds = [nn.functional.normalize(each.float(), dim=-1) for each in embeds]
            cosine: Tensor = (embeds[0] * embeds[1]).sum(-1)
            return cosine * self.model.logit_scale.float().exp() if self._scaled else cosine


class LinearHeadReward(nn.Module):
    """An aesthetic score: a linear head on CLIP's normalised image embedding. It does not read the prompt."""

    def __init__(self, name: str, weight: float, model: CLIPModel, head: nn.Linear) -> None:
        super().__init__()
        self.name, self.weight = name, weight
        self.vision = model.vision_model.eval().requires_grad_(False).float()
        self.projection = model.visual_projection.eval().requires_grad_(False).float()
        self.head = head.requires_grad_(False).float()
        self._size = int(model.config.vision_config.image_size)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of `images` `(n, 3, H, W)` in [0, 1]: `(n,)` float32."""
        check_images(self.name, images, prompts)
        with torch.autocast(images.device.type, enabled=False):
            pooled = self.vision(pixel_values=preprocess(images, self._size)).pooler_output
            embedding = nn.functional.normalize(self.projection(pooled), dim=-1)
            score: Tensor = self.head(embedding).squeeze(-1)
            return score


def _tokenizer(source: str | Path, what: str, local_files_only: bool) -> CLIPTokenizerFast:
    load = CLIPTokenizerFast.from_pretrained
    tokenizer: CLIPTokenizerFast = pretrained(load, source, what=what, local_files_only=local_files_only)
    return tokenizer


def _skeleton(name: str, *, scaled: bool) -> Callable[..., ClipReward | OffCard]:
    """A reward of the published size, or of the folder `model_id`, for counting: its weights are never read."""

    def build(
        *, weight: float = 1.0, model_id: str = "", dtype: Precision = "float32", offload: bool = False
    ) -> ClipReward | OffCard:
        folder = local_folder(model_id) if model_id else None
        known = folder is not None and (folder / "config.json").is_file()
        config = CLIPConfig.from_pretrained(folder) if known else vit_h14_config()
        words: Any = NoWords(config.text_config.eos_token_id)
        reward = ClipReward(name, weight, CLIPModel(config), words, scaled=scaled, dtype=dtype)
        return OffCard(reward, torch.device("cpu")) if offload else reward

    return build


@countable(_skeleton("clipscore", scaled=True))
def clipscore(
    *,
    weight: float = 1.0,
    model_id: str | Path = LAION_H14,
    device: str = "cpu",
    dtype: Precision = "float32",
    offload: bool = False,
    local_files_only: bool = True,
) -> ClipReward | OffCard:
    """CLIPScore: `exp(logit_scale) * cos(image, prompt)` of a CLIP model (a hub name or a local folder).

    Args:
        weight: its weight in a sum of rewards.
        model_id: a hub name or a local folder.
        device: where it runs.
        dtype: what its network computes in; the score is float32.
        offload: keep its weights off the device but while it scores.
        local_files_only: never download.
    """
    what = "reward 'clipscore'"
    model = pretrained(CLIPModel.from_pretrained, model_id, what=what, local_files_only=local_files_only)
    tokenizer = _tokenizer(model_id, what, local_files_only)
    return placed(ClipReward("clipscore", weight, model, tokenizer, scaled=True, dtype=dtype), device, offload)


@countable(_skeleton("pickscore", scaled=True))
def pickscore(
    *,
    weight: float = 1.0,
    model_id: str | Path = PICKSCORE,
    tokenizer_id: str | Path | None = None,
    device: str = "cpu",
    dtype: Precision = "float32",
    offload: bool = False,
    local_files_only: bool = True,
) -> ClipReward | OffCard:
    """PickScore: `exp(logit_scale) * cos(image, prompt)` of the CLIP-H fine-tuned on human choices.

    Args:
        weight: its weight in a sum of rewards.
        model_id: a hub name or a local folder.
        tokenizer_id: where the tokenizer is; the published model uses that of LAION's CLIP-H. A local `model_id`
            that holds one needs none.
        device: where it runs.
        dtype: what its network computes in; the score is float32.
        offload: keep its weights off the device but while it scores.
        local_files_only: never download.
    """
    what = "reward 'pickscore'"
    model = pretrained(CLIPModel.from_pretrained, model_id, what=what, local_files_only=local_files_only)
    source = tokenizer_id or (model_id if (Path(model_id) / "tokenizer_config.json").is_file() else LAION_H14)
    tokenizer = _tokenizer(source, what, local_files_only)
    return placed(ClipReward("pickscore", weight, model, tokenizer, scaled=True, dtype=dtype), device, offload)


@countable(_skeleton("hpsv2", scaled=False))
def hpsv2(
    *,
    weight: float = 1.0,
    model_id: str | Path = HPS,
    tokenizer_id: str | Path = LAION_H14,
    device: str = "cpu",
    dtype: Precision = "float32",
    offload: bool = False,
    local_files_only: bool = True,
) -> ClipReward | OffCard:
    """HPSv2.1: the cosine of OpenCLIP's ViT-H-14 fine-tuned on human preferences.

    The published file has OpenCLIP's names; `convert_open_clip` renames them to transformers'. Prompts are cleaned as
    HPSv2 cleans them (`clean_text`). Weights of another size have a `config.json` beside them, written by
    `CLIPConfig.save_pretrained`.

    Args:
        weight: its weight in a sum of rewards.
        model_id: a hub name or a local folder that holds `HPS_v2.1_compressed.pt`.
        tokenizer_id: a CLIP tokenizer, by hub name or local folder.
        device: where it runs.
        dtype: what its network computes in; the score is float32.
        offload: keep its weights off the device but while it scores.
        local_files_only: never download.
    """
    what = "reward 'hpsv2'"
    file = hub_file(model_id, HPS_FILE, what=what, local_files_only=local_files_only)
    model = CLIPModel(architecture(file, vit_h14_config(), what=what))
    load_strict(model, convert_open_clip(read_state_dict(file, what=what), what=what), what=what)
    tokenizer = _tokenizer(tokenizer_id, what, local_files_only)
    reward = ClipReward("hpsv2", weight, model, tokenizer, scaled=False, clean=clean_text, dtype=dtype)
    return placed(reward, device, offload)


def aesthetic(
    *,
    weight: float = 1.0,
    model_id: str | Path = "openai/clip-vit-large-patch14",
    head: str | Path = "",
    device: str = "cpu",
    local_files_only: bool = True,
) -> LinearHeadReward:
    """An aesthetic score: a linear head on CLIP's normalised image embedding, such as LAION's aesthetic predictor.

    Args:
        weight: its weight in a sum of rewards.
        model_id: the CLIP model the head was trained on; the published head was on OpenAI's ViT-L/14.
        head: the file with the head, safetensors or `.pth`; it has no default. See `linear_head` for what it holds.
        device: where it runs.
        local_files_only: never download.
    """
    what = "reward 'aesthetic'"
    if not head:
        raise InputError(f"{what} needs the option head: LAION's aesthetic predictor, or a safetensors file like it")
    if not Path(head).is_file():
        raise InputError(f"{what}: the head {head} is not a file: give LAION's .pth or a safetensors file")
    folded = linear_head(read_state_dict(Path(head), what=what), what=what)
    model = pretrained(CLIPModel.from_pretrained, model_id, what=what, local_files_only=local_files_only)
    linear = nn.Linear(model.config.projection_dim, 1)
    load_strict(linear, folded, what=what)
    return LinearHeadReward("aesthetic", weight, model, linear).to(device)


def linear_head(state: Mapping[str, Tensor], *, what: str = "head") -> dict[str, Tensor]:
    """An aesthetic head as one linear layer: `weight` `(1, e)` and `bias` `(1,)`.

    LAION's published head is five linear layers with dropout and nothing else between them, `layers.0`, `2`, `4`, `6`
    and `7`, whose product is one linear layer; it is taken in float64. A head of one layer is returned as it is.

    Args:
        state: the tensors of either.
        what: named in errors.

    Raises:
        InputError: another set of layers, such as that of the head with ReLUs, or shapes that do not follow each other.
    """
    if set(state) == {"weight", "bias"}:
        return dict(state)
    if set(state) != {f"layers.{number}.{kind}" for number in _HEAD_LAYERS for kind in ("weight", "bias")}:
        raise InputError(
            f"{what}: the head is neither 'weight' (1, e) and 'bias' (1,) nor LAION's linear layers "
            f"{', '.join(_HEAD_LAYERS)} (its first tensor is {min(state, default='missing')!r}): a head with "
            f"activations between its layers is not linear"
        )
    layers = [(state[f"layers.{n}.weight"].double(), state[f"layers.{n}.bias"].double()) for n in _HEAD_LAYERS]
    (weight, bias), *rest = layers
    try:
        for matrix, shift in rest:
            weight, bias = matrix @ weight, matrix @ bias + shift
    except RuntimeError as error:
        raise InputError(
            f"{what}: the layers of the head do not follow each other ({error}): fetch it again"
        ) from error
    return {"weight": weight.float(), "bias": bias.float()}


_HEAD_LAYERS = ("0", "2", "4", "6", "7")


def clean_text(text: str) -> str:
    """A prompt as HPSv2's tokenizer cleans it: mended Unicode, HTML unescaped twice, single spaces, lower case."""
    import ftfy

    # str.lower knows the Greek final sigma, which the lower case of transformers' tokenizer does not
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def vit_h14_config() -> CLIPConfig:
    """OpenCLIP's ViT-H-14 as transformers writes it."""
    return CLIPConfig(
        projection_dim=1024,
        text_config={
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "hidden_act": "gelu", "projection_dim": 1024, "vocab_size": 49408, "max_position_embeddings": 77,
        },
        vision_config={
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "hidden_act": "gelu", "projection_dim": 1024, "image_size": 224, "patch_size": 14,
        },
    )  # fmt: skip


_TOWER = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # the class spells it so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_PACKED = re.compile(r"^(.*resblocks\.\d+)\.attn\.in_proj_(weight|bias)$")
_IN_BLOCK = re.compile(r"^(visual\.transformer\.resblocks\.|transformer\.resblocks\.)(\d+)\.(.+)\.(weight|bias)$")


def convert_open_clip(state: Mapping[str, Tensor], *, what: str = "CLIP weights") -> dict[str, Tensor]:
    """Rename OpenCLIP's keys to transformers' `CLIPModel`, splitting the packed query, key and value projection.

    Args:
        state: OpenCLIP's state dict (a `module.` prefix is dropped).
        what: named in errors.

    Returns:
        The state dict of a `CLIPModel` of the same sizes.

    Raises:
        InputError: a key is not OpenCLIP's.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in without_wrapper(state, what=what).items():
        packed, block = _PACKED.match(key), _IN_BLOCK.match(key)
        if key in _OUTSIDE:
            converted[_OUTSIDE[key]] = tensor
        elif key in _TRANSPOSED:
            converted[_TRANSPOSED[key]] = tensor.T.contiguous()
        elif packed:
            stem, kind = packed.groups()
            for old, new in _TOWER.items():
                if stem.startswith(old):
                    layer = f"{new}{stem.removeprefix(old)}.self_attn"
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{layer}.{name}_proj.{kind}"] = part.contiguous()
        elif block and block[3] in _BLOCK:
            tower, number, name, kind = block.groups()
            converted[f"{_TOWER[tower]}{number}.{_BLOCK[name]}.{kind}"] = tensor
        elif key == "attn_mask":
            continue  # a constant of the architecture, which transformers builds itself
        else:
            raise InputError(f"{what}: {key!r} is not a name of OpenCLIP's: these are not the published weights")
    return converted
