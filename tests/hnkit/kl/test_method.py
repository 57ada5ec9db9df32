"""Estimators as objects: names are shorthand for them, and a new one is one class."""

import dataclasses
from typing import ClassVar

import pytest
import torch

import hnkit.kl.method
from hnkit import InputError, noise_kl
from hnkit.kl import L2, Arnoldi, Exact, Lanczos, LowRank, Power, Roulette, SecondOrder
from hnkit.kl.divergence import METHODS
from hnkit.kl.method import Probed
from tests.hnkit.functions import network, noise, seeded

OBJECTS = [
    (Exact(), "exact", {}),
    (L2(), "l2", {}),
    (Arnoldi(probes=3, steps=4), "arnoldi", {"probes": 3, "steps": 4}),
    (Arnoldi(probes=3, variance_reduction="xtrace"), "arnoldi", {"probes": 3, "variance_reduction": "xtrace"}),
    (Lanczos(tolerance=1e-6, probe="gaussian"), "lanczos", {"tolerance": 1e-6, "probe": "gaussian"}),
    (Power(steps=5), "power", {"steps": 5}),
    (LowRank(probes=2, rank=4), "low-rank", {"probes": 2, "rank": 4}),
    (Roulette(sure=2), "roulette", {"sure": 2}),
    (SecondOrder(probes=2), "second-order", {"probes": 2}),
]


@pytest.mark.parametrize(("estimator", "name", "options"), OBJECTS, ids=str)
def test_a_name_with_options_is_shorthand_for_an_object(estimator, name: str, options: dict) -> None:
    f, x = network(), noise(6, 6)
    first = noise_kl(f, x, method=estimator, generator=seeded())
    second = noise_kl(f, x, method=name, generator=seeded(), **options)
    assert torch.equal(first.per_sample, second.per_sample)
    assert first.method == second.method == name


def test_every_method_has_its_object() -> None:
    assert {name for _, name, _ in OBJECTS} == set(METHODS)


def test_options_beside_an_object_and_unknown_ones_are_refused() -> None:
    f, x = network(), noise(3, 6)
    with pytest.raises(InputError, match=r"probes beside an estimator: give Arnoldi\(...\) its options"):
        noise_kl(f, x, method=Arnoldi(), probes=2)
    with pytest.raises(InputError, match="unknown option 'probess'"):
        noise_kl(f, x, method="arnoldi", probess=2)
    with pytest.raises(InputError, match="tolerance 2 is not between"):
        Arnoldi(tolerance=2)
    with pytest.raises(InputError, match="unknown method 3"):
        noise_kl(f, x, method=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("generator", [3, "1", 0.5])
def test_a_generator_that_is_none_is_one_line(method, generator) -> None:
    with pytest.raises(InputError, match=r"generator .* is no torch\.Generator"):
        noise_kl(network(), noise(3, 6), method=method, generator=generator)


def test_a_new_estimator_is_one_class() -> None:
    """A class with a name is a method, with its options, its errors, its plans and its record."""

    @dataclasses.dataclass(frozen=True)
    class Hutchinson(Probed):
        name: ClassVar[str] = "half-hutchinson"

        @property
        def fixed_products(self) -> int:
            return 2

        def form(self, operator, vectors, run):
            return SecondOrder(self.probes, self.probe).form(operator, vectors, run)

    try:
        f, x = network(), noise(20, 6)
        own = noise_kl(f, x, method="half-hutchinson", probes=2, generator=seeded())
        assert torch.equal(
            own.per_sample, noise_kl(f, x, method="second-order", probes=2, generator=seeded()).per_sample
        )
        assert noise_kl(f, x, method=Hutchinson(), budget=20, generator=seeded()).samples == 10
        with pytest.raises(InputError, match="half-hutchinson"):
            noise_kl(f, x, method="neither")
    finally:
        hnkit.kl.method._CLASSES.pop("half-hutchinson")
