"""Why a noise hypernetwork earns what it earns on the miniature, and what earns more: docs/earning.md.

    python benchmarks/earning.py spectrum       how rough the reward is as a function of the noise
    python benchmarks/earning.py tails          the size of its gradient, in the image, the latents and the noise
    python benchmarks/earning.py bound          what bounding each sample's gradient does to its signal and noise
    python benchmarks/earning.py curvature      exact nats of gradient steps and of the optimum of the L2 loss
    python benchmarks/earning.py stored NAME    train on stored gradients by one of STORED, and measure the map
    python benchmarks/earning.py scaled         the bundled hypernetwork, smaller and larger than it was trained
    python benchmarks/earning.py report         docs/results/earning.json from everything measured so far

Every experiment appends one JSON line to `--results` and can be run again for another seed. What is trained here is
trained on all but 200 of the training sentences and measured on these, by the reward: neither the judge nor a held-out
sentence has a part in choosing a recipe.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hnkit import Frontier, noise_kl
from hnkit.adapters import BUNDLED, load_trained
from hnkit.backend import BackendBase, backend_factory
from hnkit.internal.files import write_json
from hnkit.internal.seeds import generator_for
from hnkit.internal.stats import mean_and_stderr
from hnkit.internal.versions import versions
from hnkit.maps import Condition, ConditionedMap
from hnkit.scaled.digits.scenes import train_prompts, validate_prompt
from hnkit.training.optimize import WeightAverage

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results" / "earning.json"
MEASURED_ON = 200
"""Training sentences that recipes are measured on and not trained on."""
CORRELATIONS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
BOUNDS = (1.0, 3.0, 10.0, 40.0, math.inf)
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
TEMPERATURES = (3.0,)

GRADIENTS = 32768


@dataclass(frozen=True)
class Stored:
    """Training on stored gradients.

    The bound on each, the temperature, the rate, and the least correlation s, uniform between it and 1, of the noise
    that f is given with the one that the gradient was taken at.
    """

    bound: float
    alpha: float
    lr: float = 1e-3
    correlation: float = 1.0
    samples: int = 19200


STORED: dict[str, Stored] = {
    "unbounded": Stored(math.inf, 0.2),
    "bound 12": Stored(12.0, 0.2),
    "bound 3": Stored(3.0, 0.2),
    "bound 1": Stored(1.0, 0.07),
    "bound 3, smoothed": Stored(3.0, 0.2, correlation=0.85),
    "bound 3, three times the rate": Stored(3.0, 0.5, lr=3e-3),
}
SCALES, OF_BUNDLED = (1.0, 0.5), (0.7, 1.0, 1.4)
"""Of a map trained here, of the bundled one: what it earns at fewer nats, and at more."""


def load(**options: Any) -> BackendBase:
    """The miniature, as it starts."""
    factory = backend_factory("digits")
    backend = factory.load(factory.options(**options))
    backend.prepare(train_prompts())
    return backend


def split() -> tuple[list[str], list[str]]:
    """Training sentences for recipes, and those that they are measured on."""
    texts = list(train_prompts())
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(99)).tolist()
    return [texts[i] for i in order[:-MEASURED_ON]], [texts[i] for i in order[-MEASURED_ON:]]


def rewards(backend: BackendBase, x: Tensor, prompts: Sequence[str], condition: Condition | None = None) -> Tensor:
    condition = backend.encode(prompts) if condition is None else condition
    return backend.default_reward(backend.generate(x, condition), prompts)


def gradients(backend: BackendBase, x: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Reward and its gradient in the noise, a row each."""
    leaf = x.detach().clone().requires_grad_()
    value = rewards(backend, leaf, prompts)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


def bounded(slope: Tensor, bound: float) -> Tensor:
    """Gradients `(n, c, h, w)`, longer ones cut to a norm of `bound`."""
    size = slope.flatten(1).norm(dim=1).clamp(min=1e-9)
    return slope * (bound / size).clamp(max=1)[:, None, None, None]


def normal(backend: BackendBase, rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, *backend.noise_shape, generator=generator).to(backend.device)


# --- the landscape ----------------------------------------------------------------------------------------------


def spectrum(seed: int, prompts: int = 32, samples: int = 48) -> dict[str, Any]:
    """Correlation of the reward at noises x and s x + sqrt(1 - s^2) z, which is sum_k p_k s^k.

    p_k is the share of the reward's variance (within a prompt) that its Hermite polynomials of degree k have, and
    E|grad r|^2 / Var r the mean degree.
    """
    backend, draw = load(), generator_for(seed, "earning", "spectrum")
    texts = split()[1]
    rows = []
    for prompt in texts[:prompts]:
        batch, x = [prompt] * samples, normal(backend, samples, draw)
        value, slope = gradients(backend, x, batch)
        centred = value - value.mean()
        covariances = []
        for s in CORRELATIONS:
            other = s * x + math.sqrt(1 - s * s) * normal(backend, samples, draw)
            with torch.no_grad():
                moved = rewards(backend, other, batch)
            covariances.append(float((centred * (moved - moved.mean())).sum() / (samples - 1)))
        rows.append([float(value.var()), float(slope.flatten(1).square().sum(1).mean()), *covariances])
    table = torch.tensor(rows, dtype=torch.float64)
    ratios = {str(s): _jackknifed(table[:, 2 + i], table[:, 0]) for i, s in enumerate(CORRELATIONS)}
    variance = mean_and_stderr(table[:, 0])
    return {"correlation": ratios, "variance": variance, "mean_degree": _jackknifed(table[:, 1], table[:, 0])}


def tails(seed: int, samples: int = 768, batch: int = 64) -> dict[str, Any]:
    """Quantiles of the norm of the reward's gradient: in the image, in the latents that are decoded, in the noise."""
    backend, draw, texts = load(), generator_for(seed, "earning", "tails"), split()[1]
    norms: dict[str, list[Tensor]] = {"image": [], "latents": [], "noise": []}
    seen: dict[str, Tensor] = {}

    def keep(_: Any, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        seen["latents"] = inputs[0]

    hook = backend.pipeline.vae.decoder.register_forward_pre_hook(keep)
    for start in range(0, samples, batch):
        prompts = [texts[(start + i) % len(texts)] for i in range(batch)]
        seen["noise"] = normal(backend, batch, draw).requires_grad_()
        seen["image"] = backend.generate(seen["noise"], backend.encode(prompts))
        seen["image"].retain_grad()
        backend.default_reward(seen["image"], prompts).sum().backward()
        for name, parts in norms.items():
            parts.append(seen[name].grad.flatten(1).norm(dim=1))
    hook.remove()
    shares = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    found: dict[str, Any] = {"quantiles": shares}
    for name, parts in norms.items():
        values = torch.cat(parts).double()
        largest = values.square().sort(descending=True).values
        found[name] = {
            "norms": values.quantile(torch.tensor(shares, dtype=torch.float64)).tolist(),
            "share_of_largest_hundredth": float(largest[: samples // 100].sum() / largest.sum()),
        }
    return found


def bound(seed: int, samples: int = GRADIENTS, batch: int = 64, folds: int = 8) -> dict[str, Any]:
    """Signal and noise of gradients that are bounded sample by sample, for the constant direction of a kind of prompt.

    Within each group (kind of sentence, first digit) the mean of the bounded gradients over one half of the samples
    is multiplied with that over the other half, which estimates |E g|^2 without bias, and with the mean of
    (r - E r) x, whose expectation is E grad r without a bound (Stein). Errors are over folds of the samples.
    """
    data = drawn_gradients(load(), seed, samples, batch)
    flat = (data[key].double().flatten(1) for key in ("x", "slope"))
    return bounded_signal(*flat, data["value"].double(), data["prompts"], folds)


def bounded_signal(x: Tensor, slope: Tensor, value: Tensor, prompts: Sequence[str], folds: int) -> dict[str, Any]:
    """The analysis of `bound`, of samples that are there."""
    parsed = [validate_prompt(text) for text in prompts]
    groups = [f"{p.kind} {p.digits[0]}" for p in parsed]
    order = {name: i for i, name in enumerate(sorted(set(groups)))}
    label = torch.tensor([order[name] for name in groups])
    found: dict[str, Any] = {"groups": len(order), "samples": len(x)}
    for limit in BOUNDS:
        norm = slope.norm(dim=1, keepdim=True)
        cut = slope * (limit / norm.clamp(min=1e-12)).clamp(max=1)
        rows = []
        for fold in range(folds):
            mine = torch.arange(len(x)) % folds == fold
            signal = along = true = count = 0.0
            for group in range(len(order)):
                members = (mine & (label == group)).nonzero()[:, 0]
                halves = members[::2], members[1::2]
                if len(members) < 16:
                    continue
                g = [cut[half].mean(0) for half in halves]
                s = [((value[half] - value[half].mean())[:, None] * x[half]).mean(0) for half in halves]
                weight = len(members)
                signal += weight * float(g[0] @ g[1])
                along += weight * float(g[0] @ s[1] + g[1] @ s[0]) / 2
                true += weight * float(s[0] @ s[1])
                count += weight
            rows.append([signal / count, along / count, true / count])
        columns = torch.tensor(rows, dtype=torch.float64).T
        noise = mean_and_stderr(cut.square().sum(1))
        found[str(limit)] = {
            "second_moment": noise,
            "signal": mean_and_stderr(columns[0]),
            "along_true": mean_and_stderr(columns[1]),
            "true_signal": mean_and_stderr(columns[2]),
        }
    return found


# --- what the nats of a gradient step are ------------------------------------------------------------------------


def hessian(backend: BackendBase, x: Tensor, prompt: str, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Gradient `(d,)` and Hessian `(d, d)` of the reward at one noise `(1, *shape)`, by double backward."""
    dim = x.numel()
    parts = []
    with sdpa_kernel(SDPBackend.MATH):
        for start in range(0, dim, rows):
            leaf = x.expand(rows, *x.shape[1:]).clone().requires_grad_()
            value = rewards(backend, leaf, [prompt] * rows)
            (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            basis = torch.eye(dim)[start : start + rows].view_as(leaf)
            parts.append(torch.autograd.grad((slope * basis).sum(), leaf)[0].flatten(1))
    matrix = torch.cat(parts).double()
    return slope[0].detach().double().flatten(), (matrix + matrix.mT) / 2


def error_term(eigenvalues: Tensor) -> float:
    """E(J) of a symmetric Jacobian with these eigenvalues."""
    return float((eigenvalues - (1 + eigenvalues).abs().log()).sum())


def curvature(seed: int, samples: int = 8, iterations: int = 40) -> dict[str, Any]:
    """Gain, L2 term and exact integrand of f = beta grad r, the same with a bounded gradient, and of the proximal map.

    The Jacobians are those of closed forms in the reward's Hessian H: beta H; beta c/|g| (I - g g'/|g|^2) H where the
    bound c cuts; (I - H/alpha)^-1 - I at the maximum of r/alpha - |u - x|^2/2.
    """
    backend, draw, texts = load(), generator_for(seed, "earning", "curvature"), split()[1]
    x, prompts = normal(backend, samples, draw), texts[:samples]
    base, slopes = gradients(backend, x, prompts)
    methods: dict[str, list[list[float]]] = {}
    for i, prompt in enumerate(prompts):
        gradient, matrix = hessian(backend, x[i : i + 1], prompt)
        size = float(gradient.norm())
        for limit in (math.inf, 3.0):
            scale = min(1.0, limit / max(size, 1e-12))
            moves = torch.stack([x[i] + step * scale * slopes[i] for step in STEPS])
            with torch.no_grad():
                gains = rewards(backend, moves, [prompt] * len(STEPS)) - base[i]
            unit = gradient / max(size, 1e-12)
            jacobian = matrix if scale == 1 else scale * (matrix - torch.outer(unit, unit @ matrix))
            values = torch.linalg.eigvals(jacobian)
            for step, gain in zip(STEPS, gains.tolist(), strict=True):
                z = step * values
                error = float((z.real - (1 + z).abs().log()).sum())
                name = f"gradient, step {step:g}" + ("" if limit == math.inf else f", bounded at {limit:g}")
                methods.setdefault(name, []).append([gain, (step * scale * size) ** 2 / 2, error])
    for alpha in TEMPERATURES:
        moved = ascended(backend, x, prompts, alpha, iterations)
        for i, prompt in enumerate(prompts):
            _, matrix = hessian(backend, moved[i : i + 1], prompt)
            values = 1 / (1 - torch.linalg.eigvalsh(matrix) / alpha) - 1
            with torch.no_grad():
                gain = float(rewards(backend, moved[i : i + 1], [prompt])[0] - base[i])
            l2 = float((moved[i] - x[i]).square().sum()) / 2
            methods.setdefault(f"optimum of eq. 11, alpha {alpha:g}", []).append([gain, l2, error_term(values)])
    return {name: _columns(rows, ("gain", "l2", "error")) for name, rows in methods.items()}


def ascended(
    backend: BackendBase, x: Tensor, prompts: Sequence[str], alpha: float, iterations: int, bound: float = math.inf
) -> Tensor:
    """The proximal map of -r/alpha, by gradient ascent with a step of its own for each sample, gradients bounded."""

    def objective(u: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = gradients(backend, u, prompts)
        slope = bounded(slope, bound)
        return value / alpha - (u - x).flatten(1).square().sum(1) / 2, slope / alpha - (u - x)

    u, step = x.clone(), torch.full((len(x),), 0.1, device=x.device)
    value, slope = objective(u)
    for _ in range(iterations):
        trial = u + step.view(-1, 1, 1, 1) * slope
        found, next_slope = objective(trial)
        better = found > value
        u[better], slope[better], value[better] = trial[better], next_slope[better], found[better]
        step = torch.where(better, step * 1.3, step * 0.4)
    return u


# --- training on stored gradients ---------------------------------------------------------------------------------


def drawn_gradients(backend: BackendBase, seed: int, samples: int, batch: int = 64) -> dict[str, Any]:
    """Noises, rewards and their gradients at sentences drawn at random; a pass of generator and reward each."""
    draw, texts = torch.Generator().manual_seed(seed), split()[0]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    prompts: list[str] = []
    for _ in range(samples // batch):
        names = [texts[i] for i in torch.randint(len(texts), (batch,), generator=draw).tolist()]
        x = normal(backend, batch, draw)
        parts.append((x, *gradients(backend, x, names)))
        prompts += names
    x, value, slope = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"x": x, "value": value, "slope": slope, "prompts": prompts}


def stored(name: str, seed: int, batch: int = 64) -> dict[str, Any]:
    """Train f to first order, |f|^2/2 - <f, g>/alpha, on stored gradients g; measure it at its size and at half of it.

    It costs no pass of generator or reward, a third of a step of the loss, so that it compares ways of treating the
    gradients on the same samples.
    """
    recipe, backend = STORED[name], load()
    data = drawn_gradients(backend, 1, GRADIENTS)
    parameters = [p for p in backend.hypernetwork.parameters() if p.requires_grad]
    average = WeightAverage({str(i): p for i, p in enumerate(parameters)}, 0.98)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(GRADIENTS, generator=draw)
    steps = recipe.samples // batch
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1, (step + 1) / 20) * (1 - step / steps)
        rows = order[step * batch : (step + 1) * batch]
        x, slope = data["x"][rows], data["slope"][rows]
        if recipe.correlation < 1:
            s = recipe.correlation + (1 - recipe.correlation) * torch.rand(batch, 1, 1, 1, generator=draw)
            x = s * x + (1 - s * s).sqrt() * normal(backend, batch, draw)
        slope = bounded(slope, recipe.bound)
        delta = backend.map_for([data["prompts"][row] for row in rows.tolist()])(x)
        loss = (delta.square() / 2 - delta * slope / recipe.alpha).flatten(1).sum(1).mean() * recipe.alpha
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
    with average.applied():
        return {"recipe": asdict(recipe), "scales": {str(scale): measured(backend, scale) for scale in SCALES}}


def scaled(_: int) -> dict[str, Any]:
    """The bundled hypernetwork at other scales, to first order those of other temperatures."""
    backend, _ = load_trained("digits", BUNDLED)
    backend.prepare(train_prompts())
    return {"scales": {str(scale): measured(backend, scale) for scale in OF_BUNDLED}}


@torch.no_grad()
def measured(
    backend: BackendBase,
    scale: float,
    hypernetwork: Callable[[Tensor, Condition], Tensor] | None = None,
    samples: int = 800,
    kl_samples: int = 32,
    frontier: Frontier | None = None,
) -> dict[str, Any]:
    """Gain, L2 term, exact integrand and efficiency of `scale f`, on the sentences that recipes are measured on."""
    prompts = split()[1]
    f_of = backend.hypernetwork if hypernetwork is None else hypernetwork
    texts = [prompts[i % len(prompts)] for i in range(samples)]
    x = normal(backend, samples, torch.Generator().manual_seed(77))
    gains, squares = [], []
    for start in range(0, samples, 64):
        part, names = x[start : start + 64], texts[start : start + 64]
        delta = scale * f_of(part, backend.encode(names))
        gains.append(rewards(backend, part + delta, names) - rewards(backend, part, names))
        squares.append(delta.flatten(1).square().sum(1) / 2)

    def scaled(noise: Tensor, condition: Condition) -> Tensor:
        moved: Tensor = scale * f_of(noise, condition)
        return moved

    f = ConditionedMap(scaled, backend.encode(texts[:kl_samples]))
    with torch.enable_grad():
        kl = noise_kl(f, x[:kl_samples], method="exact")
    gain, l2 = mean_and_stderr(torch.cat(gains)), mean_and_stderr(torch.cat(squares))
    # the L2 term is known from all samples, so that only E(J) is taken from the few
    error = mean_and_stderr(kl.per_sample - torch.cat(squares)[:kl_samples])
    nats = l2[0] + error[0]
    found = {"gain": gain, "l2": l2, "kl": (nats, math.hypot(l2[1], error[1])), "efficiency": None}
    frontier = base_frontier(backend) if frontier is None else frontier
    if nats < frontier.most_nats:
        bought = frontier.point(nats).gain
        found["efficiency"] = (gain[0] / bought, gain[1] / bought)
    return found


def base_frontier(backend: BackendBase, count: int = 50, samples: int = 96) -> Frontier:
    """The frontier of those sentences, from base images."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return Frontier(
            [rewards(backend, normal(backend, samples, draw), [text] * samples) for text in split()[1][:count]]
        )


# --- records ----------------------------------------------------------------------------------------------------


def _jackknifed(top: Tensor, bottom: Tensor) -> tuple[float, float]:
    """Ratio of sums over prompts, with the jackknife's error over them."""
    n = len(top)
    without = (top.sum() - top) / (bottom.sum() - bottom)
    return float(top.sum() / bottom.sum()), math.sqrt((n - 1) / n * float((without - without.mean()).square().sum()))


def _columns(rows: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, Any]:
    table = torch.tensor(rows, dtype=torch.float64)
    return {name: mean_and_stderr(table[:, i]) for i, name in enumerate(names)}


LANDSCAPE: dict[str, Callable[[int], dict[str, Any]]] = {
    "spectrum": spectrum,
    "tails": tails,
    "bound": bound,
    "curvature": curvature,
    "scaled": scaled,
}


def report(results: Path) -> None:
    """The newest record of each experiment and seed, as docs/results/earning.json."""
    newest: dict[str, Any] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        newest[f"{record['experiment']}/{record['seed']}"] = record
    write_json(OUT, {"records": [newest[key] for key in sorted(newest)], "versions": versions()})


def main() -> None:
    """Parse the command line and run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[*LANDSCAPE, "stored", "report"])
    parser.add_argument("name", nargs="?", choices=list(STORED), help="of what is trained on stored gradients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("runs/earning.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.experiment == "report":
        report(arguments.results)
        return
    if arguments.experiment == "stored":
        if arguments.name is None:
            parser.error(f"name one of {', '.join(STORED)}")
        found = stored(arguments.name, arguments.seed)
    else:
        found = LANDSCAPE[arguments.experiment](arguments.seed)
    name = arguments.experiment if arguments.name is None else f"stored {arguments.name}"
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"experiment": name, "seed": arguments.seed, **found}) + "\n")


if __name__ == "__main__":
    main()
