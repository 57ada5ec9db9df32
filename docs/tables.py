"""The figures of README.md and docs/, generated from the reports in docs/results/: none is typed by hand.

    python docs/tables.py           rewrite the marked blocks and the pictures
    python docs/tables.py --check   exit 1 if one is stale

A block stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`. A picture says in itself what it was drawn from.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hnkit.output.page import Cell, Table, format_estimate, format_number

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- begin:(?P<name>[\w-]+) -->\n).*?(<!-- end:(?P=name) -->)", re.DOTALL)


def _document(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def _cell(cell: Cell) -> str:
    text = cell if isinstance(cell, str) else format_number(cell)
    return text.replace("|", "\\|").replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def to_markdown(table: Table) -> str:
    """A table in Markdown, with its caption below."""
    lines = [
        "| " + " | ".join(header.replace("|", "\\|") for header in table.headers) + " |",
        "| " + " | ".join("---" for _ in table.headers) + " |",
        *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows),
    ]
    return "\n".join([*lines, "", table.caption, ""] if table.caption else [*lines, ""])


def families() -> str:
    """Families of distilled pipelines, from the facts that their tests run."""
    sys.path.insert(0, str(ROOT))
    from tests.scaled.families.facts import FACTS

    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            f"`{name}`",
            facts.models,
            ", ".join(str(steps) for steps in facts.steps),
            {"both": "timesteps, sigmas", "neither": "-"}.get(facts.schedule, facts.schedule),
            "yes" if facts.lora else "no",
            ", ".join(f"`{kind}`" for kind in facts.attached) or "-",
            facts.note or "-",
        )
        for name, facts in FACTS.items()
    )
    caption = (
        "Each is tested on a tiny checkpoint of the real class with random weights: f = 0 gives the plain images bit "
        "for bit at these numbers of steps, gradients agree with finite differences, training raises the reward, an "
        "interrupted run ends with the same adapter, and an adapter is saved, loaded and attached with the same "
        "images, in the class itself and in the others named here. What the class takes as a schedule, and whether it "
        "loads LoRAs, is read off the class. None of these tests ran on trained weights, for none are to be had here."
    )
    headers = ("class", "models", "steps", "schedule", "LoRA", "attached in", "what is special")
    return to_markdown(Table(headers, rows, caption))


def settings() -> str:
    """How published models are called, and where that was read."""
    sys.path.insert(0, str(ROOT))
    from tests.scaled.families.facts import SETTINGS

    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            setting.model,
            f"`{setting.backend}`" if setting.backend else "-",
            f"`{setting.hub}`",
            setting.steps,
            f"{setting.guidance:g}",
            setting.options or "-",
            setting.read,
        )
        for setting in SETTINGS
    )
    caption = (
        "No file of these models could be opened where this was written, and none of them was run here: names and "
        "settings are as the last column says. Training runs one sampler step unless `train.generator_steps` says "
        "more; a model that was distilled for four is best trained at four."
    )
    return to_markdown(Table(("model", "name", "hub", "steps", "guidance", "options", "read in"), rows, caption))


def item_e() -> str:
    """What each loss learns on the linear-Gaussian toy, in nats from the tilted law."""
    rows: list[tuple[Cell, ...]] = []
    for run in _document("item-e")["runs"]:
        law, figures = run["closed_form"], run["measurement"]
        rows.append(
            (
                run["config"]["train"]["kl"],
                law["targets"]["l2"]["covariance_error"],
                law["targets"]["second-order"]["covariance_error"],
                law["targets"]["exact"]["covariance_error"],
                law["targets"]["exact"]["mean_error"],
                law["nats"],
                format_estimate(figures["gap"], figures["gap_stderr"]),
                format_estimate(figures["l2"], figures["l2_stderr"]),
                format_estimate(figures["kl"], figures["kl_stderr"]),
            )
        )
    targets = _document("item-e")["runs"][0]["closed_form"]["targets"]
    theory = ", ".join(f"{name} {format_number(targets[name]['nats'])}" for name in ("l2", "second-order", "exact"))
    caption = (
        "Relative Frobenius distance of the learned covariance from each loss's own optimum (S², 4(2I+H)⁻², S), of the "
        f"learned mean from Sb, and nats from the tilted law. Optima in closed form, nats: {theory}."
    )
    headers = ("trained with", "to S²", "to second order", "to S", "mean to Sb", "nats, from the learned matrix",
               "nats, measured", "L2 term", "exact KL")  # fmt: skip
    return to_markdown(Table(headers, tuple(rows), caption))


def _compare_table(name: str) -> Callable[[], str]:
    def table() -> str:
        from hnkit.scaled.compare.page import all_tables

        # the losses beside each other are of a run of their own
        return to_markdown(all_tables(_document("compare-losses" if name == "losses" else "compare"))[name])

    return table


def compare_lead() -> str:
    """What the comparison found, in words generated from its figures."""
    from hnkit.scaled.compare.page import lead

    return lead(_document("compare")) + "\n"


def compare_readme() -> str:
    """The same for a newcomer: what came out, and what to do about it."""
    from hnkit.scaled.compare.page import card, outcome

    document = _document("compare")
    return f"{outcome(document)} {card(document).sentence}\n"


def bench_exact() -> str:
    """The exact KL against naive code and against its products alone."""
    document = _document("bench-exact")
    rows: list[tuple[Cell, ...]] = []
    for case in document["cases"].values():
        runs = case["runs"]
        rows.append(
            (
                case["title"],
                f"{runs['hnkit']['seconds']:.2f} s",
                f"{case['time_over_naive']:.2f}",
                f"{case['memory_over_naive']:.2f}",
                f"{case['time_over_products']:.2f}",
            )
        )
    headers = ("map", "`noise_kl`", "time / naive", "memory / naive", "time / bare products")
    return to_markdown(Table(headers, tuple(rows), f"Measured on: {document['machine']}."))


def bench_logdet() -> str:
    """Error of Arnoldi after 64 products, and the variance of the best alternative over it."""
    document = _document("bench-logdet")
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            case["exact"],
            case["symmetry_index"],
            f"{100 * case['relative_at_64']:.2f} %",
            f"{100 * case['best_relative_at_64']:.2f} %",
            f"{100 * case['scaled_at_64']:.2f} %",
            f"{case['variance_ratio']:,.3g}",
        )
        for group in ("zoo", "networks")
        for name, case in document[group].items()
    ]
    headers = ("J", "E(J)", "symmetry index", "error after 64 products / E", "with XTrace", "error / (|J|_F² / 2)",
               "variance of the best alternative")  # fmt: skip
    caption = (
        "Root-mean-square errors of one point after 64 products; last column: variance of the best log-det-alone "
        f"estimator over Arnoldi's at equal products. {document['probes']} probes each; {document['machine']}."
    )
    return to_markdown(Table(headers, tuple(rows), caption))


def low_rank() -> str:
    """Errors of the mean E(J) of a trained miniature by methods of 64 products a sample."""
    document = _document("low-rank")
    rows: list[tuple[Cell, ...]] = []
    for name, case in document["methods"].items():
        refused = "refused" in case
        rows.append(
            (name, "refused: a local norm above 1", "", "")
            if refused
            else (name, f"{case['products']:.0f}", f"{case['rms_error']:.5f}", f"{case['spread']:.4f}")
        )
    if (network := document.get("network")) is not None:
        rows.append(
            (
                f"low-rank, default, through the network, {document['samples']} samples",
                f"{network['products']:.0f}",
                f"{abs(network['error']):.5f} (one run)",
                f"{network['spread']:.4f}",
            )
        )
    norms, ranks = document["local_norm"], document["stable_rank"]
    caption = (
        f"E(J) = {format_estimate(*document['error'])} nats, d = {document['dim']}. Root-mean-square error of the mean "
        f"over {document['matrices']} samples against exact determinants, {document['repeats']} repeats, and standard "
        f"deviation of one sample's error. Local norms there: median {norms[1]:.2f}, 90 % {norms[2]:.1f}, largest "
        f"{norms[3]:.1f}; stable rank: median {ranks[1]:.1f}."
    )
    headers = ("method", "products per sample", "error of the mean, nats", "of one sample")
    return to_markdown(Table(headers, tuple(rows), caption))


def controls() -> str:
    """The KL of the same network with and without control variates."""
    document = _document("low-rank")
    control = {name: value for name, value in document["control"].items() if isinstance(value, list)}
    base = control["stein form"][1]
    rows: list[tuple[Cell, ...]] = [
        (name, format_estimate(*value), f"{(base / value[1]) ** 2:.2f}") for name, value in control.items()
    ]
    caption = (
        f"Nats, {document['samples']} samples of which a quarter is {document['samples'] // 4}; last column: variance "
        "of the Stein form at all samples over this one. Correlation of E(J) and tr(J²)/2: "
        f"{document['control']['correlation']:.3f}."
    )
    return to_markdown(Table(("estimate", "KL", "variance ratio"), tuple(rows), caption))


def controls_toys() -> str:
    """How many times fewer samples control variates take on maps whose KL is known."""
    document = _document("controls")

    def cell(found: dict[str, Any]) -> str:
        if "refused" in found:
            return "refused: a local norm above 1"
        difference, stderr = found["difference"]
        ratio = format_estimate(*found["ratio"]) if found["ratio"][0] < 1e9 else "no error is left"
        return f"{ratio} ({difference / stderr:+.1f})"

    rows: list[tuple[Cell, ...]] = [
        (name, f"{found['dim']}", *(cell(found[case]) for case in ("exact", "arnoldi", "two levels")))
        for name, found in document["maps"].items()
    ]
    costly, samples = document["costly"], document["samples"]
    caption = (
        f"Variance of the mean without over that with, ± its error over {document['batches']} batches of {samples} "
        "samples; in brackets how many standard errors the two means differ by, over all batches. First `x·f - tr J` "
        f"regressed out of the exact integrands, then out of Arnoldi's, {document['probes']} probes each, with the "
        f"trace that these see; last Arnoldi at {costly} samples alone, and with the second order at the other "
        f"{samples - costly}."
    )
    headers = ("map", "d", "exact", "arnoldi", "arnoldi and second order")
    return to_markdown(Table(headers, tuple(rows), caption))


def injected_noise() -> str:
    """Gains and nats with injected noise, by the gradient of the reward and by its values alone."""
    document = _document("injected-noise")
    rows: list[tuple[Cell, ...]] = []
    for run in document["runs"]:
        bound = run["injected"]
        nats = (
            format_estimate(run["kl"], run["kl_stderr"])
            if bound is None
            else f"at most {format_estimate(bound['nats'], bound['nats_stderr'])}"
        )
        gain = format_estimate(run["gain"], run["gain_stderr"])
        used = "yes" if run["gradient_of_the_reward"] else "no"
        alpha = f", alpha {run['settings']['alpha']:g}" if "alpha" in run["settings"] else ""
        rows.append((run["name"] + alpha, used, f"{run['reward_calls']:,}", gain, nats, f"{run['cpu_seconds']} s"))
    gains = {run["name"]: run["gain"] for run in document["runs"]}
    draws = next((run for run in document["runs"] if "measured_until" in run), None)
    images, noises = document["runs"][0]["images"], document["common"]["measure_samples"]
    caption = (
        f"{document['common']['steps']} steps, one seed each; ± is the error over {images} held-out images, not over "
        f"seeds, and of the nats over {noises} noises of the first {max(1, noises // 4)} held-out sentences only, "
        "which says little of the others. Nats without injected noise are the mean KL integrand, a lower bound of the "
        "KL where x + f(x) folds; the others are the proved bound. The reward is the miniature's own unless the row "
        "names another, at a temperature of its own."
    )
    if draws is not None:
        share = 100 * draws["gain"] / gains["l2"]
        caption += (
            f" Four draws by the gradient, {share:.0f} % of what L2 gains, were measured with the version of "
            f"{draws['measured_until']}, the last that took them."
        )
    headers = ("run", "gradient of the reward", "reward calls", "gain in reward", "nats", "CPU time")
    return to_markdown(Table(headers, tuple(rows), caption))


def bench_peers() -> str:
    """Hnkit beside its peers at equal products."""
    document = _document("bench-peers")
    rows: list[tuple[Cell, ...]] = [
        (
            name if i == 0 else "",
            case["exact"] if i == 0 else "",
            method,
            format_estimate(run["value"], math.nan if run["stderr"] is None else run["stderr"]),
            run["rmse"],
            f"{run['products']:.0f}",
            f"{run['seconds'] * 1e3:.1f} ms",
        )
        for name, case in document["cases"].items()
        for i, (method, run) in enumerate(case["runs"].items())
    ]
    headers = ("J", "E(J)", "method", "one run", "error of all runs", "products", "time")
    caption = (
        f"d = {document['dim']}, {document['steps']} steps, {document['runs']} runs with seeds of their own; root mean "
        f"square of the error; the fastest run counts. {document['machine']}."
    )
    return to_markdown(Table(headers, tuple(rows), caption))


def bench_products() -> str:
    """What a product costs beside a bare one."""
    document = _document("bench-logdet")
    rows: list[tuple[Cell, ...]] = [(name, f"{cost:.2f}") for name, cost in document["product_cost"].items()]
    return to_markdown(Table(("network", "time per product / bare batched product"), tuple(rows), ""))


def bench_sana() -> str:
    """The SANA-Sprint transformer with random weights."""
    run = _document("bench-sana-logdet")
    configuration = "small layers of the same classes" if run["tiny"] else "the published 0.6B configuration"
    agreement = (
        f"{format_estimate(run['point_error'], run['point_probe_stderr'])} against the exact {run['exact_error']:.4g}"
    )
    rows: list[tuple[Cell, ...]] = [
        ("transformer", f"{configuration}, random weights, {run['dtype'].removeprefix('torch.')}"),
        ("measured on", run["machine"]),
        ("d", f"{run['dim']:,}"),
        ("local norm at the first point", run["local_norm"]),
        ("KL, " + str(run["samples"]) + " points", format_estimate(run["kl"], run["kl_stderr"])),
        ("E(J), mean", run["error"]),
        ("symmetry index", run["symmetry_index"]),
        ("Krylov steps", run["steps"]),
        ("products per second", run["products_per_second"]),
        ("E(J) at the first point, Arnoldi", agreement),
        ("seconds for the exact log-determinant there", run["exact_seconds"]),
    ]
    if "peak_gib" in run:
        rows.append(("peak memory of the device, GiB", run["peak_gib"]))
    return to_markdown(Table(("", "measured"), tuple(rows), ""))


def plans() -> str:
    """What a step of each published model needs, and on which card it fits; counted, not measured."""
    document = _document("plans")
    rows: list[tuple[Cell, ...]] = []
    for title, model in document["models"].items():
        first = next(iter(model["cards"].values()))["need"]
        cells = [_on_card(found) for found in model["cards"].values()]
        size = f"{model['parameters'] / 1e9:.3g} B, {model['size']} px"
        peak, encoding = f"{first['peak'] / 2**30:.1f}, {first['where']}", f"{first['encoding'] / 2**30:.1f}"
        rows.append((title, size, peak, encoding, *cells))
    headers = ("model", "network, image", "peak of a step as it is, GiB", "encoding, GiB", *document["cards"].values())
    caption = (
        "Counted on tensors without values, not measured. One image a step, the paper's four rewards in float32, LoRA "
        "of rank 64 in float32, AdamW, no memory option, prompts as long as each pipeline takes them; 1.5 GiB of a "
        "card are kept free. While prompts are encoded, before the first step, the text encoders lie beside network, "
        "decoder and rewards; then they leave the card. "
        f"Steps per hour are at {100 * document['share']:.0f} % of the card's roofline, an assumption. Where a step "
        "does not fit, the quickest that make it fit of the options that recompute (`vae_checkpointing`, "
        "`generator_checkpointing`, `hypernetwork_checkpointing`) and `lora_autocast`, or the least that they need. "
        "Sizes are read in public repositories that quote the models' configurations, and hold to the published "
        "number of parameters."
    )
    return to_markdown(Table(headers, tuple(rows), caption))


def shared_out() -> str:
    """What evaluation by two processes costs against one."""
    cases = _document("shared-out")["cases"]
    timed = any(case.get("shared") is not None for case in cases.values())
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            f"{case['seconds']['1'][0]:.0f} s",
            " and ".join(f"{used:.0f} s" for used in case["seconds"]["2"]),
            f"{case['loading']:.0f} s",
            f"{case['ratio']:.2f}",
            f"{case['largest_share']:.2f}",
            f"{case['sum_of_shares']:.2f}",
            *((_shareable(case),) if timed else ()),
        )
        for name, case in cases.items()
    ]
    caption = (
        "On the bundled miniature, `python benchmarks/shared_out.py`: CPU time, user and system, of each process on "
        "one thread, not time by the clock. Every process loads, which on so small a model is most of it; the ratios "
        "without loading are of the busier process, of which 0.50 is the least there can be, and of both together."
    )
    headers: tuple[str, ...] = (
        "command", "one process", "each of two", "of it loading", "busier of two / one", "the same without loading",
        "both / one, without loading",
    )  # fmt: skip
    if timed:
        headers += ("shared out; least ratio",)
        caption += (
            " Where it was measured, the last column says how much of one process's time, without loading, is in what "
            "several share out, and the least ratio that this leaves: the rest is done by each of them."
        )
    return to_markdown(Table(headers, tuple(rows), caption))


def _shareable(case: dict[str, Any]) -> str:
    if case.get("shared") is None:
        return "-"
    share = case["shared"] / (case["seconds"]["1"][0] - case["loading"])
    return f"{100 * share:.0f} %; {1 - share / 2:.2f}"


def compiled() -> str:
    """Training steps with compiled blocks and without, on the CPU."""
    document = _document("compiled")
    rows: list[tuple[Cell, ...]] = []
    for name, found in document["models"].items():
        least, most = found["quartiles"]
        gained = found["seconds"] - found["seconds_compiled"]
        rows.append(
            (
                f"`{name}`, {found['parameters'] / 1e6:.1f} M",
                f"{1 / found['seconds']:.2f}",
                f"{1 / found['seconds_compiled']:.2f}",
                f"{found['ratio']:.2f} ({least:.2f} to {most:.2f})",
                f"{found['compiling']:.0f} s",
                f"{found['compiling'] / gained:,.0f}" if gained > 0 else "never",
                f"{found['regions_run']['forward']} of {found['block_calls']}; {found['graphs']}, "
                f"{found['graph_breaks']} breaks",
                f"{found['losses_apart']:.0e}" if found["losses_apart"] else "equal",
            )
        )
    caption = (
        "`python benchmarks/compiled.py`: the real classes with random weights and small layers, "
        f"{document['rows']} rows of 256 tokens, rank {document['rank']}, torch {document['torch']}, one thread of a "
        "CPU; seconds are CPU time. Both kinds of step were taken in turn, after two of each that do not count; the "
        "ratio is the median over pairs, with quartiles. Compiling is of f and generator, with the comparison that it "
        "is refused by if they differ, and comes once a process. Calls are of repeated blocks in one more step, by "
        "torch's profile of it. Losses are of the last step, in float32, and may well be "
        "equal: the rounding of a block is far below that of a mean over an image. On a card it has not been measured."
    )
    headers = (
        "network", "steps per second", "compiled", "ratio", "compiling", "steps that repay it",
        "calls that ran compiled; graphs", "losses apart, relative",
    )  # fmt: skip
    return to_markdown(Table(headers, tuple(rows), caption))


def _on_card(found: dict[str, Any]) -> str:
    """One cell: whether a step fits, by which options, and the pace."""
    if found["fits"]:
        return f"fits; {found['need']['steps_per_hour']:,.0f} steps/h"
    if not found["cures"]:
        return f"no: {found['least'] / 2**30:.1f} GiB at least"
    need = found["cures"][0]
    options = ", ".join(f"`{name}`" for name in need["changes"])
    return f"with {options}: {need['peak'] / 2**30:.1f} GiB, {need['steps_per_hour']:,.0f} steps/h"


def kills() -> str:
    """What was killed, by what, and what became of it."""
    document = _document("kills")
    rows: list[tuple[Cell, ...]] = []
    total: Counter[str] = Counter()
    for name, figures in document["commands"].items():
        total += Counter(figures["kills"])
        by = ", ".join(f"{kind} {count}" for kind, count in figures["kills"].items())
        row = (f"`{name}`", f"{sum(figures['kills'].values())}", by, f"{figures['runs']}", f"{figures['different']}")
        rows.append(row)
    seen = sum((Counter(figures["seen"]) for figures in document["commands"].values()), Counter())
    caption = (
        f"{total.total()} kills in {document['seconds']:.0f} s on {document['machine']}, at most {document['workers']} "
        f"at a time, seed {document['seed']}, Python {document['python']}, torch {document['torch']}"
        f"{'' if document['finished'] else '; stopped before its end'}. Of these: "
        f"{', '.join(f'{what} {count}' for what, count in sorted(seen.items()) if count)}."
    )
    return to_markdown(Table(("command", "kills", "by", "runs gone on with", "different"), tuple(rows), caption))


def _earning_table(name: str) -> Callable[[], str]:
    def table() -> str:
        import earned

        return to_markdown(earned.TABLES[name]())

    return table


def _earning_spread() -> str:
    import earned

    return earned.spread()


def _earning_lead(page: str) -> Callable[[], str]:
    def sentence() -> str:
        import earned

        return earned.lead().replace("EARNING", page)

    return sentence


def _on_a_card(name: str) -> str:
    import on_card

    table: str = getattr(on_card, name)(_document("device"))
    return table


BLOCKS: dict[str, Callable[[], str]] = {
    "bench-exact": bench_exact,
    "bench-logdet": bench_logdet,
    "bench-peers": bench_peers,
    "bench-products": bench_products,
    "bench-sana": bench_sana,
    "low-rank": low_rank,
    "controls": controls,
    "controls-toys": controls_toys,
    "injected-noise": injected_noise,
    "families": families,
    "settings": settings,
    "item-e": item_e,
    "kills": kills,
    "plans": plans,
    "shared-out": shared_out,
    "compiled": compiled,
    "device-steps": lambda: _on_a_card("steps"),
    "device-rest": lambda: _on_a_card("rest"),
    "compare-lead": compare_lead,
    "compare-readme": compare_readme,
    "earning-spread": _earning_spread,
    "earning-lead": _earning_lead("earning.md"),
    "earning-readme": _earning_lead("docs/earning.md"),
    **{
        f"earning-{name}": _earning_table(f"earning-{name}")
        for name in (
            *("spectrum", "tails", "bound", "curvature", "stored", "bundled", "again", "steps", "folds", "budget"),
            *("regressed", "maps", "optimisers", "samples", "smoothness", "temperatures", "losses"),
            *("kinds", "scaled"),
        )
    },
    **{
        f"compare-{name}": _compare_table(name)
        for name in ("table-1", "scores", "steps", "diversity", "ranks", "losses", "l2")
    },
}


def rewritten(text: str) -> str:
    """The page with every block made anew."""
    return BLOCK.sub(lambda match: match[1] + BLOCKS[match["name"]]() + match[3], text)


PICTURES = {"gain-against-cost": "compare", "reward-against-quality": "compare", "kl-along-training": "compare-losses"}
"""Pictures in docs/results/ that are drawn from a document there."""
_SOURCE = "drawn from"


def stale_pictures() -> dict[str, bytes]:
    """Pictures that were drawn from another document than the one that is there, drawn anew."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from hnkit.scaled.compare.plots import draw_plots

    found: dict[str, bytes] = {}
    for source in set(PICTURES.values()):
        digest = hashlib.sha256((RESULTS / f"{source}.json").read_bytes()).hexdigest()
        drawn = {plot.name: plot for plot in draw_plots({**_document(source), "grid": {"correct": {}}}, {})}
        for name in (name for name, of in PICTURES.items() if of == source and name in drawn):
            path = RESULTS / f"{name}.png"
            if path.is_file() and Image.open(path).info.get(_SOURCE) == digest:
                continue
            info, buffer = PngInfo(), io.BytesIO()
            info.add_text(_SOURCE, digest)
            Image.open(io.BytesIO(drawn[name].png())).save(buffer, format="png", pnginfo=info)
            found[name] = buffer.getvalue()
    return found


def main() -> int:
    """Rewrite or check every page and picture."""
    stale = []
    for name, png in stale_pictures().items():
        stale.append(f"{name}.png")
        if "--check" not in sys.argv:
            (RESULTS / f"{name}.png").write_bytes(png)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        new = rewritten(text)
        if new != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"stale: {', '.join(stale)}; run python docs/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
