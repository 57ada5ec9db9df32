"""Tables of what `benchmarks/device.py` has measured on a card, or of what a plan says where nothing was measured."""

from __future__ import annotations

from typing import Any

from tables import to_markdown

from hnkit.output.page import Cell, Table, format_estimate

Document = dict[str, Any]

_PARTS = {
    "log_det": "products of f, E(J) at d = 32,768",
    "exact": "exact log-determinant at one point",
    "flux": "a training step of FLUX.1-schnell",
    "agreement": "the miniature on the card against the CPU",
    "tests": "tests that need a card",
}


def steps(document: Document) -> str:
    """Training steps of SANA 0.6B on a card with each memory option, beside the plan's peak."""
    planned = document["plan"]["peak_gib"]
    if "steps" not in document:
        rows: list[tuple[Cell, ...]] = [
            (_options(name), f"{peak:.1f}", "not measured") for name, peak in planned.items()
        ]
        caption = (
            "Peak of a step at a batch of one, counted on tensors without values; SANA-Sprint 0.6B at 1024 px, LoRA of "
            "rank 128, reward `redness`. Nothing of it has been measured yet: `python benchmarks/device.py` does."
        )
        return to_markdown(Table(("options", "peak planned, GiB", "images/s"), tuple(rows), caption))
    measured = {(row["options"], row["step"], row["batch"]): row for row in document["steps"]["rows"]}
    roofline: dict[str, float] = document["plan"].get("roofline_seconds", {})
    batches = sorted({batch for _, _, batch in measured})
    rows = []
    for name in dict.fromkeys([*(options for options, _, _ in measured), *planned]):
        cells: list[Cell] = [_options(name), f"{planned[name]:.1f}" if name in planned else "-"]
        for batch in batches:
            ours, plain = (measured.get((name, step, batch)) for step in ("hnkit", "plain"))
            cells += [_step(ours, "peak_gib", ".1f"), _step(ours, "images_per_second", ".2f")]
            cells.append(_step(plain, "images_per_second", ".2f"))
        ours = measured.get((name, "hnkit", 1), {})
        reached = "seconds" in ours and name in roofline
        rows.append((*cells, f"{100 * roofline[name] / ours['seconds']:.0f} %" if reached else "-"))
    headers = ["options", "peak planned, batch 1, GiB"]
    for batch in batches:
        headers += [f"batch {batch}: peak, GiB", "images/s", "plain loop, images/s"]
    headers.append("of the roofline, batch 1")
    caption = (
        f"Measured on: {document['machine']}, torch {document['torch']}. SANA-Sprint 0.6B at its published size with "
        "random weights, 1024 px, bfloat16, LoRA of rank 128, reward `redness`, median of 3 steps. The plain loop is "
        "the same step written down without pipeline, loss or backend, on the same twin. A dash: not measured."
    )
    if document["steps"].get("runs", 1) > 1:
        caption += " The rows are of several runs, on cards of that name."
    apart = [
        abs(row["peak_gib"] / planned[options] - 1)
        for (options, step, batch), row in measured.items()
        if step == "hnkit" and batch == document["plan"]["batch"] and options in planned and "peak_gib" in row
    ]
    if apart:
        caption += f" Peaks planned and measured differ by {100 * max(apart):.1f} % at most."
    return to_markdown(Table(tuple(headers), tuple(rows), caption))


def rest(document: Document) -> str:
    """What else was measured on that card."""
    parts = [name for name in _PARTS if name in document]
    if not parts:
        return "Nothing else has been measured on a card yet.\n"
    rows: list[tuple[Cell, ...]] = []
    for name in parts:
        part = document[name]
        if "failed" in part:
            rows.append((_PARTS[name], f"not measured: {part['failed']}"))
            continue
        if name == "log_det":
            error = format_estimate(part["error"], part["error_stderr"])
            rows += [
                ("vector-Jacobian products of f per second", f"{part['products_per_second']:,.1f}"),
                (f"E(J), d = {part['dim']:,}, {part['samples']} points, {part['probes']} probes", error),
            ]
        elif name == "exact":
            if "too_long" in part:
                long = part["too_long"]
                what = f"exact log-determinant at one point, d = {long['dim']:,}"
                rows.append((what, f"{long['seconds']:,.0f} s by its pace, not run to its end"))
            if "exact_dim" in part:
                point = format_estimate(part["point_error"], part["point_probe_stderr"])
                what = f"exact log-determinant at one point, d = {part['exact_dim']:,}"
                rows += [(what, f"{part['exact_seconds']:,.0f} s"),
                         ("E(J) there, exact; Arnoldi", f"{part['exact_error']:.5g}; {point}")]  # fmt: skip
        elif name == "flux":
            size = part["parameters"] / 1e9
            for row in part["rows"]:
                peak = f", {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
                what = f"a training step of FLUX.1-schnell ({size:.3g} B, 512 px, batch 1), {_options(row['options'])}"
                rows.append((what, f"{row['seconds']:.2f} s{peak}" if "seconds" in row else "out of memory"))
        elif name == "agreement":
            worst = max(part["distances"].values())
            rows.append(("the miniature on the card against the CPU, largest relative distance", f"{worst:.1g}"))
        else:
            rows.append(("tests that need a card", part["summary"]))
    return to_markdown(Table(("", "measured"), tuple(rows), f"Measured on: {document['machine']}."))


def _options(name: str) -> str:
    return ", ".join(f"`{option}`" for option in name.split(", ")) if name else "none"


def _step(row: dict[str, Any] | None, key: str, form: str) -> str:
    if row is None:
        return "-"
    return "out of memory" if row.get("out_of_memory") else format(row[key], form)
