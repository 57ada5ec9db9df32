"""The measurement of a run against closed forms, on affine maps where every figure is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from hnkit import InputError
from hnkit.errors import ExpansiveMapError
from hnkit.figures import mean_shift_share, measure, measured_map
from hnkit.figures import measurement as module
from hnkit.figures.measured_map import VERDICT_SAMPLES, MeasuredMap
from hnkit.figures.measurement import BLOCK_RECORDS, Sharing
from hnkit.injection import NoiseInjection
from hnkit.internal.kept import from_document, not_kept, to_document
from hnkit.internal.workers import ALONE
from hnkit.kl.verdict import l2_verdict
from hnkit.linalg.singular import LocalNorms
from hnkit.tilt import affine_coefficients
from hnkit.toy.linear_gaussian import linear_gaussian

DIM = 5


def affine(scale: float = 0.3) -> nn.Linear:
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(DIM, DIM, dtype=torch.float64).requires_grad_(False)
    matrix = torch.randn(DIM, DIM, dtype=torch.float64, generator=generator)
    layer.weight.copy_(scale * matrix / torch.linalg.matrix_norm(matrix, 2))
    layer.bias.copy_(0.2 * torch.randn(DIM, dtype=torch.float64, generator=generator))
    return layer


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


def truth(layer: nn.Linear) -> dict[str, float]:
    A, b = layer.weight, layer.bias
    slope = torch.eye(DIM, dtype=torch.float64) + A
    covariance = slope @ slope.mT
    kl = 0.5 * float(covariance.trace() + b @ b - DIM - torch.logdet(covariance))
    l2 = 0.5 * float(b @ b + A.square().sum())
    return {
        "kl": kl,
        "l2": l2,
        "error": float(A.trace() - torch.logdet(slope)),
        "relative_error": (l2 - kl) / kl,
        "mean_shift_share": float(b @ b) / (2 * l2),
        "symmetry_index": float((A @ A).trace() / A.square().sum()),
        "norm": float(torch.linalg.matrix_norm(A, 2)),
    }


def test_every_figure_of_an_affine_map():
    """Monte Carlo figures within five of their standard errors: false-alarm rate below 3e-6 for the four of them."""
    layer = affine()
    known, found = truth(layer), measure(layer, noise(4000))
    for name in ("kl", "l2", "relative_error"):
        estimate = getattr(found, name)
        assert 0 < estimate.stderr < 0.05
        assert abs(estimate.value - known[name]) < 5 * estimate.stderr
    assert found.error.value == pytest.approx(known["error"], rel=1e-9)
    assert found.symmetry_index == pytest.approx(known["symmetry_index"], rel=1e-9)
    assert all(value == pytest.approx(known["norm"], rel=1e-4) for value in found.local_norm.values())
    assert found.mean_shift_share == pytest.approx(known["mean_shift_share"], abs=0.05)
    assert (found.method, found.injective, found.samples) == ("exact", "certified", 4000)
    assert found.gap is None


class Alone:
    """One process, of which it is written down what it makes of every block."""

    count, index = 1, 0

    def __init__(self) -> None:
        self.made = []

    def gather(self, value):
        self.made.append(value)
        return [value]


class OneOfMany:
    """A process that makes its own share, and gets from the others what `Alone` has made."""

    def __init__(self, index: int, count: int, alone: Alone) -> None:
        self.index, self.count, self.others = index, count, iter(alone.made)

    def gather(self, value):
        parts = [{} for _ in range(self.count)]
        for number, made in next(self.others).items():
            parts[number % self.count][number] = made
        assert value.keys() == parts[self.index].keys()
        parts[self.index] = value
        return parts


@pytest.mark.parametrize("method", ["auto", "arnoldi", "lanczos"])
def test_a_measurement_that_is_shared_out_is_that_of_one_process_and_keeps_its_blocks(method):
    """To the last digit; and the exact one is that of samples taken together."""
    f, x = nn.Sequential(affine(), nn.Tanh()), noise(21)
    kept = {}

    def keep(name, make):
        if name not in kept:
            kept[name] = to_document(make())
        return from_document(kept[name], BLOCK_RECORDS)

    def measured(workers, keep=not_kept):
        return measure(f, x, method=method, sharing=Sharing(3, workers, keep))

    alone = Alone()
    one = measured(alone)
    for index, count in ((1, 2), (3, 5), (16, 17)):  # the last has no block
        found = measured(OneOfMany(index, count, alone))
        assert found.to_json() == one.to_json()
        assert torch.equal(found.per_sample, one.per_sample)
    assert measured(ALONE, keep).to_json() == one.to_json()
    pairs = -(-21 // 2)
    assert len(kept) == 2 * pairs + VERDICT_SAMPLES + (0 if method == "auto" else 8)  # norms, KL, verdict, pilot
    names = set(kept)
    assert measured(ALONE, keep).to_json() == one.to_json()
    assert set(kept) == names
    together = measure(f, x, method=method, generator=torch.Generator().manual_seed(0))
    assert one.samples == together.samples
    assert one.local_norm == pytest.approx(together.local_norm, rel=1e-3)
    error = 0 if method == "auto" else 5 * math.hypot(one.error.stderr, together.error.stderr)  # once in 1.7 million
    assert abs(one.error.value - together.error.value) <= error + 1e-12


def test_the_error_of_the_relative_error_is_calibrated():
    """Standard error of the ratio against the spread of 200 independent repetitions (chi-square, five sigma)."""
    layer, repetitions = affine(), 200
    batches = noise(64 * repetitions).split(64)
    found = [measure(layer, batch) for batch in batches]
    spread = torch.tensor([one.relative_error.value for one in found]).std()
    claimed = torch.tensor([one.relative_error.stderr for one in found]).square().mean().sqrt()
    assert abs(float(spread / claimed) - 1) < 5 / math.sqrt(2 * repetitions)


def test_the_gap_is_the_distance_from_the_tilted_law():
    problem = linear_gaussian()
    x = torch.randn(4000, problem.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for f in (problem.l2_map(), problem.second_order_map()):
        found = measure(f, x, problem=problem)
        coefficients = affine_coefficients(f, problem.dim)
        assert coefficients is not None
        assert found.gap is not None
        assert abs(found.gap.value - problem.gap_of_affine(*coefficients)) < 5 * found.gap.stderr
    reached = measure(problem.optimal_map(), x, problem=problem).gap
    assert reached is not None
    assert abs(reached.value) < 1e-12


def test_large_maps_are_measured_by_probes(monkeypatch):
    monkeypatch.setattr(module, "EXACT_UP_TO", 2)
    layer = affine()
    found = measure(layer, noise(600), rel_error=0.05, generator=torch.Generator().manual_seed(1))
    assert found.method == "arnoldi"
    assert abs(found.kl.value - truth(layer)["kl"]) < 5 * found.kl.stderr
    assert abs(found.error.value - truth(layer)["error"]) < 5 * found.error.stderr
    steep = measure(affine(1.3), noise(64), generator=torch.Generator().manual_seed(1))
    assert steep.method == "lanczos"
    assert steep.local_norm["max"] == pytest.approx(1.3, rel=1e-4)


@pytest.mark.parametrize("limit", [2, 512])
def test_before_training_everything_is_zero_and_nothing_is_divided_by_it(monkeypatch, limit):
    monkeypatch.setattr(module, "EXACT_UP_TO", limit)
    layer = affine()
    layer.weight.zero_()
    layer.bias.zero_()
    document = measure(layer, noise(16)).to_json()
    assert [document[name] for name in ("kl", "l2", "error")] == [0.0, 0.0, 0.0]
    assert [document[name] for name in ("relative_error", "mean_shift_share", "symmetry_index")] == [None] * 3


def test_the_json_record_keeps_its_keys():
    document = measure(affine(), noise(16), problem=None).to_json()
    assert list(document) == [
        "samples", "method", "kl", "kl_stderr", "bias_bound", "l2", "l2_stderr", "error", "error_stderr",
        "relative_error", "relative_error_stderr", "symmetry_index", "local_norm", "mean_shift_share", "injective",
        "num_jvp", "num_vjp", "folds", "gap", "gap_stderr", "local_norm_note", "l2_verdict",
    ]  # fmt: skip
    assert list(document["local_norm"]) == ["0.1", "0.5", "0.9", "max"]
    assert document["gap"] is document["gap_stderr"] is None
    assert document["bias_bound"] == 0.0


def test_an_unmet_hypothesis_is_bad_input_here():
    with pytest.raises(InputError, match="below 1"):
        measure(affine(1.3), noise(16), method="arnoldi")


def test_mean_shift_against_all_pairs():
    delta = noise(12) + 0.5
    prompts = [f"p{row % 3}" for row in range(11)] + ["alone"]
    shift = squares = 0.0
    for prompt in ("p0", "p1", "p2"):
        rows = [delta[row] for row in range(12) if prompts[row] == prompt]
        pairs = [float(a @ b) for a, b in itertools.permutations(rows, 2)]
        shift += len(rows) * sum(pairs) / len(pairs)
        squares += sum(float(row @ row) for row in rows)
    assert mean_shift_share(delta, prompts) == pytest.approx(shift / squares, rel=1e-12)
    assert mean_shift_share(torch.ones(4, 2)) == pytest.approx(1.0)
    assert math.isnan(mean_shift_share(torch.ones(1, 2)))
    assert math.isnan(mean_shift_share(torch.zeros(4, 2)))


# --- statistics beside the KL -----------------------------------------------------------------------------------------


class Coarse(nn.Module):
    """A network in bfloat16 between float32 noise and a float32 delta."""

    def __init__(self, dtype: torch.dtype, d: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d)).requires_grad_(False)
        for parameter in self.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) / (2 * d**0.5)).bfloat16())
        self.layers.to(dtype)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.to(self.dtype)).float()


@pytest.mark.parametrize("exact_up_to", [512, 8])
def test_a_bfloat16_network_has_a_kl_and_norms_at_its_resolution(monkeypatch, exact_up_to):
    """With the exact method and, as in many dimensions, with Arnoldi's."""
    monkeypatch.setattr(module, "EXACT_UP_TO", exact_up_to)
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    rounded, exact = (
        measure(Coarse(dtype), x, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert rounded.method == ("exact" if exact_up_to > 24 else "arnoldi")
    assert rounded.kl.value == pytest.approx(exact.kl.value, rel=0.05)
    assert rounded.local_norm["max"] == pytest.approx(exact.local_norm["max"], rel=0.01)
    assert exact.local_norm_note == ""
    assert rounded.local_norm_note.startswith("local norms to a relative ")
    assert rounded.to_json()["local_norm_note"] == rounded.local_norm_note


@pytest.mark.parametrize("exact_up_to", [512, 2])
def test_norms_that_are_not_known_do_not_cost_the_kl(monkeypatch, exact_up_to):
    monkeypatch.setattr(module, "EXACT_UP_TO", exact_up_to)
    layer, x = affine(), noise(40)

    def measured():
        return measure(layer, x, generator=torch.Generator().manual_seed(0))

    known = measured()

    def raising(*args, **kwargs):
        raise InputError("no products today")

    monkeypatch.setattr(measured_map, "local_norms", raising)
    found = measured()
    assert found.kl.value == pytest.approx(known.kl.value, rel=1e-6)
    assert found.local_norm_note == "no local norms: no products today"
    assert set(found.local_norm) == {"0.1", "0.5", "0.9", "max"}
    assert set(found.to_json()["local_norm"].values()) == {None}

    residual = 0.5 * torch.ones(40, dtype=torch.float64)
    unconverged = LocalNorms(residual, residual, noise(40), noise(40), 123, 1e-3)
    monkeypatch.setattr(measured_map, "local_norms", lambda *args, **kwargs: unconverged)
    found = measured()
    assert found.local_norm_note == "local norms not converged: relative residual 0.5 after 123 products"
    assert all(math.isnan(value) for value in found.local_norm.values())


def test_an_expansive_row_beyond_those_whose_norm_is_taken_changes_the_method(monkeypatch):
    """Arnoldi's method needs norms below 1, and the norms of some rows alone are looked at before it starts."""
    monkeypatch.setattr(module, "EXACT_UP_TO", 2)
    monkeypatch.setattr(module, "_NORM_SAMPLES", 2)

    def f(x):  # slope 0.1 near 0, up to 1.3 far out
        return 0.1 * x + 1.2 * (x - x.clamp(-2, 2))

    x = noise(6).clamp(-1, 1)
    assert measure(f, x).method == "arnoldi"
    x[-1] = 3.0
    found = measure(f, x)
    assert found.method == "lanczos"
    assert found.kl.value > 0
    with pytest.raises(ExpansiveMapError):
        measure(f, x, method="arnoldi")


def test_the_verdict_on_l2_is_that_of_the_first_samples():
    """A gradient field loses half, a rotation is counted for nothing, and injected noise needs no verdict."""
    x = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = torch.zeros(6, 6, dtype=torch.float64)
    turn[0, 1], turn[1, 0] = 0.3, -0.3
    for f, word in ((lambda z: -0.3 * z, "misses"), (lambda z: z @ turn.T, "times the KL")):
        found = measure(f, x)
        twin = l2_verdict(f, x[:VERDICT_SAMPLES], generator=MeasuredMap("network", f, x).generator("l2 verdict"))
        assert found.l2_verdict == twin
        assert word in found.to_json()["l2_verdict"]["text"]
        assert found.to_json()["l2_verdict"]["text"] == f"{str(twin)[0].upper()}{str(twin)[1:]}."
        assert found.to_json()["l2_verdict"]["ratio"] == twin.ratio.value
    small = measure(lambda z: 1e-3 * z[:, torch.tensor([1, 2, 3, 4, 5, 0])] + 1.0, x)  # a shift, and a cycle of six
    assert small.l2_verdict.good
    injected = measure(lambda z: -0.3 * z, x, injection=NoiseInjection(0.5))
    assert injected.l2_verdict is None
    assert "l2_verdict" not in injected.to_json()
