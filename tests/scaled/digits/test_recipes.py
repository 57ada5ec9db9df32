"""The recipes beside each other: what is averaged, what is set against what, and the pieces of their training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from hnkit import Frontier, NoiseLoss
from hnkit.maps import Condition, ConditionedMap
from hnkit.output.page import Table

ROOT = Path(__file__).parents[3]
SENTENCES = 40


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("recipes")


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("recipe_training")


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("recipe_figures")


@pytest.fixture
def earned(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return import_module("earned")


# --- the budget spread over prompts -------------------------------------------------------------------------------


def test_a_budget_spread_over_gaussian_rewards(monkeypatch):
    """Of Gaussian rewards of spread s_c the frontier is sqrt(2K) times the root mean square of s, or its mean."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    budget = import_module("budget")
    spreads = torch.linspace(0.2, 2.0, 10, dtype=torch.float64)
    quantiles = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))  # so that the halves are alike
    found = budget.spread_over_prompts(spreads[:, None] * quantiles[order] + 3, 0.2)
    root = math.sqrt(2 * 0.2)
    common, own = root * float(spreads.square().mean().sqrt()), root * float(spreads.mean())
    assert found["one temperature"][0] == pytest.approx(common, rel=0.01)
    assert found["as many for each"][0] == pytest.approx(own, rel=0.01)
    assert found["difference"][0] == pytest.approx(common - own, rel=0.03)
    assert found["rank correlation"] == pytest.approx(1)
    share = spreads.square() / spreads.square().mean()
    assert found["spent"][1] == pytest.approx(0.2 * float(share.quantile(0.5)), rel=0.02)


# --- means over seeds and differences -----------------------------------------------------------------------------


def record(name, seed, gains, squares, errors, **more):
    nats = float(squares.mean() + errors.mean())
    return {
        "recipe": name, "seed": seed, "step": 160, "averaged": True, "seconds": 10.0, "folds": [0, 40], "norm": 0.5,
        "settings": {"batch": 32, "alpha": 0.25}, "gain": [float(gains.mean()), 0.0],
        "l2": [float(squares.mean()), 0.0], "kl": [nats, 0.0], "gains": gains.tolist(), "squares": squares.tolist(),
        "errors": errors.tolist(), **more,
    }  # fmt: skip


def planted(shift=0.0):
    """Three seeds of two recipes at the same sentences, and a frontier."""
    draw = torch.Generator().manual_seed(4)

    def noise(size):
        return torch.randn(SENTENCES, generator=draw, dtype=torch.float64) * size

    frontier = Frontier([2 * noise(1.0).repeat(3) + 0.01 * torch.randn(3 * SENTENCES, generator=draw)] * 4)
    common, errors = 0.3 + noise(0.2), 0.1 + noise(0.03)
    squares = 0.08 + 0.2 * (common - 0.3)  # who moves more gains more, so that the signs of both matter
    records = []
    for seed in range(3):
        records.append(record("base", seed, common + noise(0.05), squares + 0.01 * seed, errors))
        records.append(record("rank 4", seed, common + shift + noise(0.05), 1.2 * squares, errors + noise(0.01)))
    return records, frontier


def efficiency(gains, squares, errors, frontier):
    return float(gains.mean()) / frontier.point(float(squares.mean() + errors.mean())).gain


def jackknifed(records, frontier, sign):
    """Delete-one errors over sentences and over noises of a signed mean of efficiencies."""
    columns = [[torch.tensor(r[key], dtype=torch.float64) for key in ("gains", "squares", "errors")] for r in records]

    def value(kept, kept_errors):
        return sum(
            s / 3 * efficiency(g[kept], q[kept], e[kept_errors], frontier)
            for (g, q, e), s in zip(columns, sign, strict=True)
        )

    every = torch.arange(SENTENCES)
    without = [every[every != i] for i in range(SENTENCES)]
    found = []
    for values in ([value(w, every) for w in without], [value(every, w) for w in without]):
        spread = torch.tensor(values, dtype=torch.float64)
        found.append((SENTENCES - 1) / SENTENCES * float((spread - spread.mean()).square().sum()))
    return math.sqrt(sum(found))


def test_errors_over_sentences_are_those_of_leaving_one_out(figures):
    records, frontier = planted(shift=0.1)
    base, other = figures.summary(records, frontier)
    mine = [r for r in records if r["recipe"] == "rank 4"]
    theirs = [r for r in records if r["recipe"] == "base"]
    shares = [efficiency(*(torch.tensor(r[k]) for k in ("gains", "squares", "errors")), frontier) for r in mine]
    assert other["efficiency"][0] == pytest.approx(sum(shares) / 3, rel=1e-6)
    assert other["efficiency"][1] == pytest.approx(float(torch.tensor(shares).std()) / math.sqrt(3), rel=1e-4)
    alone = jackknifed(mine, frontier, [1, 1, 1])
    assert other["efficiency over sentences"] == pytest.approx(alone, rel=0.05)
    pair = jackknifed(mine + theirs, frontier, [1, 1, 1, -1, -1, -1])
    assert other["difference over sentences"] == pytest.approx(pair, rel=0.05)
    assert pair < alone / 2, "the sentences are common to both maps"
    assert other["difference"][0] == pytest.approx(other["efficiency"][0] - base["efficiency"][0])
    assert "difference" not in base
    gains = torch.tensor([r["gains"] for r in mine], dtype=torch.float64).mean(0)
    assert other["gain over sentences"] == pytest.approx(float(gains.std()) / math.sqrt(SENTENCES))
    squares, errors = (torch.tensor([r[k] for r in mine], dtype=torch.float64).mean(0) for k in ("squares", "errors"))
    spreads = squares.var() + errors.var()
    assert other["kl over sentences"] == pytest.approx(math.sqrt(float(spreads) / SENTENCES))


def test_a_recipe_is_set_against_the_same_seeds_steps_and_start(figures):
    records, frontier = planted()
    for one in records[:2]:  # the first seed of both, one of them after other steps
        records.append(one | {"step": 240})
    records = [r for r in records if (r["recipe"], r["seed"]) != ("rank 4", 2)]
    start = figures.BUNDLED  # what goes on from it with a penalty is set against what goes on without
    records += [records[0] | {"recipe": start}, records[0] | {"recipe": f"{start} with a fold penalty"}]
    rows = {(row["recipe"], row["step"]): row for row in figures.summary(records, frontier)}
    assert rows["rank 4", 160]["paired seeds"] == [0, 1]
    assert rows["rank 4", 240]["paired seeds"] == [0]
    penalty = rows[f"{start} with a fold penalty", 160]
    assert penalty["difference"] == (0.0, None), "against itself: one seed has no error"
    assert penalty["difference over sentences"] == 0
    assert "difference" not in rows[start, 160]


def test_a_recipe_of_another_batch_is_set_against_as_many_samples(figures):
    records, frontier = planted(shift=0.1)
    alike = figures.summary(records, frontier)[1]
    for one in records:
        if one["recipe"] == "rank 4":
            one |= {"step": 40, "settings": one["settings"] | {"batch": 128}}
    found = figures.summary(records, frontier)[1]
    assert (found["step"], found["batch"]) == (40, 128)
    assert found["difference"] == alike["difference"]


def test_a_map_beyond_the_frontier_has_no_efficiency(figures):
    records, frontier = planted()
    for one in records:
        if one["recipe"] == "rank 4":
            one["kl"][0] = 50.0
    rows = figures.summary(records, frontier)
    assert rows[1]["efficiency"] is None
    assert "difference" not in rows[1]
    assert "gain difference" in rows[1]


def test_gains_by_kind_are_those_of_its_sentences_after_the_last_step(figures, earned, monkeypatch, tmp_path):
    records, _ = planted()
    records += [one | {"step": 80, "gains": [9.0] * SENTENCES} for one in records]  # another time, another map
    records.append(records[0] | {"averaged": False, "step": 500, "gains": [9.0] * SENTENCES})
    kinds = ["rare"] * 10 + ["common"] * (SENTENCES - 10)
    rows = {(row["recipe"], row["kind"]): row for row in figures.by_kind(records, kinds)}
    for name in ("base", "rank 4"):
        gains = torch.tensor([one["gains"] for one in records[:6] if one["recipe"] == name], dtype=torch.float64)
        for kind, part in (("rare", gains[:, :10]), ("common", gains[:, 10:])):
            row, means = rows[name, kind], part.mean(1)
            assert (row["sentences"], row["seeds"]) == (part.shape[1], [0, 1, 2])
            assert row["gain"] == pytest.approx((float(means.mean()), float(means.std()) / math.sqrt(3)))
            spread = float(part.mean(0).std()) / math.sqrt(part.shape[1])
            assert row["gain over sentences"] == pytest.approx(spread)
    (tmp_path / "recipes.json").write_text(json.dumps({"kinds": list(rows.values())}))
    monkeypatch.setattr(earned, "RECIPES", tmp_path / "recipes.json")
    assert [row[:4] for row in earned.recipe_kinds().rows][:2] == [
        ("base", "rare", "10", "3"),
        ("base", "common", "30", "3"),
    ]


def test_a_report_keeps_what_was_measured_before(recipes, monkeypatch, tmp_path):
    """A second folder of runs adds to the report and replaces what it has measured again, and nothing else."""
    records, frontier = planted()
    spent = {"seconds": 1.0, "norm": None, "averaged": True}
    monkeypatch.setattr(recipes, "OUT", tmp_path / "recipes.json")
    monkeypatch.setattr(recipes, "groups", lambda: ["attribution"] * SENTENCES)
    monkeypatch.setattr(recipes, "KINDS_OF", ("rank 4", "base"))
    for name, runs in (("one", records), ("other", [r | {"gains": [2.0] * SENTENCES} for r in records[:2]])):
        out = tmp_path / name
        out.mkdir()
        torch.save({"base": None, "pool": torch.stack(list(frontier.base)), "smoothness": {}}, out / "base.pt")
        for record in runs if name == "one" else runs[1:]:
            recipes.append(out / f"{record['recipe']}.jsonl", spent | record)
        recipes.report(out)
    found = json.loads((tmp_path / "recipes.json").read_text())
    assert [(row["recipe"], row["seeds"]) for row in found["rows"]] == [("base", [0, 1, 2]), ("rank 4", [0])]
    first = found["kinds"][0]
    assert (first["recipe"], first["gain"][0]) == ("rank 4", 2.0)
    assert [row["recipe"] for row in found["kinds"]] == ["rank 4", "base"]


def test_the_tables_say_errors_apart_and_one_seed_unknown(figures, earned, monkeypatch, tmp_path):
    records, frontier = planted(shift=0.1)
    records = [r for r in records if r["recipe"] == "base" or r["seed"] == 0]
    beyond = records[0] | {"recipe": "given a gradient", "kl": [-0.1, 0.5], "folds": [2, 32]}
    records.append(beyond)
    document = {"rows": figures.summary(records, frontier), "images": 800, "sentences": 200}
    (tmp_path / "recipes.json").write_text(json.dumps(document))
    monkeypatch.setattr(earned, "RECIPES", tmp_path / "recipes.json")
    table = earned.beside(("rank 64", "rank 4", "given a gradient"))
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["base", "rank 4", "given a gradient"], "what was not measured has no row"
    base, other, last = table.rows
    assert last[5:] == ("–", "–", "2 of 32")
    assert base[1] == "3"
    assert other[1] == "1"
    assert base[6] == "–"
    assert "± unknown ±" in other[6]
    value, seeds, sentences = (float(part) for part in base[5].split(" ± "))
    row = document["rows"][0]
    assert value == pytest.approx(100 * row["efficiency"][0], abs=0.051)
    assert seeds == pytest.approx(100 * row["efficiency"][1], abs=0.051)
    assert sentences == pytest.approx(100 * row["efficiency over sentences"], abs=0.051)
    assert len(earned.recipe_steps().rows) == 1


@pytest.mark.parametrize("power", [1, 2])
def test_correlations_are_within_sentences(recipes, power):
    """Of noises correlated by s a linear reward by s, a quadratic one by s²; not what differs between sentences."""
    sentences, each, s, replicates = len(recipes.split()[1]), 4, 0.6, 80
    draw = torch.Generator().manual_seed(8 + power)

    def normals(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    found = []
    for _ in range(replicates):
        one, z, level = normals(each, sentences), normals(each, sentences), 10 * normals(sentences)
        other, pool = s * one + math.sqrt(1 - s**2) * z, normals(sentences, 96)
        values = [(level + x**power).flatten() for x in (one, other)]
        found.append(recipes.correlation(*values, level[:, None] + pool**power))
    value, error = torch.tensor(found).T
    spread = float(value.std())
    assert abs(float(value.mean()) - s**power) < 4 * spread / math.sqrt(replicates), "4 errors: 6e-5"
    assert float(error.mean()) == pytest.approx(spread, rel=4 / math.sqrt(2 * replicates))


def test_another_reward_is_that_of_its_images(recipes, training):
    backend = training.started(16, "cpu", 0)
    names, own = list(recipes.split()[0][:3]), backend.default_reward
    x = recipes.normal(backend, 3, torch.Generator().manual_seed(0))
    images = backend.generate(x, backend.encode(names)).detach()
    for name in training.REWARDS:
        found = recipes.scored(training.rewarded(backend, name), x, names)
        torch.testing.assert_close(found, training.REWARDS[name](images).double(), check_device=False)
    assert backend.default_reward == own, "runs share the backend"
    left = torch.zeros(1, 3, 32, 32)
    left[..., :16] = 1
    assert training.REWARDS["ink on the left"](left) > 0 > training.REWARDS["ink on the left"](left.flip(-1))
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 1
    assert training.REWARDS["redness"](red) > 0 > training.REWARDS["redness"](1 - red)


# --- training -----------------------------------------------------------------------------------------------------


class Curved(torch.nn.Module):
    """A map of noises (1, 1, 4) whose Jacobian `(I + cos(Wx)/10) W` depends on the point."""

    def __init__(self, scale=0.3):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(scale * torch.randn(4, 4, generator=draw, dtype=torch.float64))

    def forward(self, x, condition):
        moved = x.flatten(1) @ self.weight.mT
        return (moved + 0.1 * moved.sin()).reshape(x.shape) + 0 * condition.tensors["level"][:, None, None, None]

    def jacobians(self, x):
        moved = x.flatten(1) @ self.weight.mT
        return (1 + 0.1 * moved.cos())[:, :, None] * self.weight


class Fake:
    """A generator whose images are its noises, and a reward known in closed form."""

    noise_shape, device = (1, 1, 4), torch.device("cpu")

    def encode(self, prompts):
        level = torch.tensor([float(len(prompt)) for prompt in prompts], dtype=torch.float64)
        return Condition(prompts=tuple(prompts), tensors={"level": level})

    def generate(self, x, condition):
        return x.double()

    def default_reward(self, images, prompts):
        return -(images.flatten(1) - 1).square().sum(1) / 2


def batch(rows):
    x = torch.randn(rows, 1, 1, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [f"prompt {i}" for i in range(rows)], x


def steered(training, **settings):
    network, recipe = Curved(), replace(training.Recipe(), bound=math.inf, **settings)
    network.recipe, network.backend = recipe, Fake()
    losses = training.Losses(NoiseLoss(alpha=recipe.alpha), NoiseLoss(kl=recipe.kl, alpha=recipe.alpha))
    return network, recipe, losses


def test_the_mixture_leaves_out_what_maps_are_measured_on(recipes, training):
    left, measured = recipes.split()
    mixed = training.sentences(training.Recipe(weigh_kinds=True))
    assert training.sentences(training.Recipe()) == left
    assert set(mixed) == set(left)
    assert set(mixed).isdisjoint(measured)
    assert len(mixed) > 2 * len(left), "rare kinds recur"


@pytest.mark.parametrize("alpha", [0.25, 2.0])
def test_each_sample_s_gradient_of_the_reward_is_bounded_in_its_own_units(training, alpha):
    """The gradient of the loss is that of `|f|^2/2 - <g, f> / alpha`, g no longer than the bound."""
    network, recipe, losses = steered(training, alpha=alpha)
    recipe = replace(recipe, bound=1.5)
    names, x = batch(6)
    condition = network.backend.encode(names)
    value = training.objective(recipe, losses, network, condition, x, torch.Generator())
    (found,) = torch.autograd.grad(value, network.weight)
    delta = network(x, condition).flatten(1)
    slope = 1 - (x.flatten(1) + delta.detach())  # of the reward
    size = slope.norm(dim=1, keepdim=True)
    assert float(size.min()) < 1.5 < float(size.max()), "some are bounded, some are not"
    bounded = slope * (1.5 / size).clamp(max=1)
    written = (delta.square().sum(1) / 2 - (bounded * delta).sum(1) / alpha).mean()
    (expected,) = torch.autograd.grad(written, network.weight)
    torch.testing.assert_close(found, expected)


def test_a_recipe_starts_as_training_does(training):
    """LoRA's A is normal with deviation 1 / rank and B zero, as in `hnkit train`."""
    backend = training.started(16, "cpu", 3)
    weights = {n: p.detach() for n, p in backend.hypernetwork.named_parameters() if p.requires_grad}
    first = torch.cat([p.flatten() for n, p in weights.items() if "lora_A" in n])
    assert float(first.std()) * 16 == pytest.approx(1, rel=4 / math.sqrt(2 * len(first)))
    assert not any(p.any() for n, p in weights.items() if "lora_B" in n)


@pytest.mark.parametrize("kl", ["second-order", "arnoldi", "exact"])
def test_the_curved_part_of_all_rows_is_the_loss_itself(training, kl):
    network, recipe, losses = steered(training, kl=kl, curved=1)
    names, x = batch(6)
    condition, backend = network.backend.encode(names), network.backend
    value = training.objective(recipe, losses, network, condition, x, torch.Generator().manual_seed(7))
    (mine,) = torch.autograd.grad(value, network.weight)
    terms = NoiseLoss(kl=kl, alpha=recipe.alpha)(
        ConditionedMap(network, condition), x, lambda moved: moved,
        lambda images: backend.default_reward(images, names), generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    (whole,) = torch.autograd.grad(terms.total.mean(), network.weight)
    torch.testing.assert_close(value, terms.total.mean())
    torch.testing.assert_close(mine, whole)


def test_the_curved_part_of_some_rows_is_their_mean(training):
    network, recipe, losses = steered(training, kl="exact", curved=3)
    names, x = batch(6)
    value = training.objective(recipe, losses, network, network.backend.encode(names), x, torch.Generator())
    J = network.jacobians(x)
    rest = torch.diagonal(J, dim1=1, dim2=2).sum(1) - torch.linalg.slogdet(torch.eye(4) + J)[1]
    delta = network(x, network.backend.encode(names))
    l2 = delta.flatten(1).square().sum(1) / 2 - network.backend.default_reward(x + delta, names) / recipe.alpha
    torch.testing.assert_close(value, l2.mean() + rest[:2].mean())


def test_the_fold_penalty_is_of_the_smallest_eigenvalue(training):
    network, recipe, losses = steered(training, curved=1, fold_penalty=2.0)
    names, x = batch(5)
    with torch.no_grad():
        network.weight.mul_(5)
    condition, J = network.backend.encode(names), network.jacobians(x)
    lowest = torch.linalg.eigvalsh((J + J.mT) / 2)[:, 0]
    found = training.smallest_eigenvalue(
        lambda noise: network(noise, condition), x, torch.Generator().manual_seed(0), iterations=300
    )
    torch.testing.assert_close(found, lowest, rtol=1e-6, atol=1e-6)
    few = training.smallest_eigenvalue(lambda noise: network(noise, condition), x, torch.Generator().manual_seed(0))
    assert bool((few >= lowest - 1e-9).all()), "a Rayleigh quotient is never below"
    value = training.objective(recipe, losses, network, condition, x, torch.Generator().manual_seed(0))
    plain = losses.l2(
        ConditionedMap(network, condition), x, lambda moved: moved,
        lambda images: network.backend.default_reward(images, names),
    ).total.mean()  # fmt: skip
    torch.testing.assert_close(value - plain, 2 * (-0.9 - few).clamp(min=0).square().mean())
    assert float((value - plain).detach()) > 0


def test_the_rate_of_a_step(training):
    constant = replace(training.Recipe(), steps=40)
    assert [training.rate(constant, step) for step in (0, 19, 39)] == [1 / 20, 1, 1]
    cosine = replace(constant, schedule="cosine")
    assert training.rate(cosine, 20) == pytest.approx(0.5)
    assert training.rate(cosine, 39) == pytest.approx((1 - math.cos(math.pi / 40)) / 2)


def test_momentum_is_that_of_nesterov(training):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    sgd = training.optimizer_of(replace(training.Recipe(), optimizer="sgd", lr=0.5), [weight])
    moved = 0.0
    for expected in (1.9, 2.71):  # of equal gradients g: g + 0.9 v, where v = g, 1.9 g, ...
        weight.grad = torch.ones(2)
        sgd.step()
        moved += 0.5 * expected
        torch.testing.assert_close(weight.detach(), torch.tensor([1.0, 2.0]) - moved)


def test_the_difference_to_the_network_starts_at_zero_and_learns(recipes, training):
    backend = training.started(16, "cpu", 0)
    steered = training.Steered(recipes.RECIPES["difference"], backend)
    names = recipes.split()[0][:2]
    x = recipes.normal(backend, 2, torch.Generator().manual_seed(0))
    condition = backend.encode(names)
    delta = steered(x, condition)
    assert not delta.any()
    assert float(steered.network(x, condition).detach().std()) > 0.5, "the last layer has its weights"
    (delta * x).sum().backward()
    last = [float(p.grad.abs().max()) for name, p in steered.trained().items() if "lora_B" in name]
    assert min(last) > 0, "every layer's B has a gradient in the first step, not the last layer's alone"
    plain = training.Steered(training.Recipe(), training.started(16, "cpu", 0))
    assert plain.trained().keys() == steered.trained().keys()
    assert not plain(x, condition).any(), "the network that runs share is as it was"


def test_regressed_on_bounded_gradients(training):
    names, _ = batch(8)
    recipe = replace(training.Recipe(), objective="gradient", bound=1.5, alpha=0.5, batch=8)
    drawn_names, noise, target = training.regressed(recipe, 8, Fake(), names, torch.Generator().manual_seed(5))
    slope = 1 - noise.double()  # of the reward
    size = slope.flatten(1).norm(dim=1)
    shrunk = slope * (1.5 / size).clamp(max=1)[:, None, None, None]
    torch.testing.assert_close(target.double(), shrunk / 0.5)
    assert set(drawn_names) <= set(names)


def test_regressed_on_the_proximal_map(training):
    """Of the quadratic reward it is x + (1 - x) / (1 + alpha)."""
    names, _ = batch(8)
    recipe = replace(training.Recipe(), objective="proximal map", bound=math.inf, alpha=2.0, batch=8)
    _, noise, target = training.regressed(recipe, 8, Fake(), names, torch.Generator().manual_seed(5))
    best = (1 - noise) / 3
    assert float((target - best).norm()) < 0.6 * float(best.norm()), "five steps go most of the way"


def test_a_pool_is_gone_through_evenly(training):
    names, _ = batch(8)
    recipe = replace(training.Recipe(), objective="gradient", batch=4, steps=9, pool=12)
    batches = training.pooled(recipe, Fake(), names, torch.Generator().manual_seed(5))
    seen = [tuple(row.flatten().tolist()) for step in range(9) for row in batches(step)[1]]
    assert {seen.count(row) for row in seen} == {3}
    assert len(set(seen)) == 12


def test_antithetic_noises_and_sentences_of_several(training):
    names, _ = batch(8)
    draw = torch.Generator().manual_seed(5)
    some, x = training.drawn(replace(training.Recipe(), antithetic=True), 8, Fake(), names, draw)
    assert some[::2] == some[1::2]
    torch.testing.assert_close(x[::2], -x[1::2])
    some, x = training.drawn(replace(training.Recipe(), noises=4), 8, Fake(), names, draw)
    assert some[:4] == [some[0]] * 4
    assert float((x[0] - x[1]).norm()) > 0


@pytest.mark.parametrize(("scale", "folds"), [(0.2, False), (-0.7, True)])
def test_what_a_map_is_measured_to_earn(recipes, scale, folds):
    """Gain, nats, folds and smallest eigenvalues are those of the map, written out."""
    network, backend = Curved(scale=scale), Fake()
    network.backend, network.hint = backend, None
    sentences = recipes.split()[1]
    texts = [sentences[i % len(sentences)] for i in range(recipes.IMAGES)]
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(recipes.IMAGES, *backend.noise_shape, generator=draw, dtype=torch.float64)
    base = recipes.scored(backend, x, texts)
    pool = [3 * torch.randn(96, generator=draw, dtype=torch.float64) for _ in sentences]
    yard = recipes.Yardstick(texts, x, base, Frontier(pool))
    found = recipes.figures(network, yard, spectrum=True)
    with torch.no_grad():
        delta = network(x, backend.encode(texts))
        J = network.jacobians(x)
    gain = backend.default_reward(x + delta, texts) - base
    each = gain.reshape(4, 200).mean(0)  # four images of each of 200 sentences
    assert found["gain"] == pytest.approx((float(each.mean()), float(each.std()) / math.sqrt(200)))
    sign, log = torch.linalg.slogdet(torch.eye(4) + J)
    rest = (torch.diagonal(J, dim1=1, dim2=2).sum(1) - log)[: recipes.OF_KL]
    l2 = delta.flatten(1).square().sum(1) / 2
    assert found["l2"][0] == pytest.approx(float(l2.mean()))
    assert found["kl"][0] == pytest.approx(float(l2.mean() + rest.mean()), rel=1e-5)
    assert found["errors"] == pytest.approx(rest.tolist(), abs=1e-5)
    assert found["folds"] == [int((sign[: recipes.OF_KL] < 0).sum()), recipes.OF_KL]
    lowest = torch.linalg.eigvalsh((J + J.mT) / 2)[: recipes.OF_SPECTRUM, 0]
    assert found["lowest"] == pytest.approx(lowest.tolist(), abs=1e-5)
    assert (found["folds"][0] > 0) == folds
    share = float(gain.mean()) / yard.frontier.point(found["kl"][0]).gain
    assert found["efficiency"][0] == pytest.approx(share)
