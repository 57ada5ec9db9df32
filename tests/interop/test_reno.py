"""ReNO, the test-time baseline: github.com/ExplainableML/ReNO at bd6f6acfe369ee9c90e2c97c536113bdc1b6dcdb.

Rules read there, in our words:

- `arguments.py` 23 to 37, 45 to 94: SGD, learning rate 5, 50 iterations, one sampler step, gradient norm clipped at
  0.1; weights 5 (HPS), 1 (ImageReward), 0.01 (CLIP), 0.05 (PickScore), regularisation 0.01; no aesthetic score.
- `training/optim.py` 10: momentum 0.9, and Nesterov's unless it is switched off; no weight decay, no schedule.
- `training/trainer.py` 99 to 108: the loss is the weighted sum of constants minus the scores (`rewards/hps.py` 56: 1,
  `imagereward.py` 30: 2, `clip.py` 49 to 53: 100, `pickscore.py` 48 to 54: 30, the last two with the exponential of the
  logit scale); 63 and 109 to 118: plus 0.01 (|x|^2 / 2 - (d - 1) log |x|), d the number of entries of one latent.
- 121 to 125: the image that is returned is that of the iteration whose weighted loss *without* the regulariser was the
  lowest, of equals the first. It is the image of that iteration, which is not made again.
- 126 to 129: the last iteration takes no step: 50 evaluations forward and 49 back. The norm of the gradient is that of
  the one latent (`clip_grad_norm_`, which adds 1e-6 to it), with the regulariser in it.
- 68: the sampler's generator has the same seed in every iteration.
- `rewards/utils.py` 69 to 79 with torchvision 0.18 (`environment.yml` 9): bicubic to 224 with antialiasing, the crop
  from the middle, CLIP's mean and deviation.
- `main.py` 77 to 98, 111: latents are standard normal, one image at a time, in half precision (`arguments.py` 128).

The loop below is written from these rules, with torch's own optimiser and clipping.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from hnkit.maps import Condition
from hnkit.rewards import CallableReward, RewardSum
from hnkit.scaled.compare.baselines import ReNO
from hnkit.scaled.pipelines.factory import PREFERENCES
from hnkit.scaled.rewards.preprocess import preprocess

SHAPE = (2, 3, 4)
WEIGHTS = {"hps": 5.0, "imagereward": 1.0, "clip": 0.01, "pickscore": 0.05}
CONSTANTS = {"hps": 1.0, "imagereward": 2.0, "clip": 100.0, "pickscore": 30.0}
N_ITERS, LR, CLIP, REGULARISATION = 50, 5.0, 0.1, 0.01


class Generator:
    """A small nonlinear one-step generator; it counts what it is asked."""

    name, noise_shape = "small", SHAPE

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12), nn.Sigmoid())
        self.network.requires_grad_(False)
        self.hypernetwork = nn.Identity()
        self.rows = 0

    def encode(self, prompts):
        return Condition(tuple(prompts), {})

    def generate(self, noise, condition, steps=1):
        self.rows += len(noise)
        return self.network(noise).view(-1, 3, 2, 2)


def score(name: str, images: Tensor) -> Tensor:
    """Four different scores of an image, in the ranges of the real ones."""
    x = images.flatten(1)
    return {
        "hps": 0.3 * torch.cos(3 * x).mean(1),
        "imagereward": 2 * torch.sin(4 * x[:, :5]).mean(1),
        "clip": 100 * (0.3 - (x - 0.7).square().mean(1)),
        "pickscore": 30 * (0.2 + 0.1 * x[:, 3] * x[:, 5]),
    }[name]


def published(generator: Generator, noise: Tensor) -> tuple[Tensor, Tensor, int]:
    """The image, its latent and the iteration that `LatentNoiseTrainer.train` returns for one latent `(1, *shape)`."""
    latents = nn.Parameter(noise.clone())
    optimizer = torch.optim.SGD([latents], lr=LR, nesterov=True, momentum=0.9)
    best_loss, best = math.inf, None
    dimension = math.prod(latents.shape[1:])
    for iteration in range(N_ITERS):
        optimizer.zero_grad()
        image = generator.generate(latents, None)
        total = sum(weight * (CONSTANTS[name] - score(name, image)).mean() for name, weight in WEIGHTS.items())
        reward_loss = total.item()
        norm = torch.linalg.vector_norm(latents)
        total = total + REGULARISATION * (0.5 * norm**2 - (dimension - 1) * torch.log(norm))
        if reward_loss < best_loss:
            best_loss, best = reward_loss, (image.detach(), latents.detach().clone(), iteration)
        if iteration != N_ITERS - 1:
            total.backward()
            nn.utils.clip_grad_norm_(latents, CLIP)
            optimizer.step()
    return best


def reward() -> CallableReward:
    """The weighted sum as `hnkit compare` hands it to its baselines."""
    parts = [CallableReward(name, weight, lambda i, _, n=name: score(n, i)) for name, weight in WEIGHTS.items()]
    return CallableReward("reward", 1.0, RewardSum(parts))


def test_the_baseline_is_the_published_loop_row_by_row():
    noise = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(2))
    prompts = list("abcde")
    outcome = ReNO(reward())(Generator(), prompts, noise, steps=1, seeds=range(len(noise)))
    found = [published(Generator(), row[None]) for row in noise]
    torch.testing.assert_close(outcome.images, torch.cat([image for image, _, _ in found]), atol=1e-5, rtol=0)
    torch.testing.assert_close(outcome.noise, torch.cat([latent for _, latent, _ in found]), atol=1e-4, rtol=0)
    assert len({iteration for _, _, iteration in found}) > 1, "rows end at iterations of their own"
    assert any(iteration > 0 for _, _, iteration in found)


def test_it_costs_what_the_published_loop_costs():
    generator, noise = Generator(), torch.randn(2, *SHAPE)
    cost = ReNO(reward())(generator, ["a", "b"], noise, steps=1, seeds=range(len(noise))).cost
    assert (cost.generator, cost.reward, cost.gradients) == (2 * 50, 2 * 50, 2 * 49)
    assert generator.rows == 2 * 50, "the best image is kept, not made again"


def test_of_equals_the_first_is_kept_and_the_regulariser_has_no_say():
    flat = CallableReward("flat", 1.0, lambda images, _: 0 * images.sum((1, 2, 3)))
    noise = 3 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    outcome = ReNO(flat, iterations=4)(Generator(), ["a", "b"], noise, steps=1, seeds=range(len(noise)))
    assert torch.equal(outcome.noise, noise)


def test_a_reward_that_counts_against_is_minimised():
    """The published choice is by the weighted loss: a negative weight turns it round."""
    bright = CallableReward("bright", -1.0, lambda images, _: images.mean((1, 2, 3)))
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))
    outcome = ReNO(bright)(Generator(), ["a"] * 3, noise, steps=1, seeds=range(len(noise)))
    base = Generator().generate(noise, None).mean((1, 2, 3))
    assert (outcome.images.mean((1, 2, 3)) < base - 0.01).all()


def test_the_settings_are_the_published_defaults():
    settings = {item.name: item.default for item in dataclasses.fields(ReNO)}
    assert {key: settings[key] for key in ("iterations", "learning_rate", "momentum", "clip", "regularisation")} == {
        "iterations": N_ITERS, "learning_rate": LR, "momentum": 0.9, "clip": CLIP, "regularisation": REGULARISATION,
    }  # fmt: skip
    assert {
        "rewards.hpsv2": WEIGHTS["hps"], "rewards.imagereward": WEIGHTS["imagereward"],
        "rewards.clipscore": WEIGHTS["clip"], "rewards.pickscore": WEIGHTS["pickscore"],
    } == PREFERENCES  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(40, 40), (37, 61), (90, 64)])
def test_images_are_prepared_as_by_its_transform(height, width):
    """Against Pillow-free arithmetic: the shorter side to 224, torch's antialiased bicubic, the rounded middle."""
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(6))
    side = min(height, width)
    size = (224, int(224 * width / side)) if height <= width else (int(224 * height / side), 224)
    resized = nn.functional.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
    top, left = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = (resized[:, :, top : top + 224, left : left + 224] - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(preprocess(images, 224), expected, atol=1e-5, rtol=0)
