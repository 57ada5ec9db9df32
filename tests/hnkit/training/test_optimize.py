"""Rates, averaged weights and the optimiser's state."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hnkit import InputError
from hnkit.config import TrainConfig
from hnkit.training.optimize import (
    WeightAverage,
    bounded_rows,
    build_optimizer,
    learning_rate,
    load_optimizer,
    load_parameters,
    optimizer_tensors,
)


def test_rates():
    constant = TrainConfig(lr=2.0, steps=10, warmup=4)
    assert [learning_rate(constant, step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    linear = TrainConfig(lr=2.0, steps=10, warmup=2, schedule="linear")
    assert learning_rate(linear, 2) == 2.0
    assert learning_rate(linear, 6) == 1.0
    assert learning_rate(linear, 10) == 0.0
    cosine = TrainConfig(lr=2.0, steps=8, schedule="cosine")
    assert [round(learning_rate(cosine, step), 12) for step in (0, 2, 4, 8)] == [2.0, 1.707106781187, 1.0, 0.0]


def test_a_gradient_is_bounded_row_by_row_and_short_ones_pass_untouched():
    x = torch.zeros(5, 2, 2, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(5, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([0.1, 2.9, 3.1, 4000.0, 0.0], dtype=torch.float64)
    given = directions / directions.flatten(1).norm(dim=1)[:, None, None] * sizes[:, None, None]
    bounded = bounded_rows(x, 3.0)
    assert torch.equal(bounded, x)
    (passed,) = torch.autograd.grad(bounded, x, given)
    assert torch.equal(passed[[0, 1, 4]], given[[0, 1, 4]])
    norms = passed.flatten(1).norm(dim=1)
    assert norms[2:4].tolist() == pytest.approx([3.0, 3.0], rel=1e-14)
    cosine = (passed * given).flatten(1).sum(1)[2:4] / norms[2:4] / sizes[2:4]
    assert cosine.tolist() == pytest.approx([1.0, 1.0], rel=1e-14)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_made_finite(value):
    x = torch.zeros(2, 3, requires_grad=True)
    given = torch.ones(2, 3)
    given[1, 2] = value
    (passed,) = torch.autograd.grad(bounded_rows(x, 1.0), x, given)
    assert bool(passed[0].isfinite().all())
    assert not bool(passed[1].isfinite().all())


def test_average_follows_its_recurrence():
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    average = WeightAverage({"w": parameter}, 0.9)
    expected = 1.0
    for value in (2.0, -3.0, 0.5):
        parameter.data.fill_(value)
        average.update()
        expected = 0.9 * expected + 0.1 * value
    assert float(average.average["w"]) == pytest.approx(expected, rel=1e-15)
    with average.applied():
        assert float(parameter.detach()) == pytest.approx(expected, rel=1e-15)
    assert float(parameter.detach()) == 0.5


@pytest.mark.parametrize(
    "config", [TrainConfig(optimizer="adamw"), TrainConfig(optimizer="sgd", momentum=0.9), TrainConfig(optimizer="sgd")]
)
def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened(config):
    def steps(parameters, optimizer, count):
        for step in range(count):
            for index, parameter in enumerate(parameters):
                parameter.grad = torch.full_like(parameter, 1.0 + index - step)
            optimizer.step()

    def fresh():
        parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(3))]
        return parameters, build_optimizer(config, parameters)

    parameters, optimizer = fresh()
    steps(parameters, optimizer, 3)
    tensors, numbers = optimizer_tensors(optimizer)
    others, restored = fresh()
    load_parameters(dict(enumerate(others)), dict(enumerate(p.detach() for p in parameters)))
    load_optimizer(restored, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(numbers)))
    steps(parameters, optimizer, 2)
    steps(others, restored, 2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_foreign_parameters_are_refused():
    parameters = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(1))}
    for values in ({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(2)}, {"c": torch.zeros(1)}):
        with pytest.raises(InputError, match="do not fit"):
            load_parameters(parameters, values)


def test_missing_bitsandbytes_is_one_line():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="bitsandbytes"):
            build_optimizer(TrainConfig(optimizer="adamw8bit"), [nn.Parameter(torch.zeros(1))])
