"""Options that save memory: what they may change, and that nothing else depends on them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from hnkit import InputError, NoiseLoss, noise_kl
from hnkit.backend import backend_factory
from hnkit.maps import ConditionedMap
from hnkit.scaled.attach import attach
from hnkit.scaled.lora.stored import NF4, StoredConv2d, StoredLinear, is_stored, store
from hnkit.scaled.lora.twin import lora_state
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, redness

FAMILIES = ("sana", "sd-turbo", "flux")
PROMPTS = tiny.PROMPTS[:3]


def e4m3() -> torch.Tensor:
    """Every finite number of the format, from its definition: a sign, 4 bits of exponent with bias 7, 3 of fraction."""
    found = [0.0]
    for exponent in range(16):
        for fraction in range(8):
            if (exponent, fraction) != (15, 7):  # not a number
                power, leading = (exponent - 7, 1) if exponent else (-6, 0)
                found += [sign * 2.0**power * (leading + fraction / 8) for sign in (1, -1)]
    return torch.tensor(sorted(set(found)), dtype=torch.float64)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_stored_weight_is_its_nearest_number_of_eight_bits_times_a_power_of_two(kind):
    torch.manual_seed(0)
    network = nn.ModuleList([nn.Linear(40, 6), nn.Conv2d(5, 7, 3)]).to(kind).requires_grad_(False)
    with torch.no_grad():
        network[0].weight[0] *= 1e-3
        network[0].weight[1] *= 300
        network[0].weight[2] = 0
    before = [layer.weight.double() for layer in network]
    store(network, "fp8")
    assert [type(layer) for layer in network] == [StoredLinear, StoredConv2d]
    for layer, weight in zip(network, before, strict=True):
        assert layer.weight.dtype == kind
        assert layer.weight.shape == weight.shape
        for row, stored in zip(weight.flatten(1), layer.weight.double().flatten(1), strict=True):
            if not row.any():
                assert not stored.any()
                continue
            scale = 2.0 ** math.ceil(math.log2(float(row.abs().max()) / 448))
            nearest = (row[:, None] / scale - e4m3()).abs().amin(1)
            assert torch.equal((row / scale - stored / scale).abs(), nearest)
    assert sum(buffer.nbytes for buffer in network.buffers()) < 40 * 6 + 7 * 45 + 4 * 13 + 1


def normal_float() -> torch.Tensor:
    """The 16 numbers of 4-bit NormalFloat, from quantiles of the normal law (arXiv 2305.14314, appendix E)."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative]))
    return torch.from_numpy(values / values.max())


def test_a_weight_in_four_bits_is_its_nearest_quantile_times_the_largest_of_its_block():
    torch.manual_seed(0)
    numbers = normal_float()
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), numbers, atol=2e-7, rtol=0)
    network = nn.ModuleList([nn.Linear(32, 6), nn.Linear(5, 5)]).requires_grad_(False)
    network[0].weight.data[2:4] = 0
    before = network[0].weight.double().reshape(-1, 64)
    store(network, "nf4")
    assert type(network[1]) is nn.Linear  # 25 entries are no blocks of 64
    after = network[0].weight.double().reshape(-1, 64)
    for block, stored in zip(before, after, strict=True):
        largest = block.abs().max()
        nearest = (block[:, None] - largest * numbers).abs().amin(1)
        torch.testing.assert_close((block - stored).abs(), nearest, atol=1e-6, rtol=0)
    assert sum(buffer.nbytes for buffer in network.buffers()) == 3 * (32 + 4)


def stored_and_rounded(name, make_backend, form="fp8", **options):
    """A backend in 8 or 4 bits, and one in full whose weights are those that the first computes with."""
    stored = make_backend(name, quantize=form, **options)
    rounded = make_backend(name, **options)
    assert is_stored(stored._base)
    assert not is_stored(rounded._base)
    count = 0
    for layer, module in stored._base.named_modules():
        if isinstance(module, StoredLinear | StoredConv2d):
            count += 1
            rounded._base.get_submodule(layer).weight.data.copy_(module.weight)
    assert count >= 8
    for backend in (stored, rounded):
        perturb(backend)
    return stored, rounded


@pytest.mark.parametrize(
    ("name", "form", "recomputed"),
    [("sana", "fp8", False), ("sana", "nf4", False), ("sd-turbo", "fp8", True), ("flux", "fp8", True),
     ("flux", "nf4", False)],
)  # fmt: skip
def test_gradients_in_few_bits_are_those_of_the_rounded_weights(name, form, recomputed, make_backend):
    found = []
    savers = dict.fromkeys(backend_factory(name).savers, recomputed)
    for backend in stored_and_rounded(name, make_backend, form, **savers):
        noise, condition = noise_for(backend, 3).requires_grad_(), backend.encode(PROMPTS)
        delta = backend.hypernetwork(noise, condition)
        images = backend.generate(noise + delta, condition)
        (delta.square().sum() / 2 - redness(images).sum()).backward()
        gradients = [parameter.grad for parameter in lora_state(backend._twin).values()]
        found.append([delta.detach(), images.detach(), noise.grad, *gradients])
    assert all(bool(gradient.any()) for gradient in found[0][2:])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


def test_products_and_second_derivatives_pass_through_stored_layers(make_backend):
    found = []
    for backend in stored_and_rounded("sana", make_backend):
        noise, condition = noise_for(backend, 2), backend.encode(PROMPTS[:2])
        f = ConditionedMap(backend.hypernetwork, condition)
        draws = torch.Generator().manual_seed(0)
        by_jvp = noise_kl(f, noise, method="lanczos", steps=3, probes=1, generator=draws, certify=False)
        draws = torch.Generator().manual_seed(1)
        loss = NoiseLoss(kl="second-order")(f, noise, lambda x: x, lambda x: x.flatten(1).sum(1), generator=draws)
        loss.total.mean().backward()
        gradients = [parameter.grad for parameter in lora_state(backend._twin).values()]
        found.append([by_jvp.per_sample, loss.kl.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


def test_an_adapter_does_not_depend_on_how_its_base_was_stored(make_backend, tmp_path):
    stored, plain = make_backend("sana", quantize="fp8"), make_backend("sana")
    assert stored.model_digest() == plain.model_digest()
    assert stored.noise_shape == plain.noise_shape
    assert stored.last_layer == plain.last_layer
    assert stored._spec == plain._spec
    noise = noise_for(stored, 3)
    assert not stored.hypernetwork(noise, stored.encode(PROMPTS)).any()  # the zero base
    perturb(stored)
    stored.save_adapter(tmp_path / "stored")
    plain.load_adapter(tmp_path / "stored")
    for key, value in lora_state(stored._twin).items():
        assert torch.equal(lora_state(plain._twin)[key], value)
    config = json.loads((tmp_path / "stored" / "adapter_config.json").read_text())
    plain.save_adapter(tmp_path / "plain")
    other = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["hnkit"]["base_probe"] == other["hnkit"]["base_probe"]
    assert backend_factory("sana").adapter_options(tmp_path / "stored").quantize == "fp8"
    assert backend_factory("sana").adapter_options(tmp_path / "plain").quantize == "no"


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_in_the_type_of_the_network_keeps_float32_weights_and_delta(name, make_backend):
    found = {}
    for autocast in (False, True):
        backend = make_backend(name, dtype="bfloat16", lora_autocast=autocast)
        perturb(backend)
        seen = []
        for layer in lora_layers(backend):
            layer.lora_B["hypernoise"].register_forward_hook(noting(seen))
        noise, condition = noise_for(backend, 3), backend.encode(PROMPTS)
        delta = backend.hypernetwork(noise, condition)
        assert delta.dtype == torch.float32
        delta.square().sum().backward()
        gradients = [parameter.grad for parameter in lora_state(backend._twin).values()]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        assert set(seen) == ({torch.float32, torch.bfloat16} if autocast else {torch.float32})
        found[autocast] = torch.cat([delta.detach().flatten(), *(gradient.flatten() for gradient in gradients)])
    assert 0 < (found[True] - found[False]).norm() / found[False].norm() < 0.05


def noting(seen):
    return lambda _, __, output: seen.append(output.dtype)


def lora_layers(backend):
    return [module for module in backend._twin.modules() if "hypernoise" in getattr(module, "lora_B", {})]


def test_lora_in_the_type_of_a_float32_network_is_the_same_to_the_bit(make_backend):
    found = []
    for autocast in (False, True):
        backend = make_backend("sd-turbo", lora_autocast=autocast)
        perturb(backend)
        found.append(backend.hypernetwork(noise_for(backend, 3), backend.encode(PROMPTS)))
    assert torch.equal(*found)


def test_chosen_layers_get_lora_and_the_last_one_always_does(make_backend, checkpoint, tmp_path):
    backend = make_backend("sana", lora_layers=("attn2.to_q", "to_k"))
    names = {key.rsplit(".lora_", 1)[0] for key in lora_state(backend._twin)}
    assert {name.rpartition(".")[2] for name in names} == {"to_q", "to_k", "proj_out"}
    assert not any(name.endswith("attn1.to_q") for name in names)
    noise, condition = noise_for(backend, 3), backend.encode(PROMPTS)
    assert not backend.hypernetwork(noise, condition).any()
    perturb(backend)
    delta = backend.hypernetwork(noise, condition)
    assert delta.any()
    backend.save_adapter(tmp_path / "adapter")
    options = backend_factory("sana").adapter_options(tmp_path / "adapter")
    assert options.lora_layers == ("attn2.to_q", "to_k")
    again = make_backend("sana", lora_layers=options.lora_layers)
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(again.hypernetwork(noise, condition), delta)
    steered = attach(backend.pipeline.__class__.from_pretrained(checkpoint("sana")), tmp_path / "adapter")
    assert {key.rsplit(".lora_", 1)[0] for key in lora_state(steered.hypernetwork.twin)} == names
    with pytest.raises(InputError, match=r"or backend\.lora_layers is to say which layers it is for"):
        make_backend("sana").load_adapter(tmp_path / "adapter")


def test_what_no_layer_is_called_and_an_unknown_storage_are_one_line(make_backend):
    with pytest.raises(
        InputError, match=r"no layer of SanaTransformer2DModel ends in 'to_z'; their last names are .*to_k"
    ):
        make_backend("sana", lora_layers=("to_q", "to_z"))
    with pytest.raises(InputError, match=r"backend\.quantize 'int3': choose one of no, fp8, nf4"):
        make_backend("sana", quantize="int3")
