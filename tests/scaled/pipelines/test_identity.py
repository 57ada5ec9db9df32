"""A model is known by the content of its files, wherever they lie."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hnkit.scaled.pipelines.identity import component_files, files_digest, stored_precision, weights_variant
from tests.scaled import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build("sana", tmp_path_factory.mktemp("identity") / "model")


def digest(backend) -> str:
    return backend.model_digest()


def test_a_moved_or_saved_again_model_is_the_same(model, make_backend, tmp_path):
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    found = digest(make_backend("sana", model_id=str(model)))
    assert digest(make_backend("sana", model_id=str(moved))) == found
    assert digest(make_backend("sana", model_id=str(moved), dtype="bfloat16", rank=2, seed=5)) == found
    for path in moved.rglob("config.json"):
        config = json.loads(path.read_text()) | {"_diffusers_version": "9.9", "transformers_version": "99"}
        path.write_text(json.dumps(config, indent=7))
    (moved / "README.md").write_text("a model")
    (moved / "transformer" / ".cache").write_text("x")
    assert digest(make_backend("sana", model_id=str(moved))) == found


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_any_component_that_is_exchanged_shows(component, model, make_backend, tmp_path):
    changed = shutil.copytree(model, tmp_path / "changed")
    before = digest(make_backend("sana", model_id=str(changed)))
    backend = make_backend("sana", model_id=str(changed))
    weights = list((changed / component).glob("*.safetensors"))
    if weights:
        tensors = load_file(weights[0])
        name = sorted(tensors)[-1]
        tensors[name].view(-1)[-1] *= 1.0001  # far below what a probe of a few weights sees
        save_file(tensors, weights[0], metadata={"format": "pt"})
    else:
        path = next(path for path in component_files(changed, component) if path.name.endswith("config.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"one": "more"}))
    assert digest(backend) != before


def test_the_files_of_one_precision_are_read(tmp_path):
    import torch

    folder = tmp_path / "transformer"
    folder.mkdir()
    half, full = folder / "w.fp16.safetensors", folder / "w.safetensors"
    save_file({"a": torch.ones(2).half()}, half)
    assert weights_variant(folder) == "fp16"
    assert component_files(tmp_path, "transformer", "fp16") == [half]
    assert stored_precision(tmp_path, "transformer", "fp16") == "F16"
    only = files_digest(tmp_path, ["transformer"], "fp16")
    save_file({"a": torch.ones(2)}, full)
    assert weights_variant(folder) is None
    assert component_files(tmp_path, "transformer") == [full]
    assert component_files(tmp_path, "transformer", "fp16") == [half]
    assert stored_precision(tmp_path, "transformer") == "F32"
    assert files_digest(tmp_path, ["transformer"], "fp16") == only != files_digest(tmp_path, ["transformer"])
    full.write_bytes(b"no weights")
    assert stored_precision(tmp_path, "transformer") is None
    assert stored_precision(tmp_path, "absent") is None
