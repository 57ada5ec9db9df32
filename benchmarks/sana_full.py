"""Training-step speed and memory of the full SANA-Sprint 0.6B configuration with random weights.

    python benchmarks/sana_full.py                                   # full size, on a GPU: 1024 px
    python benchmarks/sana_full.py --tiny                            # the same script on the CPU, in seconds
    python benchmarks/sana_full.py --batches 1,3,6 --out figures.json

No weights are needed: transformer and DC-AE decoder have the published sizes and random entries, and the text encoder
is left out (embeddings are random; training needs it only once). Every row is one training step, forward and backward,
by the backend and, as the line to compare with, by a plainly written loop of the same step. Reported: images per
second (median step) and peak memory, per batch size, without and with each memory option.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from full_size import Model, condition, machine, make
from torch import Tensor

from hnkit import InputError, NoiseLoss
from hnkit.backend import load_installed
from hnkit.maps import Condition, ConditionedMap
from hnkit.rewards import RewardSum
from hnkit.scaled.pipelines.backend import PipelineBackend
from hnkit.scaled.pipelines.factory import PREFERENCES
from hnkit.scaled.rewards.memory import OffCard, placed


@dataclass(frozen=True)
class Case:
    """A step that is measured.

    Attributes:
        options: options of the backend that are not at their defaults.
        batches: batch sizes; empty: those of the run.
        plain: whether the plain loop runs, too.
        rewards: options of the paper's four rewards; `None`: the reward is `redness`.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    batches: Sequence[int] = ()
    plain: bool = True
    rewards: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        """The options in words."""
        words = [name if value is True else f"{name} = {_word(value)}" for name, value in self.options.items()]
        if self.rewards is not None:
            kind = [name if value is True else str(value) for name, value in self.rewards.items()]
            words.append(f"four rewards ({' '.join(kind) or 'float32'})")
        return ", ".join(words)


def _word(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


ALL = {"vae_checkpointing": True, "generator_checkpointing": True, "hypernetwork_checkpointing": True}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
DECODER = {"vae_checkpointing": True}
HALF = {**DECODER, "lora_autocast": True}
STORED = Case({**HALF, "quantize": "fp8"}, (1,), plain=False)
CASES = (
    Case(),
    Case(DECODER),
    Case(HALF, plain=False),
    Case(ALL, plain=False),
    Case({**ALL, "lora_autocast": True}, plain=False),
    Case({**DECODER, "generator_checkpointing": True}, plain=False),
    Case({**DECODER, "lora_layers": ATTENTION}, (1,), plain=False),
    Case({**DECODER, "vae_slicing": True}, (3,), plain=False),
    Case(HALF, (1,), plain=False, rewards={}),
    Case(HALF, (1,), plain=False, rewards={"dtype": "bfloat16"}),
    Case(HALF, (1,), plain=False, rewards={"dtype": "bfloat16", "offload": True}),
    STORED,
)
"""Each memory option, the plainest first; what is stored in 8 bits stays so, and comes last."""


LOSS = NoiseLoss()
"""One for all steps, as in training: a loss tries each network once, with a few more passes of f."""


def redness(images: Tensor) -> Tensor:
    """The paper's redness reward."""
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2)) / 100


def four_rewards(options: Mapping[str, Any], device: torch.device) -> RewardSum:
    """The paper's rewards at their published sizes with random weights."""
    rewards = []
    for name, weight in PREFERENCES.items():
        loader = load_installed("hnkit.rewards", name.removeprefix("rewards."))
        with device:
            reward = loader.skeleton(weight=weight, **options)
        if isinstance(reward, OffCard):
            reward = placed(reward.reward, str(device), offload=True)
        rewards.append(reward)
    return RewardSum(rewards)


def our_step(backend: PipelineBackend, noise: Tensor, given: Condition, reward: Reward) -> None:
    """Forward and backward as hnkit's trainer runs them."""
    f = ConditionedMap(backend.hypernetwork, given)
    terms = LOSS(f, noise, lambda x: backend.generate(x, given), reward)
    terms.total.mean().backward()


def plain_step(backend: PipelineBackend, noise: Tensor, given: Condition, reward: Reward) -> None:
    """The same step written down plainly, without pipeline, loss or backend."""
    base, vae, twin = backend._base, backend.pipeline.vae, backend.hypernetwork.twin
    dtype = base.dtype
    inputs = {
        "encoder_hidden_states": given.tensors["prompt_embeds"],
        "encoder_attention_mask": given.tensors["prompt_attention_mask"],
        "guidance": torch.full((len(noise),), 0.45, device=noise.device, dtype=dtype),
        "timestep": torch.ones(len(noise), device=noise.device),
        "return_dict": False,
    }
    delta = twin(noise.to(dtype), **inputs)[0].float()
    velocity = base((noise + delta).to(dtype), **inputs)[0].float()
    images = vae.decode((-velocity / vae.config.scaling_factor).to(dtype), return_dict=False)[0]
    images = (images / 2 + 0.5).clamp(0, 1).float()
    (delta.square().flatten(1).sum(1) / 2 - reward(images)).mean().backward()


Reward = Callable[[Tensor], Tensor]
Step = Callable[[PipelineBackend, Tensor, Condition, Reward], None]
STEPS: Mapping[str, Step] = {"hnkit": our_step, "plain": plain_step}


def measure(
    step: Step, backend: PipelineBackend, count: int, rounds: int, reward: Reward = redness
) -> dict[str, float]:
    """Median seconds per step, images per second, peak GiB (the device's, where there is one)."""
    noise = torch.randn(count, *backend.noise_shape, device=backend.device)
    given = condition(backend, count)
    cuda = backend.device.type == "cuda"
    times = []
    for turn in range(rounds + 1):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step(backend, noise, given, reward)
        backend.hypernetwork.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        if turn:
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    found = {"seconds": seconds, "images_per_second": count / seconds}
    return found | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})


def measured(model: Model, cases: Sequence[Case], batches: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every case, step and batch; where memory runs out, one that says so."""
    for case in cases:
        if model.pipe.vae.device.type == "cuda":
            torch.cuda.empty_cache()
        backend = model.backend(**case.options)
        reward: Reward = redness
        if case.rewards is not None:
            four = four_rewards(case.rewards, backend.device)

            def reward(images: Tensor, four: RewardSum = four) -> Tensor:
                return four(images, ["a prompt"] * len(images))

        for name, step in STEPS.items():
            for count in case.batches or batches:
                if name == "plain" and not case.plain:
                    continue
                row = {"step": name, "batch": count, "options": case.title}
                try:
                    row |= measure(step, backend, count, rounds, reward)
                except (InputError, torch.OutOfMemoryError):
                    backend.hypernetwork.zero_grad(set_to_none=True)
                    torch.cuda.empty_cache()
                    row |= {"out_of_memory": True}
                yield row
        del backend, reward


def shown(row: Mapping[str, Any]) -> str:
    """A row as a line."""
    speed = f"{row['images_per_second']:9.2f}" if "images_per_second" in row else f"{'-':>9}"
    peak = f"{row['peak_gib']:9.1f}" if "peak_gib" in row else f"{'-':>9}"
    note = ": out of memory" if "out_of_memory" in row else ""
    return f"{row['step']:<6} {row['batch']:>5} {speed} {peak}  {row['options'] or 'none'}{note}"


def main() -> None:
    """Measure every combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small layers and 64 px, for a machine without a GPU")
    parser.add_argument("--batches", default="", help="comma-separated batch sizes; default 1,3,6 (tiny: 1,2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("the full size needs a GPU: use --tiny here")
    batches = [int(n) for n in (arguments.batches or ("1,2" if arguments.tiny else "1,3,6")).split(",")]
    print(f"{machine(arguments.tiny)}; torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{'step':<6} {'batch':>5} {'images/s':>9} {'peak GiB':>9}  options")
    rows = []
    for row in measured(sana(arguments.tiny), CASES, batches, arguments.rounds):
        rows.append(row)
        print(shown(row), flush=True)
    if arguments.out:
        document = {"machine": machine(arguments.tiny), "torch": torch.__version__, "rows": rows}
        arguments.out.write_text(json.dumps(document, indent=2))


def sana(tiny: bool) -> Model:
    """SANA-Sprint 0.6B, or small layers of the same classes."""
    return make("sana", tiny, **({"size": 64, "rank": 8, "lora_alpha": 16.0} if tiny else {}))


if __name__ == "__main__":
    main()
