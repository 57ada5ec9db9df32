"""What can go wrong on a card alone: the same numbers as on the CPU, runs there, and adapters that come back.

They are marked `cuda` and run where there is one: `pytest -m cuda`. With `HNKIT_CARD=cpu` they run on the CPU, which
proves no more than that they run.
"""

from __future__ import annotations

import io
import json
import os

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hnkit import NoiseLoss, noise_kl
from hnkit.backend import backend_factory
from hnkit.config import resolve_config
from hnkit.injection import NoiseInjection, deployed_noise
from hnkit.lipschitz.local import local_norms
from hnkit.maps import ConditionedMap
from hnkit.scaled.rewards.memory import placed
from hnkit.training.run import train
from tests.scaled import tiny

pytestmark = pytest.mark.cuda
METHODS = ("exact", "arnoldi", "lanczos", "second-order", "power", "roulette", "low-rank", "l2")
FAMILIES = ("sana", "sd-turbo", "flux")


@pytest.fixture(scope="session")
def card() -> torch.device:
    """The card, or what HNKIT_CARD names in its place."""
    device = torch.device(os.environ.get("HNKIT_CARD", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.backends.cudnn.allow_tf32 = False  # convolutions would have 10 bits, and be no CPU's
    return device


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.build(name, root / name) for name in FAMILIES}.__getitem__


def make(name, checkpoint, device, **changes):
    factory = backend_factory(name)
    backend = factory.load(factory.options(**tiny.options(name, checkpoint(name), device=str(device), **changes)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in backend.hypernetwork.named_parameters():
            if parameter.requires_grad and ".lora_B." in key:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return backend


def given(backend, count=3):
    """Condition and noise, drawn on the CPU."""
    noise = torch.randn(count, *backend.noise_shape, generator=torch.Generator().manual_seed(3))
    return backend.encode(tiny.PROMPTS[:count]), noise.to(backend.device)


def step(backend, condition, noise):
    f = ConditionedMap(backend.hypernetwork, condition)
    terms = NoiseLoss()(f, noise, lambda x: backend.generate(x, condition), lambda images: images.mean((1, 2, 3)))
    terms.total.mean().backward()
    return terms


def distance(one, other):
    one, other = (value.detach().double().cpu() for value in (one, other))
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_figures_of_the_cpu(method, card):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.Tanh(), torch.nn.Linear(24, 12)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for device in ("cpu", card):
        moved = network.to(device)
        generator = torch.Generator().manual_seed(2)  # of the CPU: the probes are the same on every device
        found.append(noise_kl(moved, x.to(device), method=method, generator=generator, certify=False))
    assert found[1].per_sample.device.type == card.type
    assert distance(found[0].per_sample, found[1].per_sample) < 1e-9


def test_a_generator_of_either_side_serves(card):
    f = torch.nn.Linear(8, 8, bias=False).to(card)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(card)
    for generator in (torch.Generator().manual_seed(0), torch.Generator(card).manual_seed(0)):
        state = generator.get_state()
        one = noise_kl(f, x, method="second-order", generator=generator, certify=False)
        generator.set_state(state)
        two = noise_kl(f, x, method="second-order", generator=generator, certify=False)
        assert one.value == two.value
        assert float(local_norms(f, x, generator=generator).value.max()) > 0
        moved, _ = deployed_noise(NoiseInjection(0.5), x, f(x), generator)
        assert moved.device.type == card.type


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in FAMILIES),
        ("sana", {"quantize": "fp8"}),
        ("sd-turbo", {"quantize": "fp8", "hypernetwork_checkpointing": True}),
        ("flux", {"quantize": "nf4", "lora_autocast": True}),
    ],
)
def test_images_f_and_gradients_are_those_of_the_cpu(name, options, card, checkpoint):
    found = []
    for device in ("cpu", card):
        backend = make(name, checkpoint, device, **options)
        condition, noise = given(backend)
        terms = step(backend, condition, noise)
        gradients = [p.grad.flatten() for p in backend.hypernetwork.parameters() if p.grad is not None]
        delta = backend.hypernetwork(noise, condition)
        found.append((delta, backend.generate(noise, condition), torch.cat(gradients), terms.kl))
    assert found[1][0].device.type == card.type
    assert [d for d in map(distance, *found) if not d < 1e-3] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_in_bfloat16_is_that_of_float32_up_to_rounding(name, card, checkpoint):
    gradients = []
    for dtype in ("float32", "bfloat16"):
        backend = make(name, checkpoint, card, dtype=dtype, **dict.fromkeys(backend_factory(name).savers, True))
        condition, noise = given(backend)
        terms = step(backend, condition, noise)
        assert terms.kl.dtype == torch.float32
        gradients.append(torch.cat([p.grad.flatten() for p in backend.hypernetwork.parameters() if p.requires_grad]))
        assert gradients[-1].dtype == torch.float32
    assert distance(*gradients) < 0.1


class Bright(torch.nn.Module):
    """A reward with a weight and a buffer."""

    def __init__(self):
        super().__init__()
        self.name, self.weight = "bright", 1.0
        self.scale = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]), requires_grad=False)
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, images, prompts):
        return (images.mean((2, 3)) @ self.scale).square() + self.shift


def test_a_reward_off_the_card_scores_there_and_goes_back(card):
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for reward in (Bright(), placed(Bright(), str(card), offload=True)):
        given = images.clone() if not found else images.to(card)
        scores = reward(given.requires_grad_(), tiny.PROMPTS[:3])
        (scores * torch.tensor([1.0, 2.0, -3.0], device=scores.device)).sum().backward()
        found.append((scores, given.grad))
        assert {tensor.device.type for tensor in (*reward.parameters(), *reward.buffers())} == {"cpu"}
    assert found[1][0].device.type == card.type
    assert [d for d in map(distance, *found) if not d < 1e-5] == []


def run(checkpoint, card, folder, **options):
    chosen = tiny.options("sana", checkpoint("sana"), device=str(card))
    settings = {
        "steps": 4, "batch": 2, "accumulate": 1, "lr": 0.5, "warmup": 0, "optimizer": "sgd", "momentum": 0.5,
        "measure_samples": 4, "validate_samples": 2, "checkpoint_every": 2, "prompts": folder.parent / "prompts.txt",
    }  # fmt: skip
    (folder.parent / "prompts.txt").write_text("\n".join(tiny.PROMPTS))
    flags = [f"backend.{key}={tiny.text(value)}" for key, value in chosen.items()]
    flags += [f"train.{key}={value}" for key, value in settings.items()]
    config = resolve_config(backend="sana", overrides=flags, rewards=["redness=1.0"])
    kept = {} if "resume" in options else {"out": folder}
    return config, train(config, console=Console(file=io.StringIO()), **kept, **options)


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_on_the_card_goes_on_from_its_checkpoint_and_its_adapter_is_used_on_the_cpu(card, checkpoint, tmp_path):
    whole = tmp_path / "whole"
    run(checkpoint, card, whole)
    resumed = tmp_path / "resumed"
    run(checkpoint, card, resumed)
    newest = max((resumed / "checkpoints").iterdir())
    for file in newest.iterdir():  # back to the middle of the run
        file.unlink()
    newest.rmdir()
    (resumed / "report.json").unlink()
    run(checkpoint, card, resumed, resume=resumed)
    one, two = weights(whole), weights(resumed)
    assert set(one) == set(two)
    kept = torch.cat([one[key].flatten() for key in sorted(one) if "lora_B" in key])
    assert distance(kept, torch.cat([two[key].flatten() for key in sorted(two) if "lora_B" in key])) < 1e-4
    lines = (resumed / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "grad_norm" in line] == [1, 2, 3, 4]
    found = []
    for device in ("cpu", card):
        backend = make("sana", checkpoint, device)
        backend.load_adapter(whole / "adapter")
        condition, noise = given(backend)
        with torch.no_grad():
            delta = backend.hypernetwork(noise, condition)
            found.append((delta, backend.generate(noise + delta, condition)))
    assert float(found[0][0].norm()) > 0
    assert [d for d in map(distance, *found) if not d < 1e-3] == []
