"""The training code: edits of sentences, guidance, the integrator, averages, and every stage end to end."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from hnkit.backend import backend_factory
from hnkit.config import resolve_config
from hnkit.scaled.digits.scenes import KIND_WEIGHTS, all_prompts, eval_prompts, train_prompts, training_mixture
from hnkit.scaled.digits.train import common, scorer, teacher
from hnkit.scaled.digits.train.tokenizers import clip_tokenizer, gemma_tokenizer

PROMPTS = all_prompts()


def test_edits_are_other_sentences_of_the_grammar() -> None:
    rng = random.Random(0)
    for prompt in rng.sample(list(PROMPTS.values()), 500):
        for _ in range(4):
            edited = scorer.edit(prompt, rng)
            assert edited != prompt
            assert PROMPTS[edited.text] == edited


def test_swaps_exchange_what_is_bound() -> None:
    swapped = {
        text: scorer.swap(PROMPTS[text]).text for text in ("a two left of a nine", "a red three and a blue seven")
    }
    assert list(swapped.values()) == ["a nine left of a two", "a blue three and a red seven"]


def test_sampler_keeps_to_training_prompts_and_proportions() -> None:
    drawn = common.PromptSampler(3)(8000)
    assert {p.text for p in drawn} <= set(train_prompts())
    counts, total = Counter(p.kind for p in drawn), sum(KIND_WEIGHTS.values())
    for kind, weight in KIND_WEIGHTS.items():
        share = weight / total
        deviation = (counts[kind] - 8000 * share) / math.sqrt(8000 * share * (1 - share))
        assert abs(deviation) < 4.5  # one fixed seed; 4e-5 false alarms in six looks


def test_the_mixture_has_the_kinds_in_the_proportions_of_the_generator_s_training() -> None:
    counts = Counter(PROMPTS[text].kind for text in training_mixture())
    assert set(training_mixture()) == set(train_prompts())
    assert Counter(training_mixture()).most_common()[-1][1] == 1, "the commonest kind stands there once"
    total = sum(KIND_WEIGHTS.values())
    for kind, weight in KIND_WEIGHTS.items():
        # a whole number of times, five at the least: a tenth of it at most
        assert counts[kind] / sum(counts.values()) == pytest.approx(weight / total, rel=0.1)


@pytest.mark.parametrize(("preset", "texts"), [("default", train_prompts()), ("long", training_mixture())])
def test_a_preset_trains_on_its_sentences(preset: str, texts: tuple[str, ...]) -> None:
    factory = backend_factory("digits")
    config = resolve_config(backend="digits", preset=preset)
    backend = factory.load(config.options)
    assert backend.prompts() == (list(texts), list(eval_prompts()))


def test_average_is_the_exponential_mean() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = common.Average(module, 0.5)
    expected = module.weight.item()
    for step, value in enumerate([1.0, -2.0, 4.0, 0.5, 7.0], start=1):
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(module)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert float(average.module.weight) == pytest.approx(expected, rel=1e-5)


def test_tokenizers_give_one_token_a_word() -> None:
    for tokenizer, extra in ((gemma_tokenizer(), 1), (clip_tokenizer(), 2)):
        ids = tokenizer(list(PROMPTS)).input_ids
        assert [len(row) for row in ids] == [len(text.split()) + extra for text in PROMPTS]
        assert len({tuple(row) for row in ids}) == len(PROMPTS)


class Exponential(teacher.Flow):
    """A stand-in whose velocity is y with a prompt and 3 y without, so that guidance and integration are known."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.text_encoder = lambda ids, attention_mask: (attention_mask.sum(1)[:, None, None].float(),)  # type: ignore[assignment]

    def velocity(self, y, s, states, mask, guidance):
        rate = torch.where(states.flatten() > 1, 1.0, 3.0)
        return rate.view(-1, 1, 1, 1) * y


def test_guided_integration_converges_to_the_exact_flow() -> None:
    noise = torch.randn(2, *teacher.LATENT, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([1.0, 2.0])  # rate 3 + w (1 - 3): 1 and -1
    exact = noise * torch.exp(torch.tensor([-1.0, 1.0])).view(-1, 1, 1, 1)
    errors = []
    for steps in (4, 8):
        path = teacher.sample(
            Exponential(), gemma_tokenizer(), ["a three"] * 2, noise, guidance=w, steps=steps, keep=True
        )
        assert path.shape == (2, steps + 1, *teacher.LATENT)
        assert torch.equal(path[:, 0], noise)
        errors.append(float((path[:, -1] - exact).abs().max()))
    assert errors[1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)  # the midpoint rule is of second order


@pytest.mark.slow
def test_every_stage_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from hnkit.scaled.digits import checkpoint
    from hnkit.scaled.digits.train import autoencoder, bundle, distil, evaluate, reader
    from hnkit.scaled.digits.train.pipeline import assemble

    work = tmp_path / "work"
    work.mkdir()
    autoencoder.train(work, seed=0, steps=2, batch=8)
    reader.train_judge(work, seed=0, steps=2)
    reader.train_legibility(work, seed=0, steps=2)
    scorer.train(work, seed=0, steps=2, batch=8)
    scorer.train(work, seed=0, steps=2, batch=8, resume=True)
    teacher.train(work, seed=0, steps=2, schedule=4, batch=8, scenes=16)
    distil.trajectories(work, seed=0, shard=0, n=8, chunk=4)
    distil.train(work, seed=0, steps=2, batch=8)
    judge = evaluate.Judge.load(work / checkpoint.JUDGE_FILE)
    common.record(work, "scores", {"student": evaluate.judge_student(assemble(work), judge, steps=1, seeds=2)})
    bundle.bundle(work, tmp_path / "model")
    assert checkpoint.verified_folder(tmp_path / "model") == tmp_path / "model"
