"""Stage 2: the many-step teacher, a flow in SANA-Sprint's parametrisation, trained jointly with its text encoder.

With y0 the scaled latent, z the noise and s in [0, 1] SANA-Sprint's time, the network sees (1 - s) y0 + s z and
predicts u = z - y0; the pipeline turns u into the TrigFlow velocity, so teacher and student are evaluated by the same
call. The initial guidance input of the teacher is 1, its classifier-free guidance runs outside the network.

Source: arXiv:2503.09641 (section 3.1, the training-free transformation to TrigFlow).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerBase

from hnkit.scaled.digits.scenes import load_scans, render, sample_scene
from hnkit.scaled.digits.train.common import (
    Average,
    PromptSampler,
    load_autoencoder,
    optimiser,
    record,
    steps_logged,
)
from hnkit.scaled.digits.train.tokenizers import GEMMA_LENGTH, gemma_tokenizer

WIDTH = 128
TEXT_WIDTH = 96
LATENT = (16, 4, 4)
GUIDANCE_EMBEDS_SCALE = 0.1


def build_text_encoder(vocabulary: int) -> Gemma2Model:
    """An untrained Gemma-2 text encoder, two layers wide enough for the grammar."""
    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=512,
        sliding_window=512,
        initializer_range=0.05,
    )
    return Gemma2Model(config)


def build_transformer() -> SanaTransformer2DModel:
    """An untrained SANA-Sprint transformer over 4 x 4 latent tokens."""
    return SanaTransformer2DModel(
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=2.5,
        sample_size=LATENT[1],
        patch_size=1,
        interpolation_scale=1.0,
        guidance_embeds=True,
        guidance_embeds_scale=GUIDANCE_EMBEDS_SCALE,
        qk_norm="rms_norm_across_heads",
    )


def tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (n, 8) each, as the pipeline makes them with max_sequence_length=8."""
    tokenizer.padding_side = "right"
    out = tokenizer(list(texts), padding="max_length", max_length=GEMMA_LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


class Flow(nn.Module):
    """Text encoder and transformer together: u(y_s, s, prompt, guidance)."""

    def __init__(self, text_encoder: Gemma2Model, transformer: SanaTransformer2DModel) -> None:
        """Hold the two networks."""
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer

    def forward(self, y: Tensor, s: Tensor, ids: Tensor, mask: Tensor, guidance: Tensor) -> Tensor:
        """Predict u = z - y0.

        Args:
            y: (n, 16, 4, 4) the interpolant (1 - s) y0 + s z.
            s: (n,) time.
            ids: (n, 8) tokens.
            mask: (n, 8) their mask.
            guidance: (n,) guidance scale.

        Returns:
            (n, 16, 4, 4).
        """
        states = self.text_encoder(ids, attention_mask=mask)[0]
        return self.velocity(y, s, states, mask, guidance)

    def velocity(self, y: Tensor, s: Tensor, states: Tensor, mask: Tensor, guidance: Tensor) -> Tensor:
        """The same from text states that are known already."""
        out: Tensor = self.transformer(
            y,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            guidance=guidance * GUIDANCE_EMBEDS_SCALE,
            timestep=s,
            return_dict=False,
        )[0]
        return out


@dataclass(frozen=True)
class Latents:
    """Encoded training scenes: scaled latents (m, 16, 4, 4) and the prompts they were drawn for."""

    latents: Tensor
    texts: tuple[str, ...]


@torch.no_grad()
def encode_scenes(vae: AutoencoderDC, n: int, seed: int, chunk: int = 512) -> Latents:
    """Draw training prompts, draw a scene for each, render and encode it."""
    sampler, scans = PromptSampler(seed), load_scans("generator")
    latents, texts = [], []
    for start in range(0, n, chunk):
        prompts = sampler(min(chunk, n - start))
        images = render([sample_scene(p, sampler.rng) for p in prompts], scans, seed=seed * 1_000_003 + start)
        latents.append(vae.encode(images * 2 - 1, return_dict=False)[0] * vae.config.scaling_factor)
        texts += [p.text for p in prompts]
    return Latents(torch.cat(latents), tuple(texts))


def guided_velocity(
    flow: Flow, y: Tensor, s: Tensor, states: Tensor, mask: Tensor, null: tuple[Tensor, Tensor], w: Tensor
) -> Tensor:
    """Classifier-free guidance: u_null + w (u_prompt - u_null), in one batch."""
    n = len(y)
    one = torch.ones(2 * n)
    both = flow.velocity(
        torch.cat([y, y]),
        torch.cat([s, s]),
        torch.cat([states, null[0].expand(n, -1, -1)]),
        torch.cat([mask, null[1].expand(n, -1)]),
        one,
    )
    conditional, unconditional = both.chunk(2)
    return unconditional + w.view(-1, 1, 1, 1) * (conditional - unconditional)


@torch.no_grad()
def sample(
    flow: Flow,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    noise: Tensor,
    *,
    guidance: float | Tensor,
    steps: int = 16,
    keep: bool = False,
) -> Tensor:
    """Integrate the teacher's flow from noise to latents with the midpoint rule.

    Args:
        flow: The teacher.
        tokenizer: Its tokenizer.
        texts: n prompts.
        noise: (n, 16, 4, 4).
        guidance: Guidance scale, one for all or (n,).
        steps: Midpoint steps (two guided evaluations each).
        keep: Also return the states on the way.

    Returns:
        (n, 16, 4, 4) latents, or (n, steps + 1, 16, 4, 4) with the whole trajectory if `keep`.
    """
    ids, mask = tokenise(tokenizer, texts)
    states = flow.text_encoder(ids, attention_mask=mask)[0]
    null_ids, null_mask = tokenise(tokenizer, [""])
    null = (flow.text_encoder(null_ids, attention_mask=null_mask)[0], null_mask)
    w = torch.as_tensor(guidance, dtype=torch.float32).expand(len(texts))
    times = torch.linspace(1, 0, steps + 1)
    y, path = noise, [noise]
    for t, t_next in itertools.pairwise(times):
        half = (t + t_next) / 2
        u = guided_velocity(flow, y, t.expand(len(y)), states, mask, null, w)
        u = guided_velocity(flow, y + (half - t) * u, half.expand(len(y)), states, mask, null, w)
        y = y + (t_next - t) * u
        path.append(y)
    return torch.stack(path, 1) if keep else y


def train(work: Path, *, seed: int, steps: int, schedule: int, batch: int = 128, scenes: int = 98_304) -> None:
    """Train the teacher.

    Args:
        work: Folder with ``vae/``; receives ``teacher/`` (transformer, text encoder, tokenizer) and checkpoints.
        seed: Seed of weights and data.
        steps: Optimiser steps.
        schedule: Steps over which the learning rate would fall to its floor; the average makes up for stopping early.
        batch: Scenes a step.
        scenes: Number of encoded scenes.
    """
    torch.manual_seed(seed)
    vae, start = load_autoencoder(work), time.monotonic()
    data = encode_scenes(vae, scenes, seed)
    tokenizer = gemma_tokenizer()
    known = sorted(set(data.texts))
    ids, mask = tokenise(tokenizer, ["", *known])
    number = {text: i + 1 for i, text in enumerate(known)}
    which = torch.tensor([number[text] for text in data.texts])
    print(f"{len(data.texts)} scenes encoded, std {float(data.latents.std()):.3f}, {time.monotonic() - start:.0f} s")
    flow = Flow(build_text_encoder(len(tokenizer)), build_transformer()).train()
    flow.text_encoder.config.use_cache = False
    adam, rates = optimiser(list(flow.parameters()), 1.5e-3, schedule)
    average = Average(flow, 0.999)
    log: dict[str, Tensor | float] = {}
    for step in steps_logged(steps, 100, log, "teacher"):
        rows = torch.randint(len(which), (batch,))
        y0, z = data.latents[rows], torch.randn(batch, *LATENT)
        s = torch.sigmoid(0.3 + 1.2 * torch.randn(batch))
        prompt = torch.where(torch.rand(batch) < 0.1, 0, which[rows])
        mix = s.view(-1, 1, 1, 1)
        u = flow((1 - mix) * y0 + mix * z, s, ids[prompt], mask[prompt], torch.ones(batch))
        loss = F.mse_loss(u, z - y0)
        adam.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        adam.step()
        rates.step()
        average.update(flow)
        log["loss"] = loss.detach() if step == 0 else 0.98 * log["loss"] + 0.02 * loss.detach()
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            save(work / "teacher", average.module, tokenizer)
    figures = {
        "parameters_transformer": sum(p.numel() for p in flow.transformer.parameters()),
        "parameters_text_encoder": sum(p.numel() for p in flow.text_encoder.parameters()),
        "loss": float(log["loss"]),
        "steps": steps,
        "schedule": schedule,
        "batch": batch,
        "scenes": scenes,
        "seconds": round(time.monotonic() - start, 1),
    }
    record(work, "teacher", figures)


def save(folder: Path, flow: Flow, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write transformer, text encoder and tokenizer in their pipeline folders."""
    flow.transformer.save_pretrained(folder / "transformer")
    flow.text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")


def load(folder: Path) -> tuple[Flow, PreTrainedTokenizerBase]:
    """Read what `save` wrote."""
    from transformers import GemmaTokenizer

    text_encoder = Gemma2Model.from_pretrained(folder / "text_encoder", local_files_only=True)
    transformer = SanaTransformer2DModel.from_pretrained(folder / "transformer", local_files_only=True)
    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return Flow(text_encoder, transformer).eval(), tokenizer
