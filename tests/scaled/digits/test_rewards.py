"""The scorer and legibility: formula, gradients, and that they prefer what they should."""

from __future__ import annotations

import random

import pytest
import torch

from hnkit import InputError
from hnkit.scaled.digits import scenes
from hnkit.scaled.digits.checkpoint import CLIP_FOLDER, model_folder
from hnkit.scaled.digits.rewards import Legibility, legibility, scorer
from hnkit.scaled.rewards.clip import ClipReward

PROMPTS = scenes.all_prompts()


@pytest.fixture(scope="module")
def clip() -> ClipReward:
    return scorer(model_folder())


@pytest.fixture(scope="module")
def legible() -> Legibility:
    return legibility(model_folder())


def pictures(n: int, seed: int, *, spoiled: bool = False) -> tuple[torch.Tensor, list[str]]:
    pytest.importorskip("sklearn")
    rng = random.Random(seed)
    prompts = rng.choices(list(PROMPTS.values()), k=n)
    drawn = [scenes.sample_scene(p, rng) for p in prompts]
    everywhere = torch.ones(n, 4, dtype=torch.bool) if spoiled else None
    images = scenes.render(drawn, scenes.load_scans("generator"), seed=seed, spoiled=everywhere)
    return images, [p.text for p in prompts]


def test_scorer_is_scaled_cosine_of_the_processors_input(clip: ClipReward) -> None:
    from transformers import CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images, texts = pictures(4, 1)
    images = (images * 255).round() / 255  # what an 8-bit picture can hold
    folder = model_folder() / CLIP_FOLDER
    pil = [(image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for image in images]
    pixel_values = CLIPImageProcessorPil.from_pretrained(folder)(pil, return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip.model(pixel_values=pixel_values, **tokens).logits_per_image.diagonal()
        assert torch.allclose(clip(images, texts), expected, atol=2e-4)


def test_scorer_prefers_the_true_sentence(clip: ClipReward) -> None:
    images, texts = pictures(300, 2)
    with torch.no_grad():
        right, wrong = clip(images, texts), clip(images, texts[1:] + texts[:1])
    assert float((right > wrong).float().mean()) > 0.95


def test_legibility_prefers_digits_to_fused_ones(legible: Legibility) -> None:
    (clean, texts), (fused, _) = pictures(200, 3), pictures(200, 3, spoiled=True)
    with torch.no_grad():
        a, b = legible(clean, texts), legible(fused, texts)
    assert float((a > b).float().mean()) > 0.9
    assert bool((a >= 0).all() and (a < 1).all())
    assert float(legible(torch.full((1, 3, 32, 32), 0.1), ["a three"])) < 0.02


@pytest.mark.parametrize("name", ["clip", "legible"])
def test_gradients_against_finite_differences(name: str, request: pytest.FixtureRequest) -> None:
    reward = request.getfixturevalue(name)
    images, texts = pictures(3, 4)
    # Texture, because a perfectly flat background sits on the kinks of the maximum and of the quantile.
    texture = 0.02 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    x = (0.95 * images + texture).requires_grad_()
    out = reward(x, texts)
    assert out.shape == (3,)
    assert out.dtype == torch.float32
    (gradient,) = torch.autograd.grad(out.sum(), x)
    direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    slope = (gradient * direction).sum((1, 2, 3))
    h = 3e-3
    with torch.no_grad():
        central = (reward(x + h * direction, texts) - reward(x - h * direction, texts)) / (2 * h)
    assert torch.allclose(central, slope, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("name", ["clip", "legible"])
def test_rows_are_independent_and_order_kept(name: str, request: pytest.FixtureRequest) -> None:
    reward = request.getfixturevalue(name)
    images, texts = pictures(6, 5)
    with torch.no_grad():
        together = reward(images, texts)
        alone = torch.cat([reward(images[i : i + 1], texts[i : i + 1]) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "legible"])
def test_wrong_shapes(name: str, request: pytest.FixtureRequest) -> None:
    reward = request.getfixturevalue(name)
    with pytest.raises(InputError, match=r"takes images \(n, 3, "):
        reward(torch.zeros(1, 1, 32, 32), ["a three"])
    with pytest.raises(InputError, match="one prompt per image"):
        reward(torch.zeros(2, 3, 32, 32), ["a three"])
