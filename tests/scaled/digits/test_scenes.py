"""The grammar, the splits, the scene sampler and the renderer, each against an independent reading."""

from __future__ import annotations

import random
import re

import pytest
import torch

from hnkit import InputError
from hnkit.scaled.digits import scenes
from hnkit.scaled.digits.scenes import DIGITS, EMPTY, KINDS, PALETTE, Prompt, Scene

PROMPTS = scenes.all_prompts()
COLOURS = list(PALETTE)


def reference_holds(text: str, cells: list[tuple[int, int]]) -> bool:
    """A reading of the sentence that shares no code with `Prompt.holds`: regular expressions and coordinates."""
    objects = [(DIGITS[d], COLOURS[c], k % 2, k // 2) for k, (d, c) in enumerate(cells) if d != EMPTY]
    plural = dict(zip(scenes.PLURALS, DIGITS, strict=True))
    if match := re.fullmatch(r"(two|three|four) (\w+)", text):
        wanted = {"two": 2, "three": 3, "four": 4}[match[1]]
        return sum(name == plural[match[2]] for name, *_ in objects) == wanted
    nouns = re.findall(r"\ban? (?:(\w+) )?(\w+)(?= and| left| right| above| below|$)", text)
    chosen = [[o for o in objects if o[0] == name and hue in ("", o[1])] for hue, name in nouns]
    if len(nouns) == 1:
        return len(chosen[0]) > 0
    for a in chosen[0]:
        for b in chosen[1]:
            right, down = a[2] - b[2], a[3] - b[3]
            if (
                " and " in text
                or ("left of" in text and right < 0)
                or ("right of" in text and right > 0)
                or ("above" in text and down < 0)
                or ("below" in text and down > 0)
            ):
                return True
    return False


def random_scene(rng: random.Random, prompt: Prompt) -> Scene:
    """A scene near the prompt's truth: one it describes, sometimes with one cell changed."""
    cells = list(scenes.sample_scene(prompt, rng).cells)
    if rng.random() < 0.7:
        cells[rng.randrange(4)] = (rng.choice([EMPTY, *prompt.digits, rng.randrange(10)]), rng.randrange(6))
    return Scene(tuple(cells))


def test_truth_by_three_readings() -> None:
    rng = random.Random(1)
    prompts = rng.sample(list(PROMPTS.values()), 400) + [
        p for p in PROMPTS.values() if p.kind in KINDS[:1] + KINDS[2:3]
    ]
    drawn = [random_scene(rng, p) for p in prompts]
    expected = [reference_holds(p.text, list(s.cells)) for p, s in zip(prompts, drawn, strict=True)]
    assert 0.2 < sum(expected) / len(expected) < 0.9
    assert [p.holds(s.cells) for p, s in zip(prompts, drawn, strict=True)] == expected
    table = scenes.truth_table(torch.tensor([s.cells for s in drawn]), prompts)
    assert table.diagonal().tolist() == expected


def test_truth_table_off_diagonal() -> None:
    rng = random.Random(2)
    prompts = rng.sample(list(PROMPTS.values()), 150)
    drawn = [scenes.sample_scene(None, rng) for _ in range(150)]
    table = scenes.truth_table(torch.tensor([s.cells for s in drawn]), prompts)
    assert table.tolist() == [[p.holds(s.cells) for p in prompts] for s in drawn]
    assert table.any()


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_scenes_are_true_and_show_nothing_else(kind: str) -> None:
    rng = random.Random(3)
    for prompt in rng.sample([p for p in PROMPTS.values() if p.kind == kind], 10):
        for _ in range(20):
            cells = scenes.sample_scene(prompt, rng).cells
            assert reference_holds(prompt.text, list(cells))
            assert sorted(d for d, _ in cells if d != EMPTY) == sorted(prompt.digits * prompt.count)


def test_layout_and_unsaid_colours_are_uniform() -> None:
    rng = random.Random(4)
    drawn = [scenes.sample_scene(PROMPTS["a three"], rng).cells for _ in range(6000)]
    places = torch.bincount(torch.tensor([[d for d, _ in c].index(3) for c in drawn]), minlength=4)
    hues = torch.bincount(torch.tensor([next(h for d, h in c if d == 3) for c in drawn]), minlength=6)
    for counts in (places, hues):
        expected = 6000 / len(counts)
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 27.9  # 1e-5 false alarms at 3 (26.0) and below 1e-4 at 5 degrees of freedom


def test_text_round_trip_and_counts_per_kind() -> None:
    assert all(scenes.validate_prompt(text) == prompt == PROMPTS[prompt.text] for text, prompt in PROMPTS.items())
    sizes = {kind: sum(p.kind == kind for p in PROMPTS.values()) for kind in KINDS}
    assert sizes == {"single": 10, "two": 90, "counting": 30, "colours": 60, "position": 360, "attribution": 2700}
    assert scenes.validate_prompt("  A Red  FIVE ") == PROMPTS["a red five"]


def test_splits_of_sentences() -> None:
    training, evaluation = scenes.train_prompts(), scenes.eval_prompts()
    assert not set(training) & set(evaluation)
    assert len(set(training)) == len(training)
    assert len(set(evaluation)) == len(evaluation)
    assert {PROMPTS[t].kind for t in training} == {PROMPTS[t].kind for t in evaluation} == set(KINDS)
    named = {(d, c) for t in training for d, c in zip(PROMPTS[t].digits, PROMPTS[t].colours, strict=True)}
    for text in evaluation:
        p = PROMPTS[text]
        if p.kind in ("colours", "attribution"):
            assert any(pair not in named for pair in zip(p.digits, p.colours, strict=True))
        if p.kind in ("two", "position"):
            pairs = {frozenset(PROMPTS[t].digits) for t in training if PROMPTS[t].kind == p.kind}
            assert frozenset(p.digits) not in pairs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("a red three and a blue seven and", "at most 7"),
        ("a cat", "'cat'"),
        ("a purple five", "'purple'"),
        ("three", "cannot read"),
        ("a three and a three", "cannot read"),
        ("five threes", "cannot read"),
        ("a eight", "cannot read"),
        ("a red three and a red seven", "cannot read"),
    ],
)
def test_bad_prompts(text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        scenes.validate_prompt(text)
    assert "\n" not in str(caught.value)


def test_handwriting_splits_are_disjoint_and_whole() -> None:
    pytest.importorskip("sklearn")
    splits = [scenes.load_scans(split) for split in ("generator", "scorer", "judge")]
    rows = [tuple(image.flatten().tolist()) for scans in splits for image in scans.images]
    assert [len(s.labels) for s in splits] == [899, 449, 449]
    assert len(set(rows)) == len(rows) == 1797  # no scan occurs twice, so none is in two splits
    assert all(len(group) > 20 for s in splits for group in s.by_digit)


def test_rendering_puts_ink_where_the_scene_says() -> None:
    pytest.importorskip("sklearn")
    rng = random.Random(5)
    drawn = [scenes.sample_scene(None, rng) for _ in range(200)]
    images = scenes.render(drawn, scenes.load_scans("generator"), seed=6)
    assert images.shape == (200, 3, 32, 32)
    assert images.dtype == torch.float32
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    for k in range(4):
        row, col = divmod(k, 2)
        crop = images[:, :, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
        assert torch.equal(scenes.split_cells(images)[:, k], crop)
        bright = crop.amax((1, 2, 3)) > 0.5
        assert bright.tolist() == [s.cells[k][0] != EMPTY for s in drawn]
    again = scenes.render(drawn, scenes.load_scans("generator"), seed=6)
    other = scenes.render(drawn, scenes.load_scans("generator"), seed=7)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


def test_spoiled_cells_change_and_others_do_not() -> None:
    pytest.importorskip("sklearn")
    drawn = [scenes.sample_scene(PROMPTS["four threes"], random.Random(6)) for _ in range(20)]
    spoiled = torch.zeros(20, 4, dtype=torch.bool)
    spoiled[:, 1] = True
    scans = scenes.load_scans("scorer")
    clean = scenes.split_cells(scenes.render(drawn, scans, seed=1, spoiled=torch.zeros_like(spoiled)))
    fused = scenes.split_cells(scenes.render(drawn, scans, seed=1, spoiled=spoiled))
    changed = (clean - fused).abs().amax((2, 3, 4)) > 0.1
    assert torch.equal(changed, spoiled)
