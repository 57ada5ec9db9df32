"""Stage 4: the contrastive image-text scorer, a tiny CLIP trained on its own handwriting with hard negatives.

Positives are scenes and the sentences they satisfy; negatives are the other sentences of the batch and edits of the
right one (another digit, colour, count or relation, attributes or places exchanged). Sentences that happen to be true
of an image are left out of its negatives. Some digits are fused with another and count as absent, so that illegible
ink does not score. Auxiliary readers of what is drawn and what is said speed up the towers and are thrown away.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from hnkit.scaled.digits.scenes import (
    CELLS,
    COLOURS,
    EMPTY,
    KIND_WEIGHTS,
    KINDS,
    NUMBERS,
    RELATIONS,
    Kind,
    Prompt,
    Scans,
    Scene,
    all_prompts,
    load_scans,
    render,
    sample_scene,
    truth_table,
)
from hnkit.scaled.digits.train.common import (
    Average,
    PromptSampler,
    load_autoencoder,
    optimiser,
    record,
    recorded,
    steps_logged,
)
from hnkit.scaled.digits.train.tokenizers import CLIP_LENGTH, clip_tokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH = 4
HARD = 4


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for 32 x 32 images and sentences of the grammar."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CLIP_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_act": "quick_gelu",
    }
    vision = {
        "image_size": 32,
        "patch_size": PATCH,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The processor that belongs to it."""
    image = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    return CLIPProcessor(image_processor=image, tokenizer=tokenizer)


def swap(prompt: Prompt) -> Prompt:
    """The sentence with its two places (position) or its two colours (attribution) exchanged."""
    if prompt.kind == "attribution":
        return dataclasses.replace(prompt, colours=prompt.colours[::-1])
    return dataclasses.replace(prompt, digits=prompt.digits[::-1])


def edit(prompt: Prompt, rng: random.Random) -> Prompt:
    """A sentence close to `prompt` that says something else."""
    digits, colours = list(prompt.digits), list(prompt.colours)
    choices = ["digit"]
    if prompt.kind == "counting":
        choices = ["digit", "count", "count"]
    elif prompt.kind == "colours":
        choices = ["digit", "colour"]
    elif prompt.kind == "position":
        choices = ["digit", "relation", "swap"]
    elif prompt.kind == "attribution":
        choices = ["digit", "colour", "swap"]
    k = rng.randrange(len(digits))
    match rng.choice(choices):
        case "digit":
            digits[k] = rng.choice([d for d in range(10) if d not in digits])
        case "colour":
            colours[k] = rng.choice([c for c in range(len(COLOURS)) if c not in colours])
        case "count":
            return dataclasses.replace(prompt, count=rng.choice([n for n in NUMBERS.values() if n != prompt.count]))
        case "relation":
            return dataclasses.replace(prompt, relation=rng.choice([r for r in RELATIONS if r != prompt.relation]))
        case _:
            return swap(prompt)
    return dataclasses.replace(prompt, digits=tuple(digits), colours=tuple(colours))


class Heads(nn.Module):
    """Auxiliary readers, thrown away after training: what is in each cell, in the scene, and in the sentence.

    Cell by cell the patch states must tell digit and colour; the pooled image state how many of each digit, each
    digit's colours and cells; the pooled text state the words. They make the two towers learn in minutes.
    """

    def __init__(self, image_width: int, text_width: int) -> None:
        """Build the layers."""
        super().__init__()
        self.side = 16 // PATCH
        self.cell = nn.Linear(image_width * self.side**2, 11 + len(COLOURS))
        self.count = nn.Linear(image_width, 10 * (CELLS + 1))
        self.colour = nn.Linear(image_width, 10 * len(COLOURS))
        self.place = nn.Linear(image_width, 10 * CELLS)
        self.words = nn.ModuleList(nn.Linear(text_width, classes) for classes in (10, 11, 7, 7, 9))

    def image_loss(self, states: Tensor, pooled: Tensor, cells: Tensor) -> Tensor:
        """Loss of the readers of patch states (n, 64, w) and pooled state (n, w) given the cells (n, 4, 2)."""
        n, _, width = states.shape
        grid = states.view(n, 2, self.side, 2, self.side, width).permute(0, 1, 3, 2, 4, 5)
        read = self.cell(grid.reshape(n, CELLS, -1))
        digit, colour = cells.unbind(-1)
        shown = digit != EMPTY
        loss = F.cross_entropy(read[..., :11].flatten(0, 1), torch.where(shown, digit, 10).flatten())
        loss = loss + F.cross_entropy(read[..., 11:][shown], colour[shown])
        there = F.one_hot(torch.where(shown, digit, 10), 11)[..., :10]
        count = self.count(pooled).view(n, CELLS + 1, 10)
        loss = loss + F.cross_entropy(count, there.sum(1))
        hues = torch.einsum("ncd,nch->ndh", there.float(), F.one_hot(colour, len(COLOURS)).float()).clamp(max=1)
        binary = F.binary_cross_entropy_with_logits
        loss = loss + 4 * binary(self.colour(pooled).view_as(hues), hues)
        return loss + 4 * binary(self.place(pooled).view(n, CELLS, 10), there.float())

    def text_loss(self, pooled: Tensor, prompts: list[Prompt]) -> Tensor:
        """Loss of the readers of the pooled text state (m, w)."""
        rows = []
        for p in prompts:
            second, hue = (*p.digits, 10)[1], (*p.colours, None)[1]
            form = 3 + RELATIONS.index(p.relation) if p.relation else {"counting": p.count - 2, "two": 7}.get(p.kind, 8)
            hues = [6 if c is None else c for c in (p.colours[0], hue)]
            rows.append((p.digits[0], second, *hues, form))
        target = torch.tensor(rows)
        losses = [F.cross_entropy(head(pooled), target[:, i]) for i, head in enumerate(self.words)]
        return torch.stack(losses).sum()


def batch_of_scenes(sampler: PromptSampler, scans: Scans, n: int, seed: int) -> tuple[Tensor, Tensor, list[Prompt]]:
    """Images, what they legibly show (n, 4, 2), and a sentence that each satisfies."""
    rng = sampler.rng
    prompts, scenes = sampler(n), []
    for prompt in prompts:
        cells = list(sample_scene(prompt, rng).cells)
        if rng.random() < 0.3 and prompt.kind != "counting":
            # A bystander, so that presence and not emptiness of the rest is what counts.
            free = [i for i, (d, _) in enumerate(cells) if d == EMPTY]
            if free:
                cells[rng.choice(free)] = (rng.randrange(10), rng.randrange(len(COLOURS)))
        scenes.append(Scene(tuple(cells)))
    generator = torch.Generator().manual_seed(seed)
    spoiled = torch.rand(n, 4, generator=generator) < 0.08
    images = render(scenes, scans, seed=seed, warp=1.0, spoiled=spoiled)
    shown = torch.tensor([scene.cells for scene in scenes])
    shown[..., 0] = torch.where(spoiled, EMPTY, shown[..., 0])
    return images, shown, prompts


def pixels(images: Tensor) -> Tensor:
    """CLIP's normalisation of images in [0, 1]."""
    return (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def tokenise(tokenizer: CLIPTokenizer, prompts: list[Prompt]) -> dict[str, Tensor]:
    """Padded token ids and mask of sentences."""
    out = tokenizer([p.text for p in prompts], padding="max_length", max_length=CLIP_LENGTH, return_tensors="pt")
    return {"input_ids": out.input_ids, "attention_mask": out.attention_mask}


def train(
    work: Path,
    *,
    seed: int,
    steps: int,
    batch: int = 96,
    lr: float = 1e-3,
    weights: Mapping[Kind, float] = KIND_WEIGHTS,
    resume: bool = False,
) -> None:
    """Train the scorer, or a second round of it.

    Args:
        work: Folder with ``vae/``; receives ``clip/``.
        seed: Seed of weights and data.
        steps: Optimiser steps.
        batch: Images a step.
        lr: Peak learning rate.
        weights: Proportions of the kinds of sentence.
        resume: Start from ``clip/`` instead of from nothing.
    """
    torch.manual_seed(seed)
    start, tokenizer = time.monotonic(), clip_tokenizer()
    vae = load_autoencoder(work)
    fresh = build(tokenizer)
    model = CLIPModel.from_pretrained(work / "clip", local_files_only=True) if resume else fresh
    model.train()
    heads = Heads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
    sampler, scans = PromptSampler(seed, weights), load_scans("scorer")
    log: dict[str, Tensor] = {}
    adam, schedule = optimiser([*model.parameters(), *heads.parameters()], lr, steps, decay=0.05)
    average = Average(model, 0.998)
    for step in steps_logged(steps, 50, log, "scorer"):
        images, cells, prompts = batch_of_scenes(sampler, scans, batch, seed * 1_000_003 + step)
        with torch.no_grad():
            # Half the images go through the autoencoder with noisy latents: what a generator's output looks like.
            part = images[: batch // 2] * 2 - 1
            z = vae.encode(part, return_dict=False)[0]
            z = z + 0.35 * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
            images[: batch // 2] = vae.decode(z, return_dict=False)[0] / 2 + 0.5
            images = (images + 0.06 * torch.rand(batch, 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)
        texts = prompts + [edit(p, sampler.rng) for p in prompts for _ in range(HARD)]
        seen = model.vision_model(pixel_values=pixels(images))
        image = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
        spoken = model.text_model(**tokenise(tokenizer, texts)).pooler_output
        text = F.normalize(model.text_projection(spoken), dim=-1)
        truth = truth_table(cells, texts)
        own = torch.arange(batch)
        valid = truth[own, own]  # false where a named digit was spoiled
        logits = model.logit_scale.exp() * image @ text.T
        forbidden = truth.clone()
        forbidden[own, own] = False
        by_image = F.cross_entropy(logits.masked_fill(forbidden, -1e4)[valid], own[valid])
        square = logits[:, :batch].masked_fill(forbidden[:, :batch], -1e4)
        by_text = F.cross_entropy(square.T[valid], own[valid])
        aux = heads.image_loss(seen.last_hidden_state[:, 1:], seen.pooler_output, cells)
        aux_text = heads.text_loss(spoken, texts)
        loss = by_image + by_text + aux + 0.5 * aux_text
        adam.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50))
        average.update(model)
        now = {
            "by_image": by_image,
            "by_text": by_text,
            "aux": aux,
            "aux_text": aux_text,
            "hit": (logits.masked_fill(forbidden, -1e4).argmax(1) == own)[valid].float().mean(),
        }
        log.update({k: v.detach() if k not in log else 0.95 * log[k] + 0.05 * v.detach() for k, v in now.items()})
        if (step + 1) % 500 == 0 or step + 1 == steps:
            average.module.save_pretrained(work / "clip")
            processor(tokenizer).save_pretrained(work / "clip")
    figures: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
    figures |= accuracy(average.module, tokenizer, seed=seed + 1)
    before = recorded(work, "scorer") if resume else {"steps": 0, "seconds": 0.0}
    spent = {"steps": before["steps"] + steps, "seconds": before["seconds"] + round(time.monotonic() - start, 1)}
    record(work, "scorer", {**figures, **spent})
    print(figures, flush=True)


@torch.no_grad()
def accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, *, seed: int, n: int = 400) -> dict[str, float]:
    """How often the right sentence beats one edit of it, on handwriting of the generator's split.

    Args:
        model: The scorer.
        tokenizer: Its tokenizer.
        seed: Seed of scenes and edits.
        n: Scenes per kind.

    Returns:
        ``right_beats_edit_KIND`` for each kind and, for what needs to be bound together, ``right_beats_swap_KIND``.
    """
    rng, model, figures = random.Random(seed), model.eval(), {}

    def share(scenes: list[Scene], images: Tensor, prompts: list[Prompt], wrong: list[Prompt]) -> float:
        seen = model(pixel_values=pixels(images), **tokenise(tokenizer, prompts + wrong))
        true, false = seen.text_embeds.chunk(2)
        margin = (seen.image_embeds * (true - false)).sum(-1)
        fair = ~truth_table(torch.tensor([s.cells for s in scenes]), wrong).diagonal()
        return round(float((margin > 0)[fair].float().mean()), 4)

    for kind in KINDS:
        members = [p for p in all_prompts().values() if p.kind == kind]
        prompts = [rng.choice(members) for _ in range(n)]
        scenes = [sample_scene(p, rng) for p in prompts]
        images = render(scenes, load_scans("generator"), seed=seed)
        figures[f"right_beats_edit_{kind}"] = share(scenes, images, prompts, [edit(p, rng) for p in prompts])
        if kind in ("position", "attribution"):
            figures[f"right_beats_swap_{kind}"] = share(scenes, images, prompts, [swap(p) for p in prompts])
    return figures
