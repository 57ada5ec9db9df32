"""How a run ends: the adapter with its model card, report.json, the plots and the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from hnkit.backend import BackendBase
from hnkit.config import RunConfig, reproducing_command
from hnkit.errors import InputError
from hnkit.figures import FIGURES
from hnkit.figures.table import QUANTILES
from hnkit.frontier import page as frontier_page
from hnkit.injection import NoiseInjection
from hnkit.internal.files import atomic_write, encoded, read_plain, write_json
from hnkit.internal.folders import VERDICT_FILE
from hnkit.internal.stats import Estimate
from hnkit.internal.values import finite, number_of, or_nan
from hnkit.internal.versions import versions
from hnkit.maps import NoiseMap
from hnkit.output.images import grid_cells
from hnkit.output.page import (
    Block,
    Cell,
    Code,
    Picture,
    Section,
    Table,
    Text,
    format_estimate,
    format_number,
    write_html,
)
from hnkit.output.plots import image_grid, style, to_png
from hnkit.output.verdict import RunFigures, figures_of, l2_words, verdict_card, with_frontier
from hnkit.tilt import TiltedProblem, affine_coefficients, kl_gaussians
from hnkit.training.checkpoint import folder_digests, replace_folder
from hnkit.training.plots import training_plots
from hnkit.training.validate import Evaluator, prompts_of
from hnkit.training.view import alpha_sentence, effective_alpha, injected_sentence, loss_term, shown_gain, shown_mean

ADAPTER, BEST, REPORT, PAGE = "adapter", "best", "report.json", "report.html"
OUTPUTS = (ADAPTER, BEST, REPORT, PAGE)
"""Files and folders that the end of a run writes, beside its plots."""
_MOMENT_SAMPLES = 2**17
_PAPER = "arxiv:2508.09968"


@dataclass(frozen=True)
class Ending:
    """What the report says of the run as a whole.

    Attributes:
        step: optimiser steps done.
        skipped: batches skipped.
        best: `step` and `loss` of the validation with the lowest loss, whose adapter is kept; `None` if none is.
        provenance: digests of the code, the model and the prompts.
    """

    step: int
    skipped: int
    best: Mapping[str, Any] | None
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class LearnedLaw:
    """The law `N(m, C)` that a map gives the noise, beside the Gaussian optima of the three losses (item e).

    Attributes:
        affine: the map is affine, so `m` and `C` are exact; else they are moments of samples.
        nats: KL of the learned law from the tilted law; exact if affine, else of the Gaussian with these moments.
        targets: loss -> `mean_error` `|m - m*|`, `covariance_error` `|C - C*|_F / |C*|_F` and `nats`, the distance of
            that loss's optimum from the tilted law.
    """

    affine: bool
    nats: float
    targets: dict[str, dict[str, float]]


def learned_law(problem: TiltedProblem, f: NoiseMap, injection: NoiseInjection | None = None) -> LearnedLaw | None:
    """Compare what was learned, as it is deployed, with the closed-form optima of `x + f(x)`.

    `None` for a problem whose optima are not Gaussian.
    """
    gap_of_affine = getattr(problem, "gap_of_affine", None)
    if gap_of_affine is None or "gap_of_affine" in problem.unavailable:
        return None
    dim = problem.noise_shape[0]
    clipped = injection is not None and injection.max_delta is not None
    coefficients = None if clipped else affine_coefficients(f, dim)
    if coefficients is not None:
        slope, mean = coefficients
        covariance = slope @ slope.mT
    else:
        x = torch.randn(_MOMENT_SAMPLES, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            delta = f(x)
        moved = x + (delta if injection is None else injection.clipped(delta))
        mean, covariance = moved.mean(0), moved.mT.cov()
    if injection is not None:
        identity = torch.eye(dim, dtype=torch.float64)
        mean, covariance = injection.kept * mean, (1 - injection.share) * covariance + injection.share * identity
    targets: dict[str, dict[str, float]] = {}
    laws = {}
    optima = (("exact", problem.optimal_map()), ("l2", problem.l2_map()), ("second-order", _second_order(problem)))
    for name, optimum in optima:
        found = affine_coefficients(optimum, dim)
        assert found is not None, "the optima of a linear-Gaussian problem are affine"
        law = found[1], found[0] @ found[0].mT
        laws[name] = law
        targets[name] = {
            "mean_error": float((mean - law[0]).norm()),
            "covariance_error": float((covariance - law[1]).norm() / law[1].norm()),
            "nats": float(gap_of_affine(*found)),
        }
    return LearnedLaw(coefficients is not None, kl_gaussians(mean, covariance, *laws["exact"]), targets)


def _second_order(problem: TiltedProblem) -> NoiseMap:
    optimum: NoiseMap = problem.second_order_map()  # type: ignore[attr-defined]
    return optimum


def finished_report(folder: Path) -> dict[str, Any] | None:
    """The report of a finished run, or `None`: it is the last file that a run writes.

    Raises:
        InputError: it is there and may not be read.
    """
    try:
        document = json.loads(read_plain(folder / REPORT))
    except PermissionError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): mend that and try again") from error
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(document, dict) and {"step", "skipped"} <= document.keys() and (folder / ADAPTER).is_dir()
    return document if whole else None


def finish_run(config: RunConfig, evaluator: Evaluator, folder: Path, ending: Ending) -> dict[str, Any]:
    """Save the adapter and write the report; whatever a killed attempt left is replaced.

    What somebody else has put into the folder of the adapter stays there.

    Args:
        config: the configuration of the run.
        evaluator: its network holds the weights to save.
        folder: the run folder.
        ending: the ending of the run as a whole.

    Returns:
        What report.json holds. It has no times or dates in it: equal runs have equal reports.
    """
    records = [json.loads(line) for line in read_plain(folder / "metrics.jsonl").decode().splitlines()]
    measurement = next((r["measurement"] for r in reversed(records) if r.get("measurement")), None)
    latest: dict[str, Any] = next((r for r in reversed(records) if r.get("measurement") or "not_measured" in r), {})
    validation = next((r["validation"] for r in reversed(records) if "validation" in r), None)
    frontier = next((r["frontier"] for r in reversed(records) if "frontier" in r), None)
    problem = evaluator.problem
    law = None
    if problem is not None and measurement is not None:
        law = learned_law(problem, evaluator.map_for([evaluator.prompts[0]]), config.train.deployment)
    dim = math.prod(evaluator.backend.noise_shape)
    report: dict[str, Any] = {
        "title": f"hnkit train: {config.backend}",
        "step": ending.step,
        "skipped": ending.skipped,
        "best": ending.best,
        "noise_shape": list(evaluator.backend.noise_shape),
        "rewards": {reward.name: reward.weight for reward in evaluator.rewards.rewards},
        "temperature": _temperature(config, evaluator.backend),
        "effective_alpha": None if config.train.objective == "direct" else effective_alpha(config.train, dim),
        "measurement": measurement,
        "not_measured": latest.get("not_measured"),
        "validation": validation,
        "frontier": frontier,
        "closed_form": None if law is None else {"affine": law.affine, "nats": law.nats, "targets": law.targets},
        "config": config.to_dict(),
        "versions": versions(),
    }
    report = finite(report)
    card = verdict_card(run_figures(report))
    report["verdict"] = card.to_json()
    replace_folder(folder / ADAPTER, lambda target: _write_adapter(target, config, evaluator.backend, report))
    report["provenance"] = {**ending.provenance, "adapter": folder_digests(folder / ADAPTER)}
    drawn = None
    if frontier is not None and frontier["frontier"]:
        drawn = frontier_page.plot(frontier)
        atomic_write(folder / "frontier.png", drawn)
    pictures = []
    for plot in training_plots(records, problem, config.train):
        png = plot.png()
        atomic_write(folder / f"{plot.name}.png", png)
        pictures.append(Picture(png, plot.caption))
    if validation is not None and validation["images"]:
        pictures.insert(0, _samples(read_plain(folder / validation["images"]), validation["prompts"]))
    command = reproducing_command(config)
    write_html(
        folder / PAGE, report["title"], _sections(report, pictures, drawn, command), lead=_lead(report), card=card
    )
    write_json(folder / REPORT, report)
    return report


def run_figures(report: Mapping[str, Any]) -> RunFigures:
    """What the card of a run rests on, from its report."""
    known = replace(
        figures_of(None if report["not_measured"] else report["measurement"]),
        alpha=report["effective_alpha"],
        trained_with=report["config"]["train"]["kl"],
        tuned=report["config"]["train"]["objective"] == "direct",
        dim=math.prod(report["noise_shape"]),
    )
    scores = (report["validation"] or {"scores": {}})["scores"]
    gains = {name: Estimate(s["gain"], or_nan(s["gain_stderr"])) for name, s in scores.items() if s["gain"] is not None}
    known = replace(known, gain=gains.get("reward"), judge=gains.get("judge"))
    frontier = report["frontier"] or {}
    method = next(iter(frontier.get("methods", {}).values()), None)
    return known if method is None else with_frontier(known, method, frontier["frontier"])


def _samples(png: bytes, prompts: Sequence[str]) -> Picture:
    """The images of the last validation under their prompts, small ones enlarged."""
    base, steered = grid_cells(png, len(prompts))
    with style():
        drawn = to_png(image_grid({"base": base, "steered": steered}, prompts))
    return Picture(
        drawn, "Base and steered images at the end, each column from the same noise and prompt.", samples=True
    )


def _write_adapter(target: Path, config: RunConfig, backend: BackendBase, report: Mapping[str, Any]) -> None:
    backend.save_adapter(target)
    (target / "README.md").write_bytes(encoded(model_card(config, backend, report)))
    if "verdict" in report:
        (target / VERDICT_FILE).write_text(
            json.dumps(report["verdict"], indent=2, ensure_ascii=False), encoding="utf-8"
        )


def write_adapter(
    target: Path,
    config: RunConfig,
    backend: BackendBase,
    *,
    step: int,
    skipped: int,
    rewards: Mapping[str, float],
    measurement: Mapping[str, Any] | None = None,
) -> None:
    """Save the network as it is along the way, with a card that says what is known of it by then."""
    report = {
        "step": step,
        "skipped": skipped,
        "rewards": rewards,
        "temperature": _temperature(config, backend),
        "measurement": measurement,
    }
    _write_adapter(target, config, backend, report)


def model_card(config: RunConfig, backend: BackendBase, report: Mapping[str, Any]) -> str:
    """The README.md of an adapter: what it was trained for, how far L2 is from the KL, and how to use it.

    It begins with the metadata block by which the Hugging Face Hub finds an adapter and links it to its base model.
    """
    options = config.to_dict()["backend"]
    source = {key: options[key] for key in ("model_id", "problem") if options.get(key)}
    base = ", ".join([config.backend, *map(str, source.values())])
    rewards = ", ".join(f"{name} (weight {weight:g})" for name, weight in report["rewards"].items())
    lines = [
        "# Noise hypernetwork" if config.train.objective == "hypernoise" else "# Fine-tuned generator (baseline)",
        "",
        f"- Base: {base}",
        f"- Reward: {rewards}",
        f"- Prompts: {_prompt_source(config)}",
        f"- Training: {number_of(report['step'], 'step')} of {number_of(config.train.batch, 'sample')}, loss with "
        f"{_term(config)}, seed {config.train.seed}, {number_of(report['skipped'], 'batch', 'batches')} skipped",
        *([f"- Started from: the adapter {config.train.from_adapter}"] if config.train.from_adapter else []),
        f"- {report['temperature']}",
    ]
    if (injection := config.train.deployment) is not None:
        most = "" if injection.max_delta is None else f", |f| at most {injection.max_delta:g}"
        share = f"1 - a^2 = {injection.share:g}{most}"
        lines += [f"- Deployed with fresh noise eps: x_hat = a (x + f(x)) + sqrt(1 - a^2) eps, {share}"]
    if (report["measurement"] or {}).get("l2_verdict"):
        lines += [f"- {l2_words(report['measurement']['l2_verdict'], config.train.kl)}"]
    lines += [f"- {name}: {value}" for name, value, _ in _figures(report["measurement"])]
    lines += [f"- {_unmeasured(report)}"] if report.get("not_measured") else []
    if (report.get("frontier") or {}).get("methods"):
        lines += [f"- {sentence}" for sentence in frontier_page.sentences(report["frontier"])]
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items() if key != "name")
    usage = backend.usage
    plain = (
        "from pathlib import Path",
        "from hnkit.backend import backend_factory",
        f"factory = backend_factory({config.backend!r})",
        f"backend = factory.load(factory.options({arguments}))",
        'backend.load_adapter(Path("."))  # this folder',
    )
    code = usage() if usage is not None else "\n".join(plain)
    use = ("## Use", "", "`adapter` is the folder of this card.", "", "```python", code, "```")
    text = "\n".join([*lines, "", *use, ""])
    return str(ModelCard(f"---\n{_metadata(config, backend).to_yaml()}\n---\n\n{text}"))


def _metadata(config: RunConfig, backend: BackendBase) -> ModelCardData:
    model = str(config.to_dict()["backend"].get("model_id", ""))
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not Path(model).exists()
    return ModelCardData(
        base_model=model if hub else None,
        base_model_relation="adapter" if hub else None,
        library_name="hnkit",
        pipeline_tag="text-to-image" if len(backend.noise_shape) > 1 else None,
        datasets=_data_sets(config),
        tags=["noise-hypernetwork" if config.train.objective == "hypernoise" else "reward-fine-tuning", _PAPER],
    )


def _data_sets(config: RunConfig) -> list[str] | None:
    """The data set on the Hub that the prompts are of, where they are of one: `hf:NAME[:split[:column]]`."""
    kind, _, rest = config.train.prompts.partition(":")
    return [rest.partition(":")[0]] if kind == "hf" else None


def _prompt_source(config: RunConfig) -> str:
    """Where the prompts came from, without a folder of this machine."""
    given = config.train.prompts
    return f"the data set {given[3:]}" if given.startswith("hf:") else Path(given).name or "the backend's own"


def _term(config: RunConfig) -> str:
    """What stands for the KL in the loss, in words."""
    term = loss_term(config.train)
    return "no divergence term" if term is None else f"the {term[1]}"


def _temperature(config: RunConfig, backend: BackendBase) -> str:
    if config.train.objective == "direct":
        return "direct fine-tuning: no KL term, so no tilted law is aimed at"
    return alpha_sentence(config.train, torch.Size(backend.noise_shape).numel())


def _figures(measurement: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Name, value and explanation of what was measured."""
    if measurement is None:
        return []
    m: dict[str, Any] = {key: or_nan(value) for key, value in measurement.items()}
    share = f"{format_estimate(100 * m['relative_error'], 100 * m['relative_error_stderr'])} %"
    certain = "the KL" if m["injective"] == "certified" else "a lower bound of the KL: injectivity is not certified"
    bias = measurement["bias_bound"]
    shown = {
        "kl": f"{format_estimate(m['kl'], m['kl_stderr'], bias)} nats",
        "l2": f"{format_estimate(m['l2'], m['l2_stderr'])} nats",
        "error": f"{format_estimate(m['error'], m['error_stderr'])} nats",
        "relative_error": share,
        "symmetry_index": format_number(m["symmetry_index"]),
        "mean_shift_share": format_number(m["mean_shift_share"]),
    }
    rows = [(FIGURES[key].name, value, FIGURES[key].note) for key, value in shown.items()]
    rows[0] = (rows[0][0], rows[0][1], f"method {m['method']}; {certain}")
    names = {**QUANTILES, "max": "largest"}
    norms = ", ".join(f"{names[level]} {format_number(value, 3)}" for level, value in m["local_norm"].items())
    quantiles = "quantiles of the samples: an estimate, no bound on the Lipschitz constant"
    rows.append(("local norm |J(x)|₂", norms, measurement.get("local_norm_note") or quantiles))
    if injected := measurement.get("injected"):
        rows = [(f"{name} of x + f(x), not deployed", value, note) for name, value, note in rows]
        rows.insert(0, _deployed(injected))
    if measurement["gap"] is not None:
        gap = f"{format_estimate(m['gap'], m['gap_stderr'])} nats"
        rows.append(("Distance from the optimum", gap, "KL of the learned noise law from the tilted law"))
    return rows


def _deployed(injected: Mapping[str, Any]) -> tuple[str, str, str]:
    """The row of the KL of what is deployed with injected noise."""
    value = f"at most {format_estimate(injected['nats'], or_nan(injected['nats_stderr']))} nats; the mean is estimated"
    return "KL of the deployed law", value, injected_sentence(injected)


def _unmeasured(report: Mapping[str, Any]) -> str:
    """Why there is no KL of the finished network, where that is so."""
    earlier = "; the figures are those of an earlier step" if report["measurement"] is not None else ""
    return f"KL and L2 term were not measured at the end: {report['not_measured']}{earlier}"


def _lead(report: Mapping[str, Any]) -> str:
    parts = [
        f"{number_of(report['step'], 'step')}, {number_of(report['skipped'], 'batch', 'batches')} skipped.",
        f"{report['temperature']}.",
    ]
    best = report["best"]
    if best is not None and best["step"] != report["step"]:
        parts.append(f"The lowest held-out loss was that of step {best['step']}; its adapter is in the folder {BEST}.")
    return " ".join(part[0].upper() + part[1:] for part in parts)


def _sections(
    report: Mapping[str, Any], pictures: Sequence[Picture], drawn: bytes | None, command: str
) -> list[Section]:
    sections = []
    figures = _figures(report["measurement"])
    blocks: list[Block] = [Table(("figure", "value", ""), tuple(figures))] if figures else []
    if report.get("not_measured"):
        blocks.append(Text(_unmeasured(report)))
    if blocks:
        sections.append(Section("How close L2 stays", tuple(blocks)))
    if report["closed_form"]:
        sections.append(Section("What was learned", _closed_form_blocks(report)))
    if report["validation"]:
        rows: list[tuple[Cell, ...]] = [
            (name, s["role"], shown_mean(s, "base"), shown_mean(s, "steered"), shown_gain(s))
            for name, s in report["validation"]["scores"].items()
        ]
        caption = (
            f"Means over {prompts_of(report['validation'])}; base and steered outputs share noise and prompt, and the "
            "gain is paired. A trained reward that rises while held-out ones fall is being exploited."
        )
        headers = ("score", "role", "base", "steered", "gain ± standard error")
        sections.append(Section("Base and steered outputs", (Table(headers, tuple(rows), caption),)))
    frontier = report.get("frontier")
    if frontier is not None:
        sections.append(frontier_page.section(frontier, drawn, say=frontier_page.sentences(frontier)))
    if pictures:
        sections.append(Section("Plots", tuple(pictures)))
    configuration = json.dumps({**report["config"], "versions": report["versions"]}, indent=2, ensure_ascii=False)
    sections.append(Section("Configuration", (Code(configuration, "Resolved configuration and versions"),)))
    where = Text("In the run folder, whose config.toml has every setting:")
    return [*sections, Section("Reproduce", (where, Code(command)))]


def _closed_form_blocks(report: Mapping[str, Any]) -> tuple[Block, ...]:
    law = report["closed_form"]
    names = {"exact": "exact KL: N(Sb, S)", "l2": "L2: N(Sb, S²)", "second-order": "second order"}
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (names[name], target["mean_error"], target["covariance_error"], target["nats"])
        for name, target in law["targets"].items()
    )
    how = "exactly, the map being affine" if law["affine"] else f"from the moments of {_MOMENT_SAMPLES} samples"
    text = (
        f"The learned noise law is {format_number(law['nats'])} nats from the tilted law ({how}). Below: its distance "
        "from the optimum of each loss, and how far that optimum itself is from the tilted law."
    )
    headers = ("optimum of", "mean error |m - m*|", "covariance error |C - C*| / |C*|", "its nats from the tilted law")
    return Text(text), Table(headers, rows)
