"""The backend `digits`: the `sana` backend on the bundled miniature, with its own prompts, reward and judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hnkit.backend import Reward
from hnkit.maps import Condition
from hnkit.scaled.digits.checkpoint import (
    ADAPTER_FOLDER,
    CANVAS,
    GUIDANCE_SCALE,
    JUDGE_FILE,
    MAX_SEQUENCE_LENGTH,
    model_folder,
    verified_folder,
)
from hnkit.scaled.digits.propose import propose
from hnkit.scaled.digits.scenes import eval_prompts, train_prompts, training_mixture, validate_prompt
from hnkit.scaled.lora.adapter import Adapter
from hnkit.scaled.pipelines.backend import PipelineBackend
from hnkit.scaled.pipelines.factory import PipelineFactory, Preset
from hnkit.scaled.pipelines.families.sana import SanaOptions
from hnkit.scaled.pipelines.families.table import SANA_SPRINT
from hnkit.scaled.pipelines.options import PipelineOptions

BUNDLED_MODEL = "hnkit-digits"
"""What adapters of the bundled folder call their base."""


@dataclass(frozen=True, kw_only=True)
class DigitsOptions(SanaOptions):
    """Options of the backend `digits`: SANA's, at the miniature's size."""

    model_id: str = ""
    """A folder in place of the bundled one."""
    size: int = CANVAS
    rank: int = 16
    lora_alpha: float = 32.0
    guidance: float = GUIDANCE_SCALE
    max_sequence_length: int = MAX_SEQUENCE_LENGTH
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cache_dir: str = ""
    self_check: bool = False
    """The bundled files are known by their checksums, and checked where they were made."""
    weigh_kinds: bool = False
    """Train on the kinds of sentences in the proportions that the generator was trained in, instead of each sentence
    as often as any other."""

    def folder(self) -> Path:
        """The model's folder, every file of it checked.

        Raises:
            InputError: a file is missing or damaged.
        """
        return verified_folder(Path(self.model_id) if self.model_id else None)


class DigitsBackend(PipelineBackend):
    """`PipelineBackend` on the miniature; its prompts are sentences of a small grammar."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Embeddings of the sentences; `InputError` for one outside the grammar."""
        if not isinstance(prompts, str):
            prompts = [validate_prompt(prompt).text for prompt in prompts]
        return super().encode(prompts)

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode a set of sentences into the cache; `InputError` for one outside the grammar."""
        super().prepare([validate_prompt(prompt).text for prompt in prompts])

    def prompts(self) -> tuple[list[str], list[str]]:
        """Training sentences, rare kinds several times where kinds are weighed, and held-out ones, disjoint."""
        assert isinstance(self.options, DigitsOptions)
        return list(training_mixture() if self.options.weigh_kinds else train_prompts()), list(eval_prompts())

    @cached_property
    def default_reward(self) -> Reward:  # type: ignore[override]
        """The bundled contrastive scorer."""
        from hnkit.scaled.digits.rewards import scorer

        return scorer(Path(self.options.model_id), device=str(self.device))

    def judge(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """1 where the independent judge finds what the sentence asks for, else 0; `(n,)`."""
        correct: Tensor = self._judge(images, prompts).correct
        return correct

    def category(self, prompt: str) -> str:
        """Which of GenEval's six kinds a sentence is of."""
        return validate_prompt(prompt).kind

    def scenes(self, images: Tensor) -> list[tuple[int, ...]]:
        """What the judge reads in each image, as a hashable tuple: images of one scene differ in style only."""
        cells, _ = self._judge.read(images)
        return [tuple(row) for row in cells.flatten(1).tolist()]

    def propose(
        self, prompt: str, history: Sequence[tuple[str, float]], count: int, generator: torch.Generator
    ) -> list[str]:
        """Rewordings within the grammar, for the prompt-optimisation baseline."""
        return propose(prompt, history, count, generator)

    def usage(self) -> str:
        """Python code that uses the saved adapter, naming the bundled folder as each machine finds it."""
        folder = repr(self.options.model_id)
        code = super().usage()
        if not self._is_bundled or folder not in code:
            return code
        return "from hnkit.scaled.digits.checkpoint import model_folder\n" + code.replace(folder, "model_folder()")

    @property
    def _is_bundled(self) -> bool:
        return Path(self.options.model_id) == model_folder()

    def _adapter(self) -> Adapter:
        adapter = super()._adapter()
        # where the package is installed is no part of what the adapter belongs to: its base's probe is
        return replace(adapter, base_model=BUNDLED_MODEL) if self._is_bundled else adapter

    @cached_property
    def _judge(self) -> Any:
        from hnkit.scaled.digits.judge import Judge

        return Judge.load(Path(self.options.model_id) / JUDGE_FILE)


class DigitsFactory(PipelineFactory):
    """The factory of a model that comes with the package: it is wherever the package is installed."""

    def located(self, options: PipelineOptions) -> PipelineOptions:
        """The options with the bundled folder named, every file of it checked."""
        assert isinstance(options, DigitsOptions)
        return replace(options, model_id=str(options.folder()))

    def bundled_adapter(self) -> Path:
        """The folder of the hypernetwork that comes with the model, every file of it checked."""
        return verified_folder() / ADAPTER_FOLDER

    def recorded(self, folder: str | Path) -> dict[str, Any]:
        """What the adapter records but for the model's folder, which is another on each machine."""
        return {key: value for key, value in super().recorded(folder).items() if key != "model_id"}


# What each figure is for stands in docs/earning.md: the bound on each sample's gradient is what earns most. A constant
# rate and an average of the weights, so that a run can be gone on with. The temperature is meant for some 0.6 nats in
# 500 steps; a longer run spends more, so that `long` has a higher one.
_DEFAULT: Preset = {
    "train.optimizer": "adamw",
    "train.lr": 1e-3,
    "train.schedule": "constant",
    "train.warmup": 20,
    "train.clip": 1.0,
    "train.reward_clip": 2.0,
    "train.ema": 0.99,
    "train.batch": 64,
    "train.steps": 500,
    "train.alpha": 0.15,
    "train.measure_samples": 32,
    "train.validate_samples": 158,
    "heldout.legibility": 1.0,
    "heldout.redness": 1.0,
}
_LONG: Preset = {
    "train.steps": 6000,
    "train.alpha": 0.3,
    "train.ema": 0.998,
    "backend.weigh_kinds": True,
    "train.measure_samples": 64,
    "train.validate_samples": 316,
}

FACTORY = DigitsFactory(
    name="digits",
    summary="a trained miniature SANA-Sprint on handwritten digits, 32 px, d = 256; bundled",
    options=DigitsOptions,
    presets={"default": _DEFAULT, "long": _LONG},
    family=SANA_SPRINT,
    backend=DigitsBackend,
)
