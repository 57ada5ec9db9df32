"""The bundled hypernetwork's gain, nats and efficiency by a way of their own: docs/results/bundled-again.json.

    python benchmarks/bundled_again.py        a quarter of an hour of one core

Neither `hnkit.kl` nor `hnkit.frontier` has a part in it, nor the noises of the adapter's card: Jacobians are made row
by row, their determinants by numpy in float64, and the frontier is the gain and the KL of base rewards that are
reweighted by `exp(beta r)`, at the beta whose KL is that of the map. Errors are over sentences, that of the
efficiency by a bootstrap of everything together.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnkit.adapters import BUNDLED, load_trained
from hnkit.backend import BackendBase
from hnkit.internal.files import write_json
from hnkit.internal.versions import versions
from hnkit.scaled.digits.scenes import eval_prompts, train_prompts

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "bundled-again.json"
ROWS, REPLICATES = 64, 200


@dataclass(frozen=True)
class Round:
    """How many sentences, base images, steered images and Jacobians of each; seeds of the choice and of the noise."""

    sentences: int
    base: int
    steered: int
    jacobians: int
    choice: int
    noise: int


SETS = {
    "held-out": (eval_prompts, (Round(79, 384, 8, 2, 20271, 987654),)),
    "training": (train_prompts, (Round(40, 256, 8, 2, 20271, 987654), Round(160, 128, 8, 1, 555, 31337))),
}


@dataclass(frozen=True)
class Sentence:
    """What was measured at one sentence: base rewards, gains, `|f|^2 / 2`, KL integrands, and how many folds."""

    base: np.ndarray
    gains: np.ndarray
    l2: np.ndarray
    nats: np.ndarray
    folds: int


def measured(backend: BackendBase, texts: Sequence[str], how: Round) -> list[Sentence]:
    """The sentences of a round."""
    order = np.random.default_rng(how.choice).choice(len(texts), min(how.sentences, len(texts)), replace=False)
    draw = torch.Generator().manual_seed(how.noise)
    return [_sentence(backend, texts[place], how, draw) for place in order]


def _sentence(backend: BackendBase, text: str, how: Round, draw: torch.Generator) -> Sentence:
    x = torch.randn(how.base, *backend.noise_shape, generator=draw)
    few = x[: how.steered]
    with torch.no_grad():
        base = torch.cat([_scores(backend, x[start : start + ROWS], text) for start in range(0, len(x), ROWS)])
        delta = backend.hypernetwork(few, backend.encode([text] * len(few)))
        steered = _scores(backend, few + delta, text)
    found = [integrand(delta[i], jacobian(backend, x[i], text)) for i in range(how.jacobians)]
    return Sentence(
        base.double().numpy(),
        (steered - base[: len(few)]).double().numpy(),
        (delta.double().flatten(1).square().sum(1) / 2).numpy(),
        np.array([nats for nats, _ in found]),
        sum(sign < 0 for _, sign in found),
    )


def _scores(backend: BackendBase, x: Tensor, text: str) -> Tensor:
    texts = [text] * len(x)
    rewards: Tensor = backend.default_reward(backend.generate(x, backend.encode(texts)), texts)
    return rewards


def jacobian(backend: BackendBase, x: Tensor, text: str) -> np.ndarray:
    """The Jacobian of f at one noise `(c, h, w)`, `(d, d)`, by reverse mode."""
    dim, parts = x.numel(), []
    for basis in torch.eye(dim).split(ROWS):
        leaf = x.expand(len(basis), *x.shape).clone().requires_grad_()
        out = backend.hypernetwork(leaf, backend.encode([text] * len(basis))).flatten(1)
        parts.append(torch.autograd.grad((out * basis).sum(), leaf)[0].flatten(1))
    found: np.ndarray = torch.cat(parts).double().numpy()
    return found


def integrand(delta: Tensor, matrix: np.ndarray) -> tuple[float, float]:
    """`|f|^2 / 2 + tr J - log |det (I + J)|`, and the sign of the determinant."""
    sign, log = np.linalg.slogdet(np.eye(len(matrix)) + matrix)
    f = delta.double().flatten().numpy()
    return float(f @ f / 2 + np.trace(matrix) - log), float(sign)


def reweighted(base: Sequence[np.ndarray], nats: float) -> float:
    """The gain of the tilted law that spends `nats`, the mean over sentences, by bisection of its beta."""
    low, high = 1e-3, 50.0
    for _ in range(40):
        beta = math.sqrt(low * high)
        low, high = (beta, high) if _tilted(base, beta)[1] < nats else (low, beta)
    return _tilted(base, low)[0]


def _tilted(base: Sequence[np.ndarray], beta: float) -> tuple[float, float]:
    gain = spent = 0.0
    for rewards in base:
        u = rewards - rewards.mean()
        weights = np.exp(beta * (u - u.max()))
        weights /= weights.sum()
        gain += float(weights @ u)
        spent += float((weights * np.log(np.maximum(weights * len(u), 1e-300))).sum())
    return gain / len(base), spent / len(base)


def summary(found: Sequence[Sentence], replicates: int = REPLICATES) -> dict[str, Any]:
    """Means over sentences with their errors, that of the efficiency by a bootstrap of everything together."""
    columns = {
        "gain": np.array([s.gains.mean() for s in found]),
        "l2": np.array([s.l2.mean() for s in found]),
        "kl": np.array([s.nats.mean() for s in found]),
    }
    record: dict[str, Any] = {
        name: (float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(found)))
        for name, values in columns.items()
    }

    def efficiency(rows: np.ndarray) -> float:
        nats = float(columns["kl"][rows].mean())
        return float(columns["gain"][rows].mean() / reweighted([found[row].base for row in rows], nats))

    draw = np.random.default_rng(1)
    drawn = [efficiency(draw.integers(0, len(found), len(found))) for _ in range(replicates)]
    record["efficiency"] = (efficiency(np.arange(len(found))), float(np.std(drawn)))
    images, noises = (sum(len(getattr(s, key)) for s in found) for key in ("gains", "nats"))
    return record | {
        "sentences": len(found), "images": images, "noises": noises, "folds": sum(s.folds for s in found),
        "base images": [min(len(s.base) for s in found), max(len(s.base) for s in found)],
    }  # fmt: skip


def main() -> None:
    """Measure both sets of sentences and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backend, _ = load_trained("digits", BUNDLED)
    found = {
        name: summary([s for how in rounds for s in measured(backend, list(texts()), how)])
        for name, (texts, rounds) in SETS.items()
    }
    write_json(arguments.out, {"sets": found, "versions": versions()})


if __name__ == "__main__":
    main()
