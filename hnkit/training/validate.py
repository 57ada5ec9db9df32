"""What is looked at during a run: the KL both ways, and base beside steered outputs on the validation prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.backend import BackendBase, steer
from hnkit.config import TrainConfig
from hnkit.figures import Measurement, measure
from hnkit.injection import deployed_noise
from hnkit.internal.files import atomic_write
from hnkit.internal.seeds import derived_seed, generator_for, seed_global
from hnkit.internal.stats import mean_and_stderr
from hnkit.maps import Condition, ConditionedMap, NoiseMap, slices
from hnkit.output.images import grid_png
from hnkit.prompts import spread
from hnkit.rewards import RewardSum
from hnkit.tilt import TiltedProblem
from hnkit.training.processes import Processes, SameEverywhere

SAMPLES = "samples"
_GRID_PAIRS = 8


def prompts_of(validation: Mapping[str, Any]) -> str:
    """What the prompts of a validation are called: only those that were not trained on are held out."""
    return "held-out prompts" if validation.get("held_out", True) else "the training prompts"


@dataclass(frozen=True)
class Validation:
    """One comparison of base and steered outputs.

    Attributes:
        record: what metrics.jsonl holds of it, see `Evaluator.validate`.
        prompts: the prompt of each row.
        base: the trained reward of the base outputs, `(rows,)`.
        steered: that of the steered ones, from the same noises.
        nats: half the square of f, or with injected noise the proved bound of the KL, `(rows,)`.
    """

    record: dict[str, Any]
    prompts: tuple[str, ...]
    base: Tensor
    steered: Tensor
    nats: Tensor


@dataclass(frozen=True)
class Evaluator:
    """Measurements of one run, always on the same noise and the same prompts, so that they are paired.

    Attributes:
        settings: the settings of the run.
        base: the backend whose plain outputs are the comparison.
        backend: the backend that is trained (the same, or its direct fine-tuning twin).
        rewards: what is trained on.
        heldout: what is only reported.
        prompts: what it is measured on.
        held_out: whether none of them is trained on.
        device: the device of the network.
        together: the processes that make each measurement together, all of it in each of them, because the network is
            shared out over them; `None`: this one alone.
    """

    settings: TrainConfig
    base: BackendBase
    backend: BackendBase
    rewards: RewardSum
    heldout: RewardSum
    prompts: Sequence[str]
    held_out: bool
    device: torch.device
    together: Processes | None = None

    @property
    def problem(self) -> TiltedProblem | None:
        """The backend's closed-form problem at the run's temperature, if its own reward is what is trained on."""
        problem: TiltedProblem | None = self.backend.problem
        if problem is None or self.rewards.rewards != (self.backend.default_reward,):
            return None
        return problem.with_alpha(self.settings.alpha)

    def map_for(self, prompts: Sequence[str]) -> NoiseMap:
        """The hypernetwork with the conditions of these prompts closed over."""
        f = self.backend.map_for(prompts)
        if self.together is None:
            return f
        assert isinstance(f, ConditionedMap)
        return replace(f, hypernetwork=SameEverywhere(f.hypernetwork, self.together))

    @property
    def measured_prompts(self) -> list[str]:
        """The prompt of each row of a measurement: four rows or more of each, of prompts from all over their order."""
        count = self.settings.measure_samples
        chosen = [self.prompts[place] for place in spread(len(self.prompts), max(1, count // 4))]
        return [chosen[row % len(chosen)] for row in range(count)]

    def measure(self) -> Measurement | None:
        """The KL, the L2 term and their gap; `None` for direct fine-tuning, which moves no noise."""
        settings = self.settings
        if settings.objective == "direct":
            return None
        seed_global(settings.seed, "measure")
        count = settings.measure_samples
        prompts = self.measured_prompts
        return measure(
            self.map_for(prompts),
            self.noise(count, "measure").to(self.device),
            method=settings.measure_method,
            rel_error=settings.measure_rel_error,
            prompts=prompts,
            problem=self.problem,
            generator=generator_for(settings.seed, "measurement probes"),
            injection=settings.deployment,
        )

    @torch.no_grad()
    def validate(self, folder: Path | None, step: int) -> Validation:
        """Scores of base and steered outputs from the same noise and prompts; images are written as a grid.

        Args:
            folder: where `samples/` is; `None`: another process writes.
            step: the step that the file is named after.

        Returns:
            The rewards of the rows, and the record. `scores`: name -> `role` ("trained", "held out" or "judge"),
            means `base` and `steered`, their paired difference `gain` with `gain_stderr`, the number of `samples`,
            and how many scores were `non_finite` (a mean that holds one is not finite); `loss`: the L2 loss on
            these samples (for direct fine-tuning -reward / alpha); `images`: the file of the grid, or `None` for
            outputs that are none; `prompts`, and whether they are `held_out`.
        """
        settings = self.settings
        seed_global(settings.seed, "validate")
        count = settings.validate_samples
        prompts = [self.prompts[row % len(self.prompts)] for row in range(count)]
        noise = self.noise(count, "validate")
        scores: dict[str, dict[str, list[Tensor]]] = {"base": {}, "steered": {}}
        shown: dict[str, list[Tensor]] = {"base": [], "steered": []}
        terms: list[Tensor] = []
        rows = max(1, settings.batch // settings.accumulate)
        for chunk in slices(count, rows):
            part = prompts[chunk]
            outputs, kl = self._pair(noise[chunk].to(self.device), part, range(chunk.start, chunk.stop))
            terms.append(kl.double().cpu())
            for kind, made in outputs.items():
                for name, values in self._scores(made, part).items():
                    scores[kind].setdefault(name, []).append(values.double().cpu())
                shown[kind].append(made[: max(0, _GRID_PAIRS - chunk.start)].float().cpu())
        table = {name: self._compare(name, scores["base"], scores["steered"]) for name in scores["base"]}
        nats = torch.cat(terms)
        term = nats / noise[0].numel() if settings.reduction == "mean" else nats
        loss = float(term.mean()) - table["reward"]["steered"] / settings.alpha
        base, steered = torch.cat(shown["base"]), torch.cat(shown["steered"])
        images = None
        if base.dim() == 4 and base.shape[1] == 3:
            images = f"{SAMPLES}/step-{step:08d}.png"
            if folder is not None:
                (folder / SAMPLES).mkdir(exist_ok=True)
                atomic_write(folder / images, grid_png(base, steered))
        record = {
            "scores": table,
            "loss": loss,
            "images": images,
            "prompts": prompts[: len(base)],
            "held_out": self.held_out,
        }
        before, after = (torch.cat(scores[kind]["reward"]) for kind in ("base", "steered"))
        return Validation(record, tuple(prompts), before, after, nats)

    @torch.no_grad()
    def rewards_of(self, prompts: Sequence[str], numbers: Sequence[int], noise: Tensor, *, steered: bool) -> Tensor:
        """The trained reward of base or steered outputs, `(rows,)`, float64 on the CPU.

        Args:
            prompts: one a row.
            numbers: the number of each row's image; those of the validation are its rows.
            noise: `(rows, *noise_shape)`.
            steered: whether the noise is steered.
        """
        parts = []
        for chunk in slices(len(prompts), max(1, self.settings.batch // self.settings.accumulate)):
            part, x = prompts[chunk], noise[chunk].to(self.device)
            if steered:
                outputs, _ = self._steered(x, part, numbers[chunk])
            else:
                condition = self._conditions(part, numbers[chunk])
                outputs = self.base.generate(x, condition, self.settings.generator_steps)
            parts.append(self.rewards(outputs, part).double().cpu())
        return torch.cat(parts)

    def noise(self, count: int, purpose: str) -> Tensor:
        """Noise that is the run's own for this purpose, `(count, *noise_shape)`."""
        generator = generator_for(self.settings.seed, purpose)
        return torch.randn(count, *self.backend.noise_shape, dtype=self.backend.noise_dtype, generator=generator)

    def _pair(self, noise: Tensor, prompts: Sequence[str], numbers: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Base and steered outputs of images of the prompts, and the KL term of each in the L2 loss, nats.

        Where noise is injected the base's is too: `a x + sqrt(1 - a^2) eps` is base noise, and differs from the steered
        by the delta alone, so that gains are of pairs.
        """
        condition = self._conditions(prompts, numbers)
        fresh = condition.generators("injected noise")
        plain, _ = deployed_noise(self.settings.deployment, noise, torch.zeros_like(noise), fresh)
        base = self.base.generate(plain, condition, self.settings.generator_steps)
        steered, term = self._steered(noise, prompts, numbers)
        return {"base": base, "steered": steered}, term

    def _steered(self, noise: Tensor, prompts: Sequence[str], numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Steered outputs and KL terms: half the square of f, or the proved bound where noise is injected."""
        steps = self.settings.generator_steps
        if self.settings.objective == "direct":
            tuned = self._conditions(prompts, numbers, self.backend)
            return self.backend.generate(noise, tuned, steps), torch.zeros(len(noise))
        steered = steer(self.backend, noise, self._conditions(prompts, numbers), steps)
        injection = self.settings.deployment
        square = steered.delta.flatten(1).double().square().sum(1)
        return steered.images, square * (0.5 if injection is None else injection.nats_per_square)

    def _conditions(
        self, prompts: Sequence[str], numbers: Sequence[int], backend: BackendBase | None = None
    ) -> Condition:
        """The conditions of numbered images: no two of them have any randomness in common."""
        encoder = self.base if backend is None else backend
        return encoder.encode(prompts).of_images(derived_seed(self.settings.seed, "validate"), numbers)

    def _scores(self, outputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        trained = self.rewards.scores(outputs, prompts)
        scores = {"reward": trained.total}
        if len(self.rewards.names) > 1:
            scores |= trained.parts
        scores |= self.heldout.scores(outputs, prompts).parts
        if self.base.judge is not None:
            scores["judge"] = self.base.judge(outputs.clone(), prompts)
        return scores

    def _compare(
        self, name: str, base: Mapping[str, list[Tensor]], steered: Mapping[str, list[Tensor]]
    ) -> dict[str, Any]:
        before, after = torch.cat(base[name]), torch.cat(steered[name])
        gain, stderr = mean_and_stderr(after - before)
        role = "judge" if name == "judge" else "held out" if name in self.heldout.names else "trained"
        figures = {"base": float(before.mean()), "steered": float(after.mean()), "gain": gain, "gain_stderr": stderr}
        broken = {kind: int((~values.isfinite()).sum()) for kind, values in (("base", before), ("steered", after))}
        return {"role": role, **figures, "samples": len(before), "non_finite": broken}
