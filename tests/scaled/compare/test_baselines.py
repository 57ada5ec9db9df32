"""Baselines on a small analytic backend: what they return, what they count, and that they are paired."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hnkit import InputError, NonFiniteError
from hnkit.internal.seeds import derived_seed, generator_for
from hnkit.maps import Condition
from hnkit.scaled.compare.baselines import (
    Base,
    BestOfN,
    Cost,
    HyperNoise,
    PromptOptimisation,
    ReNO,
    TextGenerationProposer,
)

DIM = 6


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.full((1, DIM), 0.25))

    def forward(self, x, condition):
        return self.b.expand(len(x), -1)


class Linear:
    """Images (n, 3, 1, 2) that are the noise plus the length of the prompt."""

    name = "linear"
    noise_shape = (DIM,)

    def __init__(self) -> None:
        self.hypernetwork = Shift()
        self.rows = 0

    def encode(self, prompts):
        for prompt in prompts:
            if "?" in prompt:
                raise InputError(f"prompt {prompt!r} is not understood")
        return Condition(tuple(prompts), {"length": torch.tensor([float(len(p)) for p in prompts])})

    def generate(self, noise, condition, steps=1):
        self.rows += steps * len(noise)
        for step in range(1, steps):  # a sampler of several steps adds noise on the way
            draws = [torch.randn(noise.shape[1:], generator=own) for own in condition.generators("sampler", step)]
            noise = noise + 0.3 * torch.stack(draws)
        return (noise + 0.01 * condition.tensors["length"][:, None]).view(-1, 3, 1, 2)


class Quadratic:
    """-(images - 1)^2 summed: its maximum is at images = 1."""

    name = "quadratic"

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.rows = 0

    def __call__(self, images, prompts):
        self.rows += len(images)
        return -(images.flatten(1) - 1).square().sum(1)


@pytest.fixture
def setting():
    noise = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))
    return Linear(), ["a", "bb", "ccc"], noise, [11, 12, 13]


def test_base_and_hypernoise_start_from_the_same_noise(setting):
    backend, prompts, noise, seeds = setting
    base = Base()(backend, prompts, noise, steps=2, seeds=seeds)
    steered = HyperNoise()(backend, prompts, noise, steps=2, seeds=seeds)
    assert torch.equal(base.noise, noise)
    torch.testing.assert_close(steered.images - base.images, torch.full_like(base.images, 0.25))
    assert (base.cost.generator, base.cost.hypernetwork) == (6, 0)
    assert (steered.cost.generator, steered.cost.hypernetwork) == (6, 3)
    assert backend.rows == 12


def test_best_of_n_is_the_best_of_what_it_drew(setting):
    backend, prompts, noise, seeds = setting
    reward = Quadratic()
    outcome = BestOfN(reward, n=7)(backend, prompts, noise, steps=1, seeds=seeds)
    others = [[derived_seed(seed, "candidate", k) for seed in seeds] for k in range(1, 7)]
    draws = [torch.stack([torch.randn(DIM, generator=generator_for(seed, "noise")) for seed in own]) for own in others]
    noises = torch.stack([noise, *draws])
    condition = backend.encode(prompts)
    scores = torch.stack([Quadratic()(backend.generate(x, condition), prompts) for x in noises])
    best = scores.argmax(0)
    for row in range(3):
        assert torch.equal(outcome.noise[row], noises[best[row], row])
    torch.testing.assert_close(Quadratic()(outcome.images, prompts), scores.max(0).values)
    assert outcome.cost.generator == 21
    assert outcome.cost.reward == reward.rows == 21


def test_reno_climbs_keeps_its_best_iterate_and_counts(setting):
    backend, prompts, noise, seeds = setting
    reward = Quadratic()
    outcome = ReNO(reward, iterations=40)(backend, prompts, noise, steps=1, seeds=seeds)
    before = Quadratic()(Base()(backend, prompts, noise, steps=1, seeds=seeds).images, prompts)
    after = Quadratic()(outcome.images, prompts)
    assert (after > before / 5).all()
    assert outcome.cost.generator == 40 * 3
    assert outcome.cost.gradients == 39 * 3
    one = ReNO(Quadratic(), iterations=1)(backend, prompts, noise, steps=1, seeds=seeds)
    assert torch.equal(one.noise, noise)


def test_reno_is_the_update_written_by_hand(setting):
    backend, prompts, noise, seeds = setting
    iterations, lr, momentum, clip, weight, reg = 4, 5.0, 0.9, 0.1, 2.0, 0.01
    outcome = ReNO(Quadratic(weight), iterations=iterations)(backend, prompts, noise, steps=1, seeds=seeds)
    for row in range(3):
        shift = 0.01 * len(prompts[row])
        x, velocity, best, best_score = noise[row].double(), torch.zeros(DIM).double(), None, -math.inf
        for _ in range(iterations):
            score = float(-(x + shift - 1).square().sum())
            if score > best_score:
                best, best_score = x.clone(), score
            gradient = weight * 2 * (x + shift - 1) + reg * (x - (DIM - 1) * x / x.square().sum())
            gradient = gradient * min(1.0, clip / (float(gradient.norm()) + 1e-6))
            velocity = momentum * velocity + gradient
            x = x - lr * (gradient + momentum * velocity)
        torch.testing.assert_close(outcome.noise[row].double(), best, atol=1e-5, rtol=1e-5)


def reworded(prompt, history, count, generator):
    return [prompt + "x" * int(torch.randint(9, (), generator=generator)) for _ in range(count)]


@pytest.mark.parametrize(
    "method",
    [
        Base(), HyperNoise(), BestOfN(Quadratic(), n=5), ReNO(Quadratic(), iterations=5),
        PromptOptimisation(Quadratic(), reworded, rounds=2, proposals=3),
    ],
    ids=lambda method: method.name,
)  # fmt: skip
def test_images_do_not_depend_on_their_batch_or_place(method, setting):
    backend, prompts, noise, seeds = setting
    together = method(backend, prompts, noise, steps=3, seeds=seeds)
    for rows in ([1], [2, 0]):
        part = [prompts[row] for row in rows], noise[rows]
        alone = method(backend, *part, steps=3, seeds=[seeds[row] for row in rows])
        torch.testing.assert_close(alone.images, together.images[rows])
        torch.testing.assert_close(alone.noise, together.noise[rows])
        assert alone.prompts == tuple(together.prompts[row] for row in rows)
    other = method(backend, prompts, noise, steps=3, seeds=[seed + 1 for seed in seeds])
    assert (other.images - together.images).flatten(1).abs().amax(1).min() > 1e-3


def test_prompt_optimisation_scores_against_the_original_and_skips_refused(setting):
    backend, prompts, noise, seeds = setting
    seen = []

    def propose(prompt, history, count, generator):
        assert history == sorted(history, key=lambda item: -item[1])
        seen.append((prompt, len(history)))
        return [prompt + "x" * (len(history) + 1), prompt + "?", prompt]

    reward = Quadratic()
    method = PromptOptimisation(reward, propose, rounds=3, proposals=5)
    outcome = method(backend, prompts, noise, steps=1, seeds=seeds)
    base = Base()(backend, prompts, noise, steps=1, seeds=seeds)
    assert (Quadratic()(outcome.images, prompts) >= Quadratic()(base.images, prompts)).all()
    assert torch.equal(outcome.noise, noise)
    assert outcome.cost.generator == outcome.cost.reward == reward.rows == 3 * 4
    assert outcome.cost.proposals == 3 * 3 * 3
    assert len(seen) == 9


def test_rewards_are_checked(setting):
    backend, prompts, noise, seeds = setting

    class Wrong(Quadratic):
        def __call__(self, images, prompts):
            return super().__call__(images, prompts)[:, None]

    class Undefined(Quadratic):
        def __call__(self, images, prompts):
            return super().__call__(images, prompts) * torch.tensor([1.0, math.nan, 1.0])

    with pytest.raises(InputError, match=r"returned shape \(3, 1\) for 3 images"):
        BestOfN(Wrong(), n=2)(backend, prompts, noise, steps=1, seeds=seeds)
    with pytest.raises(NonFiniteError, match="returned nan for 'bb'"):
        ReNO(Undefined(), iterations=2)(backend, prompts, noise, steps=1, seeds=seeds)


@pytest.mark.parametrize(
    "build",
    [
        lambda: BestOfN(Quadratic(), n=0),
        lambda: ReNO(Quadratic(), iterations=0),
        lambda: PromptOptimisation(Quadratic(), lambda *_: [], rounds=0),
        lambda: PromptOptimisation(Quadratic(), lambda *_: [], proposals=-1),
    ],
)
def test_sizes_are_checked(build):
    with pytest.raises(InputError, match="at least 1"):
        build()


def test_costs_add():
    assert Cost(1, 2, 3, 4, 5, 0.5) + Cost(10, 20, 30, 40, 50, 0.25) == Cost(11, 22, 33, 44, 55, 0.75)


def test_a_local_language_model_proposes(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "a", "red", "three", "seven", "and"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words), n_positions=128, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1
        )
    ).save_pretrained(tmp_path)
    proposer = TextGenerationProposer(str(tmp_path), max_new_tokens=8)
    first = proposer("a red three", [("a red three", 0.5)], 3, torch.Generator().manual_seed(3))
    again = proposer("a red three", [("a red three", 0.5)], 3, torch.Generator().manual_seed(3))
    assert first == again
    assert 0 < len(first) <= 3
    assert set(" ".join(first).split()) <= set(words)
    with pytest.raises(InputError, match="prompt proposer"):
        TextGenerationProposer(str(tmp_path / "none"))
