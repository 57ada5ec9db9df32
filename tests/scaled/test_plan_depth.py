"""Counts that are carried on from a few blocks, against counts of all of them."""

from __future__ import annotations

import functools
import gc
import weakref

import diffusers
import pytest

from hnkit.config import resolve_config
from hnkit.training.plan import depth
from hnkit.training.plan.cards import find_card
from hnkit.training.plan.count import DECODER, GENERATOR, F, _collected_after
from hnkit.training.plan.plan import Counter
from tests.scaled import tiny
from tests.scaled.test_plan import configured

CHANGES = (
    (),
    ("hypernetwork_checkpointing", "generator_checkpointing", "vae_checkpointing"),
    ("lora_autocast",),
    ("lora_autocast", "hypernetwork_checkpointing"),
)


LAYERS = {"sana": {"num_layers": 13}, "flux": {"num_layers": 23, "num_single_layers": 25}}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Checkpoints of tiny networks with many blocks: one list in SANA, two in FLUX."""
    root = tmp_path_factory.mktemp("deep")

    @functools.cache
    def made(name):
        pipe = tiny.PIPELINES[name]()
        pipe.transformer = type(pipe.transformer).from_config({**pipe.transformer.config, **LAYERS[name]})
        pipe.save_pretrained(root / name)
        return root / name

    return made


@pytest.mark.parametrize("name", ["sana", pytest.param("flux", marks=pytest.mark.slow)])
def test_counts_are_those_of_all_blocks(name, deep, monkeypatch):
    config = configured(name, deep, "backend.dtype=bfloat16", "backend.size=64")
    found, expected = Counter(config), Counter(config)
    passes = []
    shortened = depth.Depth.shortened
    monkeypatch.setattr(depth.Depth, "shortened", lambda *given: passes.append(given[1]) or shortened(*given))
    needs = [found.need(changes, rows, find_card("h100")) for changes in CHANGES for rows in (1, 2)]
    assert passes  # nobody counts what is not counted
    assert max(length for lengths in passes for length in lengths) == 5
    monkeypatch.setattr(depth, "LEAST", 1000)
    for need, whole in zip(
        needs, (expected.need(changes, rows, find_card("h100")) for changes in CHANGES for rows in (1, 2)), strict=True
    ):
        assert need.flops == whole.flops
        assert need.seconds == pytest.approx(whole.seconds, rel=1e-9)
        assert need.saved == pytest.approx(whole.saved, rel=1e-3)
        assert need.peak == pytest.approx(whole.peak, rel=1e-3)
        assert need.where == whole.where
    for changes in CHANGES:
        for part in (F, GENERATOR, DECODER):
            mine = tuple(change for change in changes if found.savers[change] == part)
            one, other = found.part(part, mine), expected.part(part, mine)
            assert one.forward == pytest.approx(other.forward, rel=1e-3)
            assert one.backward == pytest.approx(other.backward, rel=1e-3)


def test_blocks_that_are_not_alike_are_all_counted(deep):
    network = diffusers.DiffusionPipeline.from_pretrained(deep("sana")).transformer
    assert [len(blocks) for blocks in depth.Depth([network]).lists] == [13]
    assert depth.Depth([network]).pays
    del network.transformer_blocks[7].ff
    assert not depth.Depth([network]).lists
    assert not depth.Depth([network]).pays
    short = resolve_config(backend="toy")
    assert not depth.Depth([Counter(short).skeleton(()).backend.hypernetwork]).lists


class Ring:
    """Freed by a collection of cycles alone."""

    def __init__(self) -> None:
        self.me = self


@pytest.mark.parametrize("frozen", [False, True], ids=["as it is", "frozen by the caller"])
def test_a_trace_is_collected_and_what_was_there_before_is_left_alone(frozen):
    gc.collect()
    gc.freeze() if frozen else gc.unfreeze()
    before = weakref.ref(Ring())
    with _collected_after():
        assert not gc.isenabled()
        inside = weakref.ref(Ring())
    assert inside() is None
    assert gc.isenabled()
    assert (gc.get_freeze_count() > 0) == frozen
    if not frozen:
        assert before() is not None
        gc.collect()
    assert before() is None
    gc.freeze()  # as the tests began
