"""The bundled pipeline loads offline in plain diffusers, computes what it should, and draws what it is asked for."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, SanaSprintPipeline

from hnkit.scaled.digits.checkpoint import JUDGE_FILE, model_folder
from hnkit.scaled.digits.judge import Judge
from hnkit.scaled.digits.scenes import all_prompts, eval_prompts
from hnkit.scaled.digits.train.evaluate import judge_student, noises
from hnkit.scaled.digits.train.pipeline import generate


@pytest.fixture(scope="module")
def pipeline() -> SanaSprintPipeline:
    pipe = DiffusionPipeline.from_pretrained(model_folder(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_classes_and_size(pipeline: SanaSprintPipeline) -> None:
    assert type(pipeline) is SanaSprintPipeline
    names = {name: type(part).__name__ for name, part in pipeline.components.items()}
    assert names == {
        "tokenizer": "GemmaTokenizer",
        "text_encoder": "Gemma2Model",
        "vae": "AutoencoderDC",
        "transformer": "SanaTransformer2DModel",
        "scheduler": "SCMScheduler",
    }
    assert pipeline.transformer.config.guidance_embeds
    assert pipeline.transformer.config.in_channels * pipeline.transformer.config.sample_size**2 == 256


def test_every_sentence_is_one_token_a_word(pipeline: SanaSprintPipeline) -> None:
    texts = list(all_prompts())
    ids = pipeline.tokenizer(texts).input_ids
    assert [len(row) for row in ids] == [1 + len(text.split()) for text in texts]
    assert len({tuple(row) for row in ids}) == len(texts)
    assert pipeline.tokenizer.unk_token_id not in {i for row in ids for i in row}


def test_one_step_is_noise_minus_velocity(pipeline: SanaSprintPipeline) -> None:
    texts, x = list(eval_prompts()[:5]), noises(5, 3)
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(texts, max_sequence_length=8)
        u = pipeline.transformer(
            x,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            guidance=torch.full((5,), 0.45),
            timestep=torch.ones(5),
            return_dict=False,
        )[0]
        expected = pipeline.vae.decode((x - u) / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    images = generate(pipeline, texts, x, steps=1, guidance=4.5)
    assert torch.allclose(images, expected.clamp(0, 1), atol=1e-3)


def test_padding_does_not_matter(pipeline: SanaSprintPipeline) -> None:
    texts, x = ["a three", "a red three and a blue seven"], noises(2, 4)
    with torch.no_grad():
        out = [
            pipeline(
                texts,
                num_inference_steps=1,
                intermediate_timesteps=None,
                height=32,
                width=32,
                latents=x,
                output_type="latent",
                use_resolution_binning=False,
                complex_human_instruction=None,
                max_sequence_length=length,
            ).images
            for length in (8, 40)
        ]
    assert torch.allclose(out[0], out[1], atol=1e-4)


def test_repeatable_and_noise_matters(pipeline: SanaSprintPipeline) -> None:
    a, b = (generate(pipeline, ["two fours"], noises(1, 5), steps=1, guidance=4.5) for _ in range(2))
    c = generate(pipeline, ["two fours"], noises(1, 6), steps=1, guidance=4.5)
    assert torch.equal(a, b)
    assert float((a - c).abs().mean()) > 0.02


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_scores_match_the_figures(pipeline: SanaSprintPipeline, steps: int) -> None:
    judge = Judge.load(model_folder() / JUDGE_FILE)
    recorded = json.loads((model_folder() / "figures.json").read_text(encoding="utf-8"))["scores"]
    figure = recorded[f"student, {steps} step{'s' if steps > 1 else ''}"]["overall"]
    measured = judge_student(pipeline, judge, steps=steps, seeds=2)["overall"]["mean"]
    # Two of the recorded seeds again; sqrt(8 / 2) times the recorded error, at four sigma.
    assert abs(measured - figure["mean"]) < 4 * 2 * figure["stderr"]
    assert figure["mean"] > 0.4


def test_saturation_is_rare(pipeline: SanaSprintPipeline) -> None:
    images = generate(pipeline, eval_prompts(), noises(len(eval_prompts()), 7), steps=1, guidance=4.5)
    assert float((images == 1).float().mean()) < 0.02
