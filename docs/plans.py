"""What training on each published model needs: `docs/results/plans.json`, counted without a card and without weights.

    python docs/plans.py            every model, a few minutes
    python docs/plans.py flux       those whose name holds the word; the others stay as they are

Nothing of it is measured. Each model is planned as a first run would be: one image a step at the model's own size, the
paper's four rewards, LoRA of rank 64, AdamW, and no memory option.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hnkit.config import resolve_config
from hnkit.scaled.pipelines.factory import PREFERENCES
from hnkit.scaled.pipelines.published import PUBLISHED_MODELS
from hnkit.training.plan.cards import CARDS, SHARE
from hnkit.training.plan.plan import Counter, as_document, plan_training

RESULTS = Path(__file__).resolve().parent / "results" / "plans.json"
ON = ("rtx-4090", "l40s", "h100")
"""A card of 24, of 48 and of 80 GiB."""
COMMON = (
    "train.batch=1", "train.accumulate=1", "train.optimizer=adamw", "backend.rank=64",
    "backend.vae_checkpointing=false", "backend.hypernetwork_checkpointing=false",
    "backend.generator_checkpointing=false",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One row of the table."""

    title: str
    backend: str
    model_id: str
    size: int


MODELS = (
    Planned("SANA-Sprint 0.6B", "sana", "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers", 1024),
    Planned("SD-Turbo", "sd-turbo", "stabilityai/sd-turbo", 512),
    Planned("SDXL-Turbo", "sdxl-turbo", "stabilityai/sdxl-turbo", 512),
    Planned("SD 3.5 Large Turbo", "sd3.5-turbo", "stabilityai/stable-diffusion-3.5-large-turbo", 1024),
    Planned("Z-Image-Turbo", "z-image-turbo", "Tongyi-MAI/Z-Image-Turbo", 1024),
    Planned("FLUX.2-klein-4B", "flux2-klein", "black-forest-labs/FLUX.2-klein-4B", 1024),
    Planned("FLUX.1-schnell, 512 px", "flux", "black-forest-labs/FLUX.1-schnell", 512),
    Planned("FLUX.1-schnell, 1024 px", "flux", "black-forest-labs/FLUX.1-schnell", 1024),
    Planned("Qwen-Image", "qwen-image", "Qwen/Qwen-Image", 1024),
)


def planned(model: Planned) -> dict[str, Any]:
    """The plans of one model on every card; its parts are counted once."""
    rewards = {name.removeprefix("rewards."): weight for name, weight in PREFERENCES.items()}
    config = resolve_config(
        backend=model.backend,
        overrides=[*COMMON, f"backend.model_id={model.model_id}", f"backend.size={model.size}"],
        rewards=[f"{name}={weight}" for name, weight in rewards.items()],
    )
    counter = Counter(config)
    found = {}
    for name in ON:
        document = as_document(plan_training(config, CARDS[name], counter=counter))
        found[name] = {key: document[key] for key in ("fits", "need", "cures", "least")}
    known = PUBLISHED_MODELS[model.model_id]
    about = {"parameters": known.parameters, "source": known.source, "size": model.size, "model_id": model.model_id}
    about["backend"] = model.backend
    return about | {"cards": found}


def main() -> None:
    """Count and write."""
    for model in MODELS:
        if all(word in model.title.lower() for word in sys.argv[1:]):
            print(model.title, flush=True)
            found = planned(model)
            document: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
            models = document["models"] | {model.title: found}
            document |= {"share": SHARE, "cards": {name: CARDS[name].title for name in ON}}
            document["models"] = {row.title: models[row.title] for row in MODELS if row.title in models}
            RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
