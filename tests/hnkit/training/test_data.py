"""The data of a run: pure functions of seed and position, whoever asks for which rows."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from hnkit.internal.seeds import derived_seed, seed_global
from hnkit.kl.estimators import draw_probes
from hnkit.training.data import SampleStream

STREAM = SampleStream(7, 6, (2, 3), torch.float64, [f"p{k}" for k in range(10)])


def test_rows_do_not_depend_on_how_the_batch_is_split():
    for stream in (
        STREAM,
        replace(STREAM, noise="fixed"),
        replace(STREAM, noise="step"),
        replace(STREAM, prompts=[""], noise="fixed"),
    ):
        for step in (0, 3):
            whole = stream.rows(step, 0, 6)
            for cuts in ((0, 3, 6), (0, 1, 2, 5, 6)):
                parts = [stream.rows(step, a, b) for a, b in itertools.pairwise(cuts)]
                assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
                assert sum((part.prompts for part in parts), ()) == whole.prompts
                assert sum((part.images for part in parts), ()) == whole.images


def test_images_share_what_is_random_in_them_where_they_share_their_noise_for_good():
    for noise in ("fresh", "step"):
        stream = replace(STREAM, noise=noise)
        images = [image for step in range(4) for image in stream.rows(step, 0, 6).images]
        assert len(set(images)) == len(images) == 24
    for stream in (replace(STREAM, noise="fixed"), replace(STREAM, noise="fixed", prompts=["only"])):
        seen: dict[tuple[str, int], torch.Tensor] = {}
        for step in range(4):
            batch = stream.rows(step, 0, 6)
            for image, noise in zip(zip(batch.prompts, batch.images, strict=True), batch.noise, strict=True):
                assert torch.equal(seen.setdefault(image, noise), noise)
        assert len({float(noise.sum()) for noise in seen.values()}) == len(seen)


def test_every_prompt_comes_once_an_epoch_in_an_order_of_its_own():
    rows = [prompt for step in range(10) for prompt in STREAM.rows(step, 0, 6).prompts]
    epochs = [rows[start : start + 10] for start in range(0, 60, 10)]
    assert all(Counter(epoch) == Counter(STREAM.prompts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert STREAM.epoch(5) == 3.0


def test_seed_step_and_purpose_all_matter():
    first = STREAM.rows(0, 0, 6).noise
    assert not torch.equal(first, STREAM.rows(1, 0, 6).noise)
    assert not torch.equal(first, replace(STREAM, seed=8).rows(0, 0, 6).noise)
    seeds = {derived_seed(1, "a", 1), derived_seed(1, "b", 1), derived_seed(11, "a"), derived_seed(1, "a", 1, 0)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_fixed_noise_belongs_to_its_prompt():
    stream = replace(STREAM, noise="fixed")
    seen: dict[str, torch.Tensor] = {}
    for step in range(5):
        batch = stream.rows(step, 0, 6)
        for prompt, noise in zip(batch.prompts, batch.noise, strict=True):
            assert torch.equal(seen.setdefault(prompt, noise), noise)
    assert len(seen) == 10
    alone = replace(STREAM, prompts=["only"], noise="fixed")
    assert torch.equal(alone.rows(0, 0, 6).noise, alone.rows(9, 0, 6).noise)
    assert not torch.equal(alone.rows(0, 0, 1).noise, alone.rows(0, 1, 2).noise)


def test_noise_of_a_step_is_shared_by_its_prompts_and_new_at_the_next():
    stream = replace(STREAM, noise="step")
    first, second = stream.rows(0, 0, 6), stream.rows(1, 0, 6)
    assert all(torch.equal(noise, first.noise[0]) for noise in first.noise)
    assert all(torch.equal(noise, second.noise[0]) for noise in second.noise)
    assert not torch.equal(first.noise, second.noise)
    assert len(set(first.prompts)) == 6
    assert first.prompts == STREAM.rows(0, 0, 6).prompts


def test_noise_is_standard_normal():
    """Mean and variance of 120,000 entries within five standard errors: false-alarm rate 1.2e-6."""
    noise = torch.cat([STREAM.rows(step, 0, 6).noise.flatten() for step in range(3334)])
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / count**0.5
    assert abs(float(noise.square().mean()) - 1) < 5 * (2 / count) ** 0.5


def test_probes_of_a_row_do_not_depend_on_the_split():
    whole = draw_probes(6, 6, "rademacher", STREAM.probe_generator(4, 0))
    for start in range(6):
        part = draw_probes(6 - start, 6, "rademacher", STREAM.probe_generator(4, start))
        assert torch.equal(part, whole[start:])


def test_global_generators_are_seeded():
    draws = []
    for _ in range(2):
        seed_global(3, "here", 1)
        draws.append((torch.rand(()).item(), random.random(), np.random.rand()))  # noqa: NPY002
    assert draws[0] == draws[1]
