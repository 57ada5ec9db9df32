"""Adapters: the same images after a round trip, the published layout, and nothing damaged or foreign gets through."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hnkit import InputError, NoiseInjection
from hnkit.backend import backend_factory
from hnkit.scaled.lora.adapter import CONFIG, WEIGHTS, _config_checksum, adapter_options
from hnkit.scaled.lora.twin import lora_state
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, steered

PROMPTS = tiny.PROMPTS
fuzz = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory) -> Path:
    """An adapter of the tiny SANA, away from f = 0."""
    factory = backend_factory("sana")
    backend = factory.load(factory.options(**tiny.options("sana", checkpoint("sana"))))
    perturb(backend)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    backend.save_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def reader(checkpoint):
    factory = backend_factory("sana")
    return factory.load(factory.options(**tiny.options("sana", checkpoint("sana"))))


def rewritten(saved, folder, *, weights=None, config=None, published=True):
    """A copy of an adapter with changed files; `published` drops hnkit's block, as adapters by plain peft have none."""
    folder.mkdir()
    document = json.loads((saved / CONFIG).read_text())
    if published:
        document.pop("hnkit")
    (folder / CONFIG).write_text(json.dumps(document | (config or {})))
    save_file(load_file(saved / WEIGHTS) if weights is None else weights, folder / WEIGHTS)
    return folder


def refused(backend, folder) -> str:
    """Loading fails with one line and changes nothing."""
    before = {key: value.clone() for key, value in lora_state(backend._twin).items()}
    with pytest.raises(InputError) as caught:
        backend.load_adapter(folder)
    after = lora_state(backend._twin)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_what_is_written(saved, reader):
    config = json.loads((saved / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    assert config["hnkit"]["zero_base_layer"] == "proj_out"
    assert config["hnkit"]["objective"] == "hypernoise"
    assert config["base_model_name_or_path"] == reader.options.model_id
    keys = set(load_file(saved / WEIGHTS))
    assert keys == {f"base_model.model.{key}" for key in lora_state(reader._twin)}
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    model = reader.options.model_id
    assert adapter_options(saved) == {"rank": 4, "lora_alpha": 8.0, "guidance": 4.5, "model_id": model}
    options = backend_factory("sana").adapter_options(saved)
    assert (options.rank, options.lora_alpha, options.model_id) == (4, 8.0, model)


def test_plain_peft_loads_it(saved, reader):
    """peft reads files and keys; the zero base is the one thing it does not know of."""
    import peft

    from hnkit.scaled.lora.twin import share_weights

    reader.load_adapter(saved)
    network = share_weights(reader._base)
    with pytest.warns(UserWarning, match="hnkit"):
        model = peft.PeftModel.from_pretrained(network, saved)
    state = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    own = lora_state(reader._twin)
    assert {key.removeprefix("base_model.model.").replace(".default.", ".") for key in state} == set(own)
    noise, condition = noise_for(reader), reader.encode(PROMPTS)
    last = model.base_model.model.proj_out
    with torch.no_grad():
        theirs = reader.first_step.output(model, noise, condition, 4.5, reader.options.sides)
        last.base_layer.weight.detach_()
        frozen = {}
        last.base_layer.register_forward_hook(lambda module, inputs, output: frozen.update(output=output))
        reader.first_step.output(model, noise, condition, 4.5, reader.options.sides)
        base_part = frozen["output"].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        torch.testing.assert_close(theirs - base_part, reader.hypernetwork(noise, condition), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["prefix", "bare", "named", "bare and named"])
def test_published_layout(layout, saved, reader, tmp_path):
    def rename(key):
        key = key if "bare" not in layout else key.removeprefix("base_model.model.")
        return key if "named" not in layout else key.replace(".weight", ".hypernoise_adapter.weight")

    weights = {rename(key): value for key, value in load_file(saved / WEIGHTS).items()}
    folder = rewritten(saved, tmp_path / "published", weights=weights)
    noise, condition = noise_for(reader), reader.encode(PROMPTS)
    reader.load_adapter(saved)
    expected = steered(reader, noise, condition)
    with torch.no_grad():
        for value in lora_state(reader._twin).values():
            value.zero_()
    reader.load_adapter(folder)
    assert torch.equal(steered(reader, noise, condition), expected)


def test_published_layout_with_depthwise_lora(saved, make_backend, tmp_path):
    """Dense LoRA convolutions beside depthwise ones, as peft once made them, compared with the sum written out."""
    backend = make_backend("sana")
    weights = load_file(saved / WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    for layer, module in backend._base.named_modules():
        if getattr(module, "groups", 1) > 1:
            shapes = {"A": (4, module.in_channels, *module.kernel_size), "B": (module.out_channels, 4, 1, 1)}
            for side, shape in shapes.items():
                value = 0.3 * torch.randn(shape, generator=generator)
                weights[f"base_model.model.{layer}.lora_{side}.weight"] = value
    folder = rewritten(saved, tmp_path / "published", weights=weights)
    noise, condition = noise_for(backend), backend.encode(PROMPTS)
    backend.load_adapter(folder)
    found = steered(backend, noise, condition)

    by_hand = make_backend("sana")
    by_hand.load_adapter(saved)
    without = steered(by_hand, noise, condition)
    for layer, module in by_hand._twin.named_modules():
        if getattr(module, "groups", 1) > 1:
            A, B = (weights[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")

            def add(module, inputs, output, A=A, B=B):
                inner = torch.nn.functional.conv2d(inputs[0], A, stride=module.stride, padding=module.padding)
                return output + 2.0 * torch.nn.functional.conv2d(inner, B)

            module.register_forward_hook(add)
    torch.testing.assert_close(steered(by_hand, noise, condition), found, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(without, found, atol=1e-4)

    backend.save_adapter(tmp_path / "again")
    again = make_backend("sana")
    again.load_adapter(tmp_path / "again")
    assert torch.equal(steered(again, noise, condition), found)
    assert all(m.groups > 1 for k, m in again._twin.named_modules() if k.endswith("conv_depth.base_layer"))


@fuzz
@given(data=st.data())
def test_truncated_anywhere(data, saved, reader, tmp_path_factory):
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("cut") / "a")
    path = folder / data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    if path.name == CONFIG and path.read_bytes() == content.rstrip():
        return  # the final newline says nothing
    refused(reader, folder)


@fuzz
@given(data=st.data())
def test_flipped_bits(data, saved, reader, tmp_path_factory):
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("flip") / "a")
    path = folder / data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    try:
        same = json.loads(content) == json.loads((saved / CONFIG).read_bytes())
    except ValueError:
        same = False
    if path.name == CONFIG and same:
        return  # one white space for another
    refused(reader, folder)


@fuzz
@given(data=st.data())
def test_published_layout_damaged(data, saved, reader, tmp_path_factory):
    """Without checksums: a truncated file, a changed header or a wrong key must still never load silently."""
    folder = rewritten(saved, tmp_path_factory.mktemp("bare") / "a")
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content) - 1))]))
        refused(reader, folder)
        return
    position = data.draw(st.integers(0, header - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 6))
    path.write_bytes(bytes(content))
    reference = load_file(saved / WEIGHTS)
    with contextlib.suppress(InputError):
        reader.load_adapter(folder)
        # No error: the flip was in the metadata, or swapped nothing that matters.
        for key, value in lora_state(reader._twin).items():
            assert torch.equal(value, reference[f"base_model.model.{key}"])


def test_foreign_missing_and_doubled_keys(saved, reader, tmp_path):
    weights = load_file(saved / WEIGHTS)
    one = sorted(weights)[0]
    cases = {
        "foreign": (weights | {"base_model.model.elsewhere.lora_A.weight": torch.zeros(4, 8)}, "elsewhere"),
        "not-lora": (weights | {"proj_out.weight": torch.zeros(4, 8)}, "only lora_A and lora_B"),
        "missing": ({key: value for key, value in weights.items() if key != one}, "not complete"),
        "layer": ({key: v for key, v in weights.items() if "proj_out" not in key}, "no LoRA for 'proj_out'"),
        "doubled": (weights | {one.removeprefix("base_model.model."): weights[one].clone()}, "two tensors for"),
        "shape": (weights | {one: torch.zeros(4, 3, *weights[one].shape[2:])}, "another base model"),
        "integer": (weights | {one: weights[one].long()}, "is no LoRA weight"),
        "nan": (weights | {one: weights[one] * float("nan")}, "not finite"),
        "empty": ({}, "has no LoRA weights"),
        "fp8": (weights | {one: weights[one].to(torch.float8_e4m3fn)}, "is no LoRA weight"),
    }
    for name, (content, message) in cases.items():
        assert message in refused(reader, rewritten(saved, tmp_path / name, weights=content)), name


def test_other_rank_alpha_and_kind(saved, reader, make_backend, tmp_path):
    assert "set backend.rank = 4 and backend.lora_alpha = 8" in refused(make_backend("sana", rank=2), saved)
    assert "set backend.rank = 4 and backend.lora_alpha = 8" in refused(make_backend("sana", lora_alpha=4.0), saved)
    changes = {
        "r": ({"r": 2, "lora_alpha": 4}, "rank 2"),
        "no-rank": ({"r": None}, "r = None"),
        "bool": ({"r": True}, "r = True"),
        "alpha": ({"lora_alpha": -1}, "lora_alpha = -1"),
        "type": ({"peft_type": "LOKR"}, "'LOKR'"),
        "dora": ({"use_dora": True}, "use_dora"),
        "bias": ({"bias": "all"}, "bias"),
        "pattern": ({"rank_pattern": {"proj_out": 8}}, "rank_pattern"),
    }
    for name, (config, message) in changes.items():
        assert message in refused(reader, rewritten(saved, tmp_path / name, config=config)), name
    held = make_backend("sana", rank=2, lora_alpha=8.0)
    config = {"r": 2, "lora_alpha": 8}
    message = refused(held, rewritten(saved, tmp_path / "inside", config=config))
    assert "has rank 4, adapter_config.json says 2" in message
    assert "does not say that it is a direct" in refused(reader.direct(), rewritten(saved, tmp_path / "plain"))


def test_other_base(saved, make_backend, tmp_path):
    assert "trained on other weights" in refused(make_backend("sana", seed=1), saved)
    flux = make_backend("flux")
    assert "SanaTransformer2DModel" in refused(flux, saved)
    assert "\n" not in refused(flux, rewritten(saved, tmp_path / "published"))
    backend = make_backend("sana", dtype="bfloat16")
    backend.load_adapter(saved)  # the same base in another type is the same base


def test_missing_files_and_pickles(saved, reader, tmp_path):
    assert "no adapter at" in refused(reader, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in refused(reader, tmp_path / "empty")
    pickled = shutil.copytree(saved, tmp_path / "pickled")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    assert "holds more than tensors" in refused(reader, pickled)
    listed = shutil.copytree(saved, tmp_path / "list")
    (listed / CONFIG).write_text("[1]")
    assert "not a JSON object" in refused(reader, listed)
    block = shutil.copytree(saved, tmp_path / "block")
    document = json.loads((block / CONFIG).read_text())
    (block / CONFIG).write_text(json.dumps(document | {"hnkit": {"format": 99}}))
    assert "another format" in refused(reader, block)


def test_nothing_is_overwritten(saved, reader, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        reader.save_adapter(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]
    with pytest.raises(InputError, match="cannot be written"):
        reader.save_adapter(tmp_path / "full" / "note.txt")


def test_interrupted_save_is_noticed(reader, tmp_path, monkeypatch):
    import hnkit.scaled.lora.adapter

    real, calls = hnkit.scaled.lora.adapter.atomic_write, []

    def fail_second(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(hnkit.scaled.lora.adapter, "atomic_write", fail_second)
    with pytest.raises(InputError, match="No space left"):
        reader.save_adapter(tmp_path / "a")
    assert "interrupted" in refused(reader, tmp_path / "a")


def test_injected_noise_is_kept_and_never_dropped(reader, make_backend, tmp_path):
    backend = make_backend("sana")
    perturb(backend)
    backend.injection = NoiseInjection(0.25, 3.0)
    backend.save_adapter(tmp_path / "a")
    twin = make_backend("sana")
    twin.load_adapter(tmp_path / "a")
    assert twin.injection == NoiseInjection(0.25, 3.0)
    document = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert document["hnkit"]["format"] == 2  # which a reader that does not know of injected noise refuses
    for name, block in {
        "dropped": {key: value for key, value in document["hnkit"].items() if key != "injection"},
        "older": document["hnkit"] | {"format": 1},
        "share": document["hnkit"] | {"injection": {"share": 1.5, "max_delta": None}},
        "more": document["hnkit"] | {"injection": {"share": 0.5, "max_delta": None, "seed": 1}},
    }.items():
        block = block | {"config_sha256": _config_checksum(document | {"hnkit": block})}
        message = refused(reader, rewritten(tmp_path / "a", tmp_path / name, config={"hnkit": block}, published=False))
        assert ("format" in message) == (name in ("dropped", "older"))
    perturb(backend)
    backend.injection = None
    backend.save_adapter(tmp_path / "plain")
    twin.load_adapter(tmp_path / "plain")
    assert twin.injection is None
