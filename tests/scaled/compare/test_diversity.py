"""Diversity metrics against their definitions written by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hnkit import InputError
from hnkit.scaled.compare.diversity import DinoSimilarity, Lpips, pixel_distance


def pairs(k):
    return list(itertools.combinations(range(k), 2))


def test_pixel_distance_is_the_mean_rms_over_pairs():
    images = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = sum(float((images[i] - images[j]).double().square().mean().sqrt()) for i, j in pairs(5)) / 10
    assert pixel_distance(images) == pytest.approx(expected, rel=1e-6)
    assert pixel_distance(images[:1].expand(4, -1, -1, -1)) == 0


def test_dino_similarity_is_the_mean_cosine_of_cls_states(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).eval()
    model.save_pretrained(tmp_path)
    images = torch.rand(3, 3, 28, 28)
    mean, std = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    with torch.no_grad():
        states = model(pixel_values=(images - mean) / std).last_hidden_state[:, 0]
    expected = sum(float(F.cosine_similarity(states[i], states[j], dim=0)) for i, j in pairs(3)) / 3
    assert DinoSimilarity(str(tmp_path), size=28)(images) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="DINO similarity"):
        DinoSimilarity(str(tmp_path / "none"))


def lpips_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384, 3), (8, 384, 256, 3), (10, 256, 256, 3))
    weights = {}
    for number, (index, a, b, k) in enumerate(sizes):
        weights[f"features.{index}.weight"] = torch.randn(b, a, k, k, generator=generator) / (a * k * k) ** 0.5
        weights[f"features.{index}.bias"] = 0.1 * torch.randn(b, generator=generator)
        weights[f"lin{number}.weight"] = torch.rand(1, b, 1, 1, generator=generator)
    return weights


def test_lpips_is_the_published_formula(tmp_path):
    weights = lpips_weights()
    save_file(weights, tmp_path / "lpips.safetensors")
    metric = Lpips(tmp_path / "lpips.safetensors")
    a, b = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)

    def features(image):
        shift, scale = torch.tensor((-0.030, -0.088, -0.188)), torch.tensor((0.458, 0.448, 0.450))
        x = ((2 * image - 1) - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
        found = []
        for index, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if index in (3, 6):
                x = F.max_pool2d(x, kernel_size=3, stride=2)
            x = F.relu(
                F.conv2d(x, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], stride, padding)
            )
            found.append(x)
        return found

    expected = 0.0
    for number, (p, q) in enumerate(zip(features(a), features(b), strict=True)):
        p, q = F.normalize(p, dim=1), F.normalize(q, dim=1)
        weighted = ((p - q) ** 2 * weights[f"lin{number}.weight"]).sum(1)
        expected += float(weighted.mean())
    assert float(metric.distances(a, b)) == pytest.approx(expected, rel=1e-4)
    assert float(metric.distances(a, a)) == 0
    assert metric(torch.cat([a, b])) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError, match="is not a file"):
        Lpips(tmp_path / "none.safetensors")
    del weights["lin4.weight"]
    save_file(weights, tmp_path / "short.safetensors")
    with pytest.raises(InputError, match=r"missing, first 'lin4\.weight'"):
        Lpips(tmp_path / "short.safetensors")
