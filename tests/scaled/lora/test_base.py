"""An adapter knows its base by the files it was loaded from, else by a few weights up to their rounding."""

from __future__ import annotations

import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from hnkit import InputError
from hnkit.scaled.lora.base import BaseFiles, base_record, other_base, probe, same_probe
from tests.scaled.conftest import perturb

KINDS = (torch.float32, torch.bfloat16, torch.float16)


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 0.05


def as_loaded(values: torch.Tensor, *kinds: torch.dtype) -> list[float]:
    for kind in kinds:
        values = values.to(kind).float()
    return values.tolist()


@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("here", KINDS)
def test_a_probe_is_the_same_in_every_type_and_nothing_else_is(saved, here):
    for seed in range(20):
        w = weights(seed)
        assert same_probe(as_loaded(w, saved), as_loaded(w, here))
        assert same_probe(as_loaded(w, saved), as_loaded(w, saved, here))
        assert not same_probe(as_loaded(w, saved), as_loaded(1.009 * w, here))  # what was accepted before
        if torch.float32 in (saved, here) or saved == here:
            assert not same_probe(as_loaded(w, saved), as_loaded(1.002 * w, here))
            one = w.clone()
            one[17] *= 1.01
            assert not same_probe(as_loaded(w, saved), as_loaded(one, here))


@pytest.mark.parametrize("strange", [None, [], [1.0], ["a"] * 32, [[1.0]] * 32, {"a": 1}])
def test_a_strange_probe_is_another_model(strange):
    assert not same_probe(strange, weights().tolist())


def test_files_decide_where_both_are_known():
    base, other = torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)
    record = base_record(base, BaseFiles("a" * 64, "F32"))
    assert other_base(record, base, BaseFiles("a" * 64, "F32")) is None
    assert "SHA-256 aaaaaaaaaaaa..., here bbbbbbbbbbbb..." in other_base(record, base, BaseFiles("b" * 64, "F32"))
    half = torch.nn.Linear(40, 40)
    half.load_state_dict({name: value.half().float() for name, value in base.state_dict().items()})
    assert other_base(record, half, BaseFiles("b" * 64, "F16")) is None  # the same model in another precision
    assert other_base(record, other, BaseFiles("b" * 64, "F16"))
    assert other_base(record, base, None) is None  # a model that was made in memory
    assert other_base(record, other, None)
    assert other_base(base_record(base, None), base, BaseFiles("b" * 64, "F32")) is None  # an adapter that records none
    assert len(probe(base)) == 32


@pytest.fixture
def trained(make_backend, checkpoint, tmp_path):
    """The folder of a model, and of an adapter of it."""
    model = shutil.copytree(checkpoint("sana"), tmp_path / "model")
    backend = make_backend("sana", model_id=str(model))
    perturb(backend)
    backend.save_adapter(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_a_moved_base_is_accepted_and_an_exchanged_one_refused(trained, make_backend, tmp_path):
    model, adapter = trained
    moved = model.rename(tmp_path / "moved")
    make_backend("sana", model_id=str(moved)).load_adapter(adapter)
    path = next((moved / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    for name in sorted(tensors)[:1]:
        tensors[name] *= 1.0001
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=f"other weights, '{model}', than those of '{moved}' .SHA-256 .*, here"
    ) as said:
        make_backend("sana", model_id=str(moved)).load_adapter(adapter)
    assert "\n" not in str(said.value)


def test_the_same_model_in_half_precision_is_accepted(trained, make_backend, tmp_path):
    model, adapter = trained
    pipe = diffusers.SanaSprintPipeline.from_pretrained(model)
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    make_backend("sana", model_id=str(tmp_path / "half")).load_adapter(adapter)
    make_backend("sana", model_id=str(model), dtype="bfloat16").load_adapter(adapter)
