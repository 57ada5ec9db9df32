"""The twin: shared tensors, LoRA where it belongs, a zero base that still learns; f's derivatives on real classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hnkit import InputError, NoiseLoss, noise_kl
from hnkit.jacobian import RowJacobian, dense_jacobian
from hnkit.maps import ConditionedMap
from hnkit.scaled.lora import twin as twin_module
from hnkit.scaled.lora.twin import (
    LoraSpec,
    ZeroConv2d,
    ZeroLinear,
    grouped_targets,
    lora_state,
    lora_targets,
    make_twin,
)
from hnkit.scaled.pipelines.memory import repeated_blocks
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb, redness

PROMPTS = tiny.PROMPTS


def test_twin_shares_every_base_tensor(make_backend):
    backend = make_backend("sana")
    base = {id(t) for t in (*backend._base.parameters(), *backend._base.buffers())}
    twin = [*backend._twin.parameters(), *backend._twin.buffers()]
    lora = {id(t) for t in lora_state(backend._twin).values()}
    assert {id(t) for t in twin} == base | lora
    assert not base & lora
    modules = {id(m) for m in backend._base.modules()}
    assert not modules & {id(m) for m in backend._twin.modules()}, "a shared module would carry the zero base along"


def test_base_network_is_untouched_by_the_twin(make_backend):
    backend = make_backend("sana")
    assert not any("lora" in key or "base_layer" in key for key in backend._base.state_dict())
    assert type(backend._base.proj_out) is nn.Linear
    assert not hasattr(backend._base, "peft_config")
    assert backend.pipeline.transformer is backend._base


@pytest.mark.parametrize("name", ["sana", "sd-turbo", "flux"])
def test_lora_is_on_every_linear_and_ungrouped_convolution(name, make_backend):
    base = make_backend(name)._base
    targets = lora_targets(base)
    for layer, module in base.named_modules():
        wanted = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        assert (layer in targets) == wanted, layer
    depthwise = [layer for layer, module in base.named_modules() if getattr(module, "groups", 1) > 1]
    assert bool(depthwise) == (name == "sana")
    assert grouped_targets(base, depthwise) == tuple(depthwise)


def test_zero_base_set_before_the_injection_would_never_learn(make_backend):
    """The silent failure that the order of the two steps avoids, shown, and that ours does not have it."""
    import peft

    base = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)).requires_grad_(False)
    x = torch.randn(2, 4, 5, 5)

    wrong = twin_module.share_weights(base)
    wrong[1].__class__ = ZeroConv2d
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "1"]), wrong, adapter_name="a")
    for parameter in wrong[1].lora_B.parameters():
        nn.init.ones_(parameter)
    assert not wrong(x).any(), "lora_A and lora_B were built of the class that returns zeros"

    right = make_twin(base, LoraSpec(2, 2.0, ("0", "1")), zero_base="1")
    assert not right(x).any()
    with torch.no_grad():
        right[1].lora_B["hypernoise"].weight.fill_(1.0)
    assert right(x).abs().max() > 1e-3
    assert type(right[1].lora_A["hypernoise"]) is nn.Conv2d


@pytest.mark.parametrize(
    ("layer", "zero", "shape"),
    [
        (nn.Linear(6, 5), ZeroLinear, (2, 3, 6)),
        (nn.Conv2d(3, 4, 3, padding=1), ZeroConv2d, (2, 3, 7, 8)),
        (nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1)), ZeroConv2d, (2, 3, 11, 9)),
    ],
)
def test_zero_layers_keep_shape_and_weights(layer, zero, shape):
    x = torch.randn(shape).bfloat16()
    expected = layer.bfloat16()(x)
    weight = layer.weight.clone()
    layer.__class__ = zero
    found = layer(x)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert not found.any()
    assert torch.equal(layer.weight, weight)


def test_refusals(make_backend):
    base = make_backend("sana")._base
    with pytest.raises(InputError, match="no layer 'nowhere'"):
        make_twin(base, LoraSpec(2, 2.0, ("nowhere",)), zero_base=None)
    with pytest.raises(InputError, match="'proj_out' has no LoRA"):
        make_twin(base, LoraSpec(2, 2.0, ("patch_embed.proj",)), zero_base="proj_out")
    with pytest.raises(InputError, match="no layers to adapt"):
        LoraSpec(2, 2.0, ())


def test_linear_and_convolution_twins_are_lora_by_hand():
    """f of a one-layer network is (alpha / rank) B A x, without the frozen weight and bias."""
    x = torch.randn(3, 6)
    base = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    f = make_twin(base, LoraSpec(2, 7.0, ("0",)), zero_base="0")
    with torch.no_grad():
        f[0].lora_B["hypernoise"].weight.normal_()
    A, B = (f[0].get_submodule(f"lora_{side}.hypernoise").weight for side in "AB")
    torch.testing.assert_close(f(x), 3.5 * x @ A.T @ B.T)
    direct = make_twin(base, LoraSpec(2, 7.0, ("0",)), zero_base=None)
    assert torch.equal(direct(x), base(x))


# --- derivatives of f on the real classes ---------------------------------------------------------------------------


def conditioned(backend, count=2):
    return ConditionedMap(backend.hypernetwork, backend.encode(PROMPTS[:count])), noise_for(backend, count)


@pytest.mark.parametrize("name", ["sana", "sd-turbo", "flux"])
def test_products_with_the_jacobian_agree(name, make_backend):
    """Forward and reverse products are adjoint, and match finite differences: attention kernels fail here."""
    backend = make_backend(name)
    perturb(backend, 0.03)
    f, x = conditioned(backend)
    operator = RowJacobian(f, x)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(operator.rows, operator.dim, generator=generator, dtype=torch.float64) for _ in "uv")
    jv, ju = operator.jvp(v), operator.vjp(u)
    torch.testing.assert_close((u * jv).sum(1), (ju * v).sum(1), rtol=1e-3, atol=1e-4)
    h = 1e-3
    with torch.no_grad():
        moved = [f(x + sign * h * v.view_as(x).float()).double().flatten(1) for sign in (1, -1)]
    torch.testing.assert_close(jv, (moved[0] - moved[1]) / (2 * h), rtol=0.05, atol=0.02 * float(jv.abs().max()))


def test_exact_and_stochastic_kl_agree(make_backend):
    backend = make_backend("sana")
    perturb(backend, 0.03)
    f, x = conditioned(backend, 4)
    exact = noise_kl(f, x, method="exact")
    assert exact.value > 0
    assert abs(exact.error) > 1e-3 * exact.value
    for row in range(4):  # each row with its own prompt: a condition that did not follow its row would show
        alone = noise_kl(f.select(torch.tensor([row])), x[row : row + 1], method="exact")
        assert math.isclose(alone.value, float(exact.per_sample[row]), rel_tol=1e-4)
    J = dense_jacobian(f, x)
    eye = torch.eye(J.shape[-1], dtype=J.dtype)
    error = torch.diagonal(J, dim1=1, dim2=2).sum(1) - torch.linalg.slogdet(eye + J).logabsdet
    assert math.isclose(float(error.mean()), exact.error, rel_tol=1e-6, abs_tol=1e-9)
    estimate = noise_kl(f, x, method="arnoldi", probes=8, generator=torch.Generator().manual_seed(0))
    spread = float(torch.linalg.matrix_norm(J).square().mean())
    # Probe error alone: at most sqrt(2) |phi(J)|_F per probe, |phi(J)|_F near |J|_F^2 / 2; four standard errors.
    assert abs(estimate.error - exact.error) < 4 * spread / math.sqrt(2 * 8 * 4)


@pytest.mark.parametrize("kl", ["l2", "second-order", "exact"])
def test_loss_gradients_agree_with_finite_differences(kl, make_backend):
    """Backward through a forward-mode product of a network with LayerNorm is silently wrong by 10 to 20 per cent.

    SANA's attention has ReLUs: J jumps where one of them switches, so the smallest of several steps' errors counts.
    The second-order loss' gradient is that of its value in the mean over probes only: 2 probes leave 3 per cent between
    them, 128 leave 0.2.
    """
    backend = make_backend("sana")
    perturb(backend, 0.03)
    f, x = conditioned(backend)
    condition = f.condition
    weights = torch.tensor([1.0, -0.4])
    parameters = [p for p in backend.hypernetwork.parameters() if p.requires_grad]
    loss = NoiseLoss(kl=kl, probes=128) if kl == "second-order" else NoiseLoss(kl=kl)

    def value():
        terms = loss(
            f,
            x,
            lambda noise: backend.generate(noise, condition),
            lambda images: 0 * images.sum((1, 2, 3)),
            generator=torch.Generator().manual_seed(2),
        )
        return (terms.total.double() * weights).sum()

    gradients = torch.autograd.grad(value(), parameters)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    start = [p.detach().clone() for p in parameters]
    errors = []
    for h in (1e-3, 3e-4, 1e-4, 3e-5):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, before, gradient in zip(parameters, start, gradients, strict=True):
                    parameter.copy_(before + sign * h * gradient / norm)
            values.append(float(value().detach()))
        errors.append(abs((values[0] - values[1]) / (2 * h) - norm) / norm)
    assert min(errors) < 0.01, errors


def test_losses_with_derivatives_of_f_pass_through_checkpointing(make_backend):
    def gradient(**options):
        backend = make_backend("sana", **options)
        perturb(backend, 0.03)
        f, x = conditioned(backend)
        terms = NoiseLoss(kl="second-order")(
            f,
            x,
            lambda noise: backend.generate(noise, f.condition),
            lambda images: images.mean((1, 2, 3)),
            generator=torch.Generator().manual_seed(2),
        )
        terms.total.sum().backward()
        return torch.cat([p.grad.flatten() for p in backend.hypernetwork.parameters() if p.requires_grad])

    torch.testing.assert_close(
        gradient(hypernetwork_checkpointing=True, generator_checkpointing=True), gradient(), rtol=1e-3, atol=1e-5
    )


# --- compilation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sana", "sd-turbo", "flux"])
def test_compiled_blocks_are_checked_and_equal(name, make_backend):
    compiled, plain = make_backend(name, compile="eager"), make_backend(name)
    noise, condition = noise_for(plain, 1), plain.encode(PROMPTS[:1])
    assert not compiled.hypernetwork(noise, condition).any(), "the check's random weights are taken back"
    perturb(compiled)
    perturb(plain)
    torch.testing.assert_close(compiled.hypernetwork(noise, condition), plain.hypernetwork(noise, condition))
    assert list(compiled.hypernetwork.state_dict()) == list(plain.hypernetwork.state_dict())
    torch.testing.assert_close(compiled.generate(noise, condition), plain.generate(noise, condition))
    for network in (compiled._base, compiled._twin):
        repeated = {id(block) for block in repeated_blocks(network)}
        assert repeated
        assert repeated == {id(module) for module in network.modules() if module._compiled_call_impl is not None}
    if name == "sana":  # direct fine-tuning trains neither of these two networks
        direct, plain = compiled.direct(), plain.direct()
        assert all(block._compiled_call_impl is not None for block in repeated_blocks(direct.network))
        perturb(direct)
        perturb(plain)
        torch.testing.assert_close(direct.generate(noise, condition), plain.generate(noise, condition))


def test_every_training_step_runs_compiled_code(make_backend):
    """Neither the look at f in the loss's first call nor validation between steps lets blocks fall back to eager.

    Validation itself is no exception: torch would compile no more of a block at eight variants of it.
    """
    torch.compiler.reset()  # what other tests compiled of the same blocks would count towards the limit
    runs = []

    def counted(graph, _):
        return lambda *inputs: (runs.append(1), graph(*inputs))[1]

    if "counted" not in torch.compiler.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(counted)
    backend = make_backend("sana", compile="counted")
    perturb(backend)
    trained = [parameter for parameter in backend.hypernetwork.parameters() if parameter.requires_grad]
    loss, conditions = NoiseLoss(), {rows: backend.encode(PROMPTS[:rows]) for rows in (1, 2, 3)}

    def step():
        runs.clear()
        terms = loss(
            ConditionedMap(backend.hypernetwork, conditions[2]), noise_for(backend, 2),
            lambda x: backend.generate(x, conditions[2]), lambda images: images.mean((1, 2, 3)),
        )  # fmt: skip
        torch.autograd.grad(terms.total.sum(), trained, allow_unused=True)
        return len(runs)

    step()
    blocks = sum(len(repeated_blocks(network)) for network in (backend._base, backend._twin))
    assert step() == step() >= blocks, "each block of f and of the generator runs what was compiled of it"
    for rows in (2, 1, 3):
        runs.clear()
        with torch.no_grad():
            noise = noise_for(backend, rows)
            backend.generate(noise + backend.hypernetwork(noise, conditions[rows]), conditions[rows])
        assert len(runs) >= blocks
        assert step() >= blocks


def test_figures_are_of_f_uncompiled_with_the_same_weights(make_backend):
    compiled = make_backend("flux", compile="aot_eager")  # whose second derivatives, and products of a kept graph, fail
    f = compiled.map_for(PROMPTS[:2])
    assert not any(module._compiled_call_impl is not None for module in f.hypernetwork.modules())
    perturb(compiled)  # after: the weights are the same ones
    noise = noise_for(compiled, 2)
    plain = make_backend("flux")
    perturb(plain)
    found = [
        noise_kl(g, noise, method="arnoldi", steps=3, probes=1, generator=torch.Generator().manual_seed(0))
        for g in (f, plain.map_for(PROMPTS[:2]))
    ]
    assert found[0].value == pytest.approx(found[1].value, rel=1e-5)
    assert found[0].value > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sana", "sd-turbo", "flux"])
def test_inductor_agrees_with_recomputed_blocks_too(name, make_backend):
    savers = {"hypernetwork_checkpointing": True, "generator_checkpointing": True}
    gradients = []
    for backend in (make_backend(name, compile="inductor", self_check=True, **savers), make_backend(name, **savers)):
        perturb(backend)
        noise, condition = noise_for(backend, 2), backend.encode(PROMPTS[:2])
        images = backend.generate(noise + backend.hypernetwork(noise, condition), condition)
        gradients.append(torch.autograd.grad(redness(images).sum(), list(lora_state(backend._twin).values())))
    one, other = (torch.cat([g.flatten() for g in found]) for found in gradients)
    assert float((one - other).norm() / other.norm()) < 1e-4


def test_wrong_compilers_are_refused(make_backend):
    import torch._dynamo

    torch.compiler.reset()  # what other tests compiled of the same blocks would count towards the limit

    def wrong(graph, inputs):
        def run(*arguments):
            return tuple(
                x * 1.01 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in graph(*arguments)
            )

        return run

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    for compiler in (wrong, broken):
        if compiler.__name__ not in torch.compiler.list_backends(exclude_tags=()):
            torch._dynamo.register_backend(compiler, name=compiler.__name__)
    with pytest.raises(InputError, match=r"disagrees with eager mode on f by a relative 0.01"):
        make_backend("sana", compile="wrong")
    with pytest.raises(InputError, match=r"'broken' failed on f: .*no compiler here"):
        make_backend("sana", compile="broken")
    with pytest.raises(InputError, match="compile 'nonsense': choose no or one of"):
        make_backend("sana", compile="nonsense")


def test_another_lora_of_the_base_is_left_alone(make_backend):
    """Making the twin starts its own LoRA; one that is on the base already is part of the base."""
    import peft

    base = make_backend("flux", seed=0)._base
    base.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in base.named_parameters() if "lora_" in name}
    assert before
    targets = lora_targets(base)
    assert not any("lora_" in name or "base_layer" in name for name in targets)
    twin = make_twin(base, LoraSpec(2, 2.0, targets), zero_base=None)
    for name, value in before.items():
        assert torch.equal(dict(base.named_parameters())[name], value), name
    trained = [name for name, p in twin.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.endswith(".hypernoise.weight") for name in trained)
