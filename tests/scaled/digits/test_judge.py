"""The judge: its colour reading, its rules, and that it sees what is there."""

from __future__ import annotations

import random

import pytest
import torch

from hnkit import InputError
from hnkit.scaled.digits import scenes
from hnkit.scaled.digits.checkpoint import JUDGE_FILE, model_folder
from hnkit.scaled.digits.judge import ILLEGIBLE, DigitReader, Judge, Verdict, read_colour
from hnkit.scaled.digits.scenes import EMPTY, PALETTE

PROMPTS = scenes.all_prompts()


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(model_folder() / JUDGE_FILE)


def test_colours_are_read_from_any_shade() -> None:
    ink = torch.zeros(6, 16, 16)
    ink[:, 4:12, 6:9] = 1
    for shade in (0.6, 0.8, 1.0):
        paint = torch.tensor(list(PALETTE.values()))[:, :, None, None] * shade
        cells = ink[:, None] * paint + (1 - ink[:, None]) * 0.05
        assert read_colour(cells, ink).tolist() == list(range(6))
    grey = ink[:1, None].expand(-1, 3, -1, -1)
    assert read_colour(grey, ink[:1]).tolist() == [-1]


def test_reads_unseen_handwriting(judge: Judge) -> None:
    pytest.importorskip("sklearn")
    rng = random.Random(11)
    drawn = [scenes.sample_scene(None, rng) for _ in range(400)]
    images = scenes.render(drawn, scenes.load_scans("generator"), seed=12)
    cells, _ = judge.read(images)
    truth = torch.tensor([s.cells for s in drawn])
    shown = truth[..., 0] != EMPTY
    assert float((cells[..., 0] == truth[..., 0])[shown].float().mean()) > 0.97
    assert float((cells[..., 1] == truth[..., 1])[shown].float().mean()) > 0.99
    assert bool((cells[..., 0] == EMPTY)[~shown].all())


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_right_scenes_pass_and_wrong_ones_fail(judge: Judge, kind: str) -> None:
    pytest.importorskip("sklearn")
    rng = random.Random(13)
    prompts = rng.choices([p for p in PROMPTS.values() if p.kind == kind], k=60)
    texts = [p.text for p in prompts]
    drawn = [scenes.sample_scene(p, rng) for p in prompts]
    images = scenes.render(drawn, scenes.load_scans("scorer"), seed=14)
    assert judge(images, texts).score > 0.9
    others = [texts[(i + 1) % 60] for i in range(60)]
    truth = [PROMPTS[t].holds(s.cells) for t, s in zip(others, drawn, strict=True)]
    agreement = (judge(images, others).correct.bool() == torch.tensor(truth)).float().mean()
    assert float(agreement) > 0.9


def test_fused_digits_and_bare_canvases_are_not_digits(judge: Judge) -> None:
    pytest.importorskip("sklearn")
    rng = random.Random(15)
    drawn = [scenes.sample_scene(PROMPTS["four threes"], rng) for _ in range(50)]
    everywhere = torch.ones(50, 4, dtype=torch.bool)
    images = scenes.render(drawn, scenes.load_scans("generator"), seed=16, spoiled=everywhere)
    clean = scenes.render(drawn, scenes.load_scans("generator"), seed=16)
    assert int(judge.read(images)[1].sum()) > 10 * int(judge.read(clean)[1].sum())
    flat = torch.full((3, 3, 32, 32), 0.1)
    assert bool((judge.read(flat)[0][..., 0] == EMPTY).all())
    assert int(judge.read(flat)[1].sum()) == 0


def test_threshold_classes() -> None:
    class Fixed(DigitReader):
        def forward(self, ink: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(ink), 11)
            logits[:, 7] = 1
            logits[2::4, 7] = -1
            logits[2::4, ILLEGIBLE] = 1
            return logits

    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 4:8, 4:8] = 0.9  # first cell: ink
    images[:, :, 4:8, 20:24] = 0.3  # second: too faint
    images[:, :, 20:24, 4:8] = 0.9  # third: ink, no digit
    cells, illegible = Judge(Fixed()).read(images)
    assert cells[0, :, 0].tolist() == [7, EMPTY, EMPTY, EMPTY]
    assert illegible.tolist() == [1]


def test_score_is_the_mean_of_the_kinds() -> None:
    verdict = Verdict(
        torch.tensor([1.0, 0.0, 0.0, 1.0]),
        torch.zeros(4, 4, 2),
        torch.zeros(4),
        ("single", "single", "single", "two"),
    )
    assert verdict.by_kind() == pytest.approx({"single": 1 / 3, "two": 1.0})
    assert verdict.score == pytest.approx(2 / 3)


def test_foreign_prompts_are_refused(judge: Judge) -> None:
    with pytest.raises(InputError, match="'dog'"):
        judge(torch.zeros(1, 3, 32, 32), ["a dog"])
