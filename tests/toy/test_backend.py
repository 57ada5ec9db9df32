"""The toy backend: zero at the start, certified by its layers, adapters that load whole or not at all."""

from __future__ import annotations

import json
import re

import pytest
import torch

from hnkit import InputError, NoiseInjection
from hnkit.adapters import load_trained
from hnkit.backend import Backend, Reward, backend_factory
from hnkit.config import resolve_config
from hnkit.lipschitz import certify_injective, lipschitz_upper
from hnkit.toy import PROBLEMS
from hnkit.toy.backend import FACTORY, ToyOptions


def load(**options):
    return FACTORY.load(ToyOptions(**options))


def shaken(backend, size=0.05):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backend.hypernetwork.parameters():
            parameter.add_(size * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return backend


@pytest.mark.parametrize("hypernetwork", ["affine", "mlp"])
@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_is_a_backend_that_starts_at_zero(name, hypernetwork):
    backend = load(problem=name, hypernetwork=hypernetwork, width=8)
    assert isinstance(backend, Backend)
    assert isinstance(backend.default_reward, Reward)
    train, heldout = backend.prompts()
    assert not set(train) & set(heldout)
    condition = backend.encode(["a", "b", "c"])
    x = torch.randn(3, *backend.noise_shape, generator=torch.Generator().manual_seed(1))
    delta = backend.hypernetwork(x, condition)
    assert delta.dtype == torch.float64
    assert not bool(delta.any())
    y = backend.generate(x.double(), condition)
    torch.testing.assert_close(y, backend.problem.generate(x.double()))
    torch.testing.assert_close(backend.default_reward(y, condition.prompts), backend.problem.reward(y))
    with pytest.raises(InputError, match="2 sampler steps"):
        backend.generate(x, condition, steps=2)


def test_it_is_installed():
    assert backend_factory("toy") is FACTORY
    assert "linear-gaussian" in FACTORY.status()


def test_building_one_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = load(hypernetwork="mlp")
    assert torch.equal(torch.rand(3), expected)
    again, other = load(hypernetwork="mlp"), load(hypernetwork="mlp", seed=1)
    state = first.hypernetwork.state_dict()
    assert all(torch.equal(state[key], value) for key, value in again.hypernetwork.state_dict().items())
    assert not all(torch.equal(state[key], value) for key, value in other.hypernetwork.state_dict().items())


@pytest.mark.parametrize("hypernetwork", ["affine", "mlp"])
def test_the_network_can_be_certified(hypernetwork):
    backend = shaken(load(hypernetwork=hypernetwork, width=8))
    body = backend.map_for([])
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(body(x), backend.hypernetwork(x, backend.encode(["a"] * 4)))
    certificate = lipschitz_upper(body)
    assert certificate.kind == "certified"
    assert certificate.value < 1
    assert certify_injective(body).status == "certified"


@pytest.mark.parametrize("hypernetwork", ["affine", "mlp"])
def test_an_adapter_comes_back_bit_for_bit(tmp_path, hypernetwork):
    backend = shaken(load(hypernetwork=hypernetwork, width=8, depth=1))
    folder = tmp_path / "adapter"
    backend.save_adapter(folder)
    options = FACTORY.adapter_options(folder)
    assert options == backend.options
    twin = FACTORY.load(options)
    twin.load_adapter(folder)
    x = torch.ones(2, 6, dtype=torch.float64)
    assert torch.equal(twin.hypernetwork(x), backend.hypernetwork(x))
    with pytest.raises(InputError, match="not empty"):
        backend.save_adapter(folder)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"problem": "mixture"}, "problem"),
        ({"hypernetwork": "affine"}, "hypernetwork"),
        ({"width": 9}, "width"),
        ({"depth": 1}, "depth"),
    ],
)
def test_an_adapter_of_another_backend_is_refused_by_key(tmp_path, other, key):
    mine = {"hypernetwork": "mlp", "width": 8, "depth": 2}
    shaken(load(**mine)).save_adapter(tmp_path / "a")
    backend = load(**{**mine, **other})
    before = [parameter.clone() for parameter in backend.hypernetwork.parameters()]
    with pytest.raises(InputError, match=f"{key} = "):
        backend.load_adapter(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(before, backend.hypernetwork.parameters(), strict=True))


def test_every_truncation_and_a_flipped_bit_are_noticed(tmp_path):
    folder = tmp_path / "a"
    backend = shaken(load())
    backend.save_adapter(folder)
    for name in ("adapter.safetensors", "adapter.json"):
        whole = (folder / name).read_bytes()
        flipped = bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]])
        for damaged in (b"", whole[:1], whole[: len(whole) // 2], whole[:-2], flipped):
            (folder / name).write_bytes(damaged)
            with pytest.raises(InputError):
                load().load_adapter(folder)
        (folder / name).write_bytes(whole)
    load().load_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "peft"}, "format"),
        ({"problem": 3}, "problem"),
        ({"problem": "moon"}, "moon"),
        ({"width": True}, "width"),
        ({"depth": 0}, "depth"),
    ],
)
def test_a_foreign_config_is_refused(tmp_path, change, message):
    load().save_adapter(tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load().load_adapter(tmp_path / "a")


def rewrite(folder, tensors):
    """Replace the weights and correct the checksum, so that only the content is wrong."""
    import hashlib

    from safetensors.torch import save

    data = save(tensors)
    (folder / "adapter.safetensors").write_bytes(data)
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}))


def test_wrong_tensors_are_refused(tmp_path):
    backend = load()
    folder = tmp_path / "a"
    backend.save_adapter(folder)
    state = dict(backend.hypernetwork.state_dict())
    key = "body.0.weight"
    cases = [
        ({k: v for k, v in state.items() if k != key}, f"lacks {key}"),
        ({**state, "extra": torch.zeros(1)}, "foreign key extra"),
        ({**state, key: torch.zeros(5, 6, dtype=torch.float64)}, key),
        ({**state, key: torch.zeros(6, 6)}, key),
        ({**state, key: torch.full((6, 6), torch.nan, dtype=torch.float64)}, "not finite"),
    ]
    for tensors, message in cases:
        rewrite(folder, tensors)
        with pytest.raises(InputError, match=message):
            backend.load_adapter(folder)


def test_a_missing_adapter_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match=r"adapter\.json"):
        load().load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "options", [{"problem": "moon"}, {"hypernetwork": "conv"}, {"width": 0}, {"depth": 0}, {"seed": -1}]
)
def test_bad_options(options):
    with pytest.raises(InputError, match=next(iter(options))):
        ToyOptions(**options)


@pytest.mark.parametrize("preset", sorted(FACTORY.presets))
def test_presets_resolve(preset):
    config = resolve_config(backend="toy", preset=preset)
    assert config.options.problem in PROBLEMS
    assert isinstance(config.options, ToyOptions)


def test_injected_noise_is_kept_in_the_adapter(tmp_path):
    backend = shaken(load())
    backend.injection = NoiseInjection(0.25, 3.0)
    backend.save_adapter(tmp_path / "a")
    twin = load()
    twin.load_adapter(tmp_path / "a")
    assert twin.injection == NoiseInjection(0.25, 3.0)
    shaken(load()).save_adapter(tmp_path / "plain")
    twin.load_adapter(tmp_path / "plain")
    assert twin.injection is None
    path = tmp_path / "a" / "adapter.json"
    config = json.loads(path.read_text())
    # a reader that does not know of injected noise refuses the format; one that does, a format without its table
    assert config["format"] == "hnkit-toy-adapter-2"
    for change, message in (
        ({"injection": None}, "format"), ({"injection": {"share": 2.0, "max_delta": None}}, "share"),
        ({"injection": {"share": 0.5}}, "share and max_delta"), ({"injection": [0.5]}, "share and max_delta"),
        ({"injection": {"share": "x", "max_delta": None}}, "share"), ({"format": "hnkit-toy-adapter-1"}, "format"),
    ):  # fmt: skip
        path.write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            load().load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "claim",
    [
        {"hypernetwork": "mlp", "width": 60_000}, {"hypernetwork": "mlp", "depth": 3_000_000},
        {"hypernetwork": "mlp", "width": 10**400}, {"hypernetwork": "mlp", "depth": 10**400}, {"seed": 10**400},
        {"format": 10**400}, {"problem": 10**400}, {"hypernetwork": "x" * 10**4},
    ],
    ids=lambda claim: " ".join(claim),
)  # fmt: skip
def test_what_an_adapter_claims_is_held_against_its_file_before_anything_is_made(claim, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    shaken(load()).save_adapter(folder)
    path = folder / "adapter.json"
    plain = path.read_text()
    path.write_text(json.dumps(json.loads(plain) | claim))
    monkeypatch.setattr("hnkit.toy.backend._body", None)  # which would make it
    with pytest.raises(InputError) as refused:
        load_trained("toy", folder)
    assert len(str(refused.value).replace(str(tmp_path), "")) < 300
    assert "memory" not in str(refused.value), "that of this machine has nothing to do with it"
    if set(claim) <= {"hypernetwork", "width", "depth", "seed"}:
        path.write_text(plain)
        run = resolve_config(backend="toy").to_toml()
        for key, value in claim.items():
            run = re.sub(rf"^{key} = .*$", f"{key} = {json.dumps(value)}", run, flags=re.MULTILINE)
        (tmp_path / "config.toml").write_text(run)
        with pytest.raises(InputError) as refused:
            load_trained("toy", tmp_path)
        assert len(str(refused.value).replace(str(tmp_path), "")) < 300
        assert "memory" not in str(refused.value)


def test_an_affine_adapter_says_nothing_of_the_width_that_it_has_not(tmp_path):
    shaken(load()).save_adapter(tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"depth": 10**400}))
    load_trained("toy", tmp_path / "a")
