"""In bfloat16, the default of every real model: a run ends in a report with KL, L2 term and their gap, and so do the
other commands that measure."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from hnkit.config import resolve_config
from hnkit.errors import InputError
from hnkit.figures import measure
from hnkit.figures.measured_map import MeasuredMap
from hnkit.kl.divergence import noise_kl
from hnkit.maps import ConditionedMap, working_type
from hnkit.training.run import train
from tests.hnkit.cli.test_app import run
from tests.scaled import tiny
from tests.scaled.conftest import noise_for, perturb

NAMES = ("sana", "sd-turbo", "flux")


def overrides(name, checkpoint, tmp_path, **changes):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a tree\na boat\na lamp\na green frog\na red house\n")
    options = tiny.options(name, checkpoint(name), dtype="bfloat16")
    settings = {
        "prompts": prompts, "steps": 2, "batch": 2, "accumulate": 1, "lr": 0.05, "warmup": 0, "optimizer": "adamw",
        "momentum": 0.0, "alpha": 0.001, "reduction": "sum", "measure_samples": 4, "validate_samples": 2,
        "measure_method": "arnoldi",
    } | changes  # fmt: skip
    return [
        *(f"backend.{key}={tiny.text(value)}" for key, value in options.items()),
        *(f"train.{key}={value}" for key, value in settings.items()),
    ]


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """`finished(name)`: a run folder in bfloat16 and its report."""
    done = {}

    def get(name):
        if name not in done:
            root = tmp_path_factory.mktemp(f"half-{name}")
            config = resolve_config(backend=name, overrides=overrides(name, checkpoint, root), rewards=["redness=1.0"])
            result = train(config, out=root / "run", console=Console(file=io.StringIO()))
            done[name] = root / "run", result.report
        return done[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_a_run_ends_with_kl_l2_and_their_gap(name, finished):
    folder, report = finished(name)
    m = report["measurement"]
    assert report["not_measured"] is None
    assert m["kl"] > 0
    assert m["l2"] > 0
    assert m["kl_stderr"] > 0
    assert m["error"] == pytest.approx(m["kl"] - m["l2"], rel=1e-9, abs=1e-12)
    assert m["relative_error"] is not None
    assert "the products of the network resolve no more" in m["local_norm_note"]
    assert m["local_norm"]["max"] > 0
    page, card = (folder / "report.html").read_text(), (folder / "adapter" / "README.md").read_text()
    assert "How close L2 stays" in page
    assert "the products of the network resolve no more" in page
    assert "- KL (Stein form): " in card
    assert "- L2 term: " in card


@pytest.mark.parametrize("name", ["sana", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_the_figures_are_those_of_the_same_weights_in_float32(name, make_backend):
    """Rounding of the network is 2^-9 relative: KL and local norms of the two agree to a few such units."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        backend = make_backend(name, dtype=dtype)
        perturb(backend, 0.03)
        f = ConditionedMap(backend.hypernetwork, backend.encode(tiny.PROMPTS[:2] * 2))
        probes = torch.Generator().manual_seed(0)
        found[dtype] = measure(f, noise_for(backend, 4), method="arnoldi", generator=probes, rel_error=0.5)
    half, whole = found["bfloat16"], found["float32"]
    assert half.kl.value == pytest.approx(whole.kl.value, rel=0.02)
    assert half.l2.value == pytest.approx(whole.l2.value, rel=0.02)
    assert half.local_norm["max"] == pytest.approx(whole.local_norm["max"], rel=0.03)
    assert half.local_norm_note
    assert not whole.local_norm_note


def test_the_checks_take_norms_at_the_networks_resolution(make_backend):
    backend, exact = make_backend("sana", dtype="bfloat16"), make_backend("sana")
    norms = []
    for each in (backend, exact):
        perturb(each, 0.03)
        f = ConditionedMap(each.hypernetwork, each.encode(tiny.PROMPTS[:2]))
        x = noise_for(each, 2)
        assert working_type(f, x) == (torch.bfloat16 if each is backend else torch.float32)
        norms.append(MeasuredMap("sana", f, x).norms)
    torch.testing.assert_close(norms[0], norms[1], rtol=0.03, atol=0)


@pytest.mark.slow
def test_verify_bound_of_a_backend(finished, tmp_path, capsys, monkeypatch):
    # five steps of the local Lipschitz ascent, as in the dimensions of every real model
    monkeypatch.setattr("hnkit.checks.settings.MeasuredMap", lambda *a, **k: MeasuredMap(*a, **k | {"ascent_steps": 5}))
    folder, _ = finished("sana")
    prompts = tmp_path / "held-out.txt"
    prompts.write_text("a blue lamp\ntwo frogs\n")
    code, out, _ = run(
        capsys, "verify-bound", "--backend", "sana", "--adapter", folder, "--prompts", prompts, "--samples", 2,
        "--method", "arnoldi", "--json", "--out", tmp_path / "verify",
    )  # fmt: skip
    document = json.loads(out)
    assert code == 0
    statuses = {check["verdict"] for check in document["checks"]}
    assert "fails" not in statuses
    assert "KL" in (tmp_path / "verify" / "report.html").read_text()


def test_a_side_figure_that_fails_leaves_the_kl(monkeypatch, make_backend):
    backend = make_backend("sana")
    perturb(backend, 0.03)
    f, x = ConditionedMap(backend.hypernetwork, backend.encode(tiny.PROMPTS)), noise_for(backend, 4)

    def refuse(*_, **__):
        raise InputError("the local norm at sample 3 is not to be had")

    monkeypatch.setattr("hnkit.figures.measured_map.local_norms", refuse)
    found = measure(f, x, method="auto", generator=torch.Generator().manual_seed(0))
    assert found.kl.value == pytest.approx(noise_kl(f, x, method="exact").value)
    assert found.local_norm_note == "no local norms: the local norm at sample 3 is not to be had"
    assert set(json.loads(json.dumps(found.to_json(), allow_nan=False))["local_norm"].values()) == {None}


def test_a_measurement_that_fails_is_said_in_report_and_card(monkeypatch, checkpoint, tmp_path):
    def refuse(*_, **__):
        raise InputError("no product is to be had")

    monkeypatch.setattr("hnkit.training.validate.measure", refuse)
    config = resolve_config(
        backend="sana", overrides=overrides("sana", checkpoint, tmp_path, steps=1), rewards=["redness=1.0"]
    )
    result = train(config, out=tmp_path / "run", console=Console(file=io.StringIO()))
    assert result.finished
    assert result.report["measurement"] is None
    assert result.report["not_measured"] == "no product is to be had"
    for file in ("report.html", "adapter/README.md"):
        assert "not measured at the end: no product is to be had" in (tmp_path / "run" / file).read_text()
