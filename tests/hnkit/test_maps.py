"""Row selection and the loop over rows: which maps have conditions of their own, and what a chunk of them is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hnkit import InputError, NoiseLoss, dense_jacobian, noise_kl
from hnkit.jacobian import check_map
from hnkit.maps import Condition, ConditionedMap, at_rows, chunked, map_numbers, select_rows, selects_rows, slices
from tests.hnkit.functions import Slopes


class Scaled(nn.Module):
    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        return x * condition.tensors["scale"][:, None]


SCALE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 100])
@pytest.mark.parametrize(
    "f", [Slopes(SCALE), ConditionedMap(Scaled(), Condition(("a", "b", "c", "d"), {"scale": SCALE}))]
)
@pytest.mark.parametrize("rows", [None, [3, 3, 0, 1, 1, 2]])
def test_chunks_cover_the_rows_in_order_under_their_own_conditions(f, width: int, rows) -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    index = None if rows is None else torch.tensor(rows)
    parts = list(chunked(f, x, width, index))
    expected = torch.arange(4) if index is None else index
    assert torch.equal(torch.cat([part for part, _, _ in parts]), expected)
    assert [len(points) for _, _, points in parts[:-1]] == [width] * (len(parts) - 1)
    assert 1 <= len(parts[-1][2]) <= width
    values = torch.cat([inner(points) for _, inner, points in parts])
    torch.testing.assert_close(values, SCALE[expected, None] * x[expected])


def test_the_first_rows_are_as_many_as_there_are() -> None:
    f, x = Slopes(SCALE), torch.ones(4, 2, dtype=torch.float64)
    for count, left in ((2, 2), (4, 4), (9, 4)):
        inner, points = at_rows(f, x, count)
        torch.testing.assert_close(inner(points), SCALE[:left, None].expand(left, 2))


@pytest.mark.parametrize(("count", "width"), [(0, 3), (1, 3), (3, 3), (7, 3), (6, 3), (5, 1)])
def test_slices_cover_a_count(count: int, width: int) -> None:
    parts = list(slices(count, width))
    assert [k for part in parts for k in range(count)[part]] == list(range(count))
    assert all(0 < part.stop - part.start <= width and part.stop <= count for part in parts)
    assert len(parts) == -(-count // width)


def test_a_rows_draws_belong_to_its_image_wherever_it_stands() -> None:
    def draws(condition: Condition, purpose: str, *position: int) -> list[float]:
        return [float(torch.randn((), generator=g)) for g in condition.generators(purpose, *position)]

    condition = Condition(("a", "b/1", "a", "a")).of_images(7, (4, 0, 5, 4))
    found = draws(condition, "sampler")
    assert found == draws(condition, "sampler")
    assert found[0] == found[3] != found[2]
    index = torch.tensor([2, 1, 1])
    assert draws(condition.select(index), "sampler") == [found[2], found[1], found[1]]
    assert draws(Condition(("b/1",)).of_images(7, (0,)), "sampler") == [found[1]]
    several = [
        found,
        draws(condition, "noise"),
        draws(condition, "sampler", 1),
        draws(condition.of_images(8, (4, 0, 5, 4)), "sampler"),
    ]
    assert len({value for values in several for value in values}) == 3 * len(several)
    # without a word about images, the rows of a prompt are its images 0, 1, ...
    assert Condition(("a", "b", "a")) == Condition(("a", "b", "a")).of_images(0, (0, 0, 1))
    assert Condition(("a", "b", "a")).select(torch.tensor([2])).seeds == Condition(("a",)).of_images(0, (1,)).seeds
    # no prompt can pass for the number of another
    assert Condition(("1/a",)).of_images(0, (0,)).seeds != Condition(("a",)).of_images(0, (1,)).seeds
    with pytest.raises(InputError, match="1 seeds and 2 prompts"):
        Condition(("a", "b"), seeds=(1,))


class Submodule(nn.Module):
    """A map with a layer of its own that happens to be called `select`."""

    def __init__(self) -> None:
        super().__init__()
        self.select = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * self.select(x)


class Tokens(nn.Module):
    """A map whose method `select` selects something else."""

    def select(self, tokens: Tensor) -> Tensor:
        return tokens.topk(2).values

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * x * self.select(x).mean(1, keepdim=True).tanh()


class Named(nn.Module):
    """A map whose `select` takes a name and an index."""

    def select(self, name: str, index: Tensor) -> Tensor:
        raise AssertionError("not for row selection")

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * x


def attribute() -> nn.Module:
    f = nn.Linear(3, 3)
    f.weight.data *= 0.3  # whatever is drawn, a contraction, as Arnoldi's method needs it
    f.select = lambda index: f  # type: ignore[assignment]
    return f


@pytest.mark.parametrize("build", [Submodule, Tokens, Named, attribute, lambda: lambda x: 0.1 * x])
def test_a_select_of_the_modules_own_is_left_alone(build) -> None:
    f, x = build(), torch.randn(4, 3)
    assert not selects_rows(f)
    assert select_rows(f, torch.tensor([0])) is f
    check_map(f, x)
    noise_kl(f, x, method="arnoldi", probes=2)
    dense_jacobian(f, x, chunk=1)
    NoiseLoss("arnoldi", probes=2)(f, x, lambda z: z, lambda y: y.sum(1))


def test_a_select_that_returns_no_map_is_refused_in_one_line() -> None:
    class Rows(Slopes):
        def select(self, index: Tensor) -> Tensor:  # type: ignore[override]
            return self.slopes[index]

    assert selects_rows(Rows(SCALE))
    with pytest.raises(InputError, match="select\\(index\\) returned Tensor"):
        noise_kl(Rows(SCALE), torch.ones(4, 2, dtype=torch.float64))


def test_a_wrapped_method_and_an_optional_argument_still_select() -> None:
    class Optional(Slopes):
        def select(self, index: Tensor, *, keep: bool = True) -> Slopes:
            return super().select(index)

    assert selects_rows(Optional(SCALE))
    torch.testing.assert_close(
        select_rows(Optional(SCALE), torch.tensor([2]))(torch.ones(1, 1)).double(), SCALE[2:3, None]
    )


def test_which_rows_are_of_one_map():
    """Prompt and condition both decide; of another map that selects rows nothing is known."""
    scale = torch.tensor([0.1, 0.2, 0.1, 0.1, 0.3])
    condition = Condition(("a", "b", "a", "c", "a"), {"scale": scale})
    assert map_numbers(ConditionedMap(Scaled(), condition), 5).tolist() == [0, 1, 0, 3, 4]
    assert map_numbers(ConditionedMap(Scaled(), condition), 3).tolist() == [0, 1, 0]
    assert map_numbers(Slopes(SCALE), 4).tolist() == [0, 1, 2, 3]
    assert map_numbers(torch.sin, 3).tolist() == [0, 0, 0]


class Turned(nn.Module):
    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        scale = condition.tensors["scale"][:, None]
        return scale * torch.tanh(2 * x) + condition.tensors["shift"][:, None] * x


@pytest.mark.parametrize(("prompts", "word"), [("aaaa", "violated"), ("abab", "unknown"), ("abba", "violated")])
def test_a_fold_under_one_prompt_is_one(prompts, word):
    """x + f(x) = x - 0.8 tanh 2x turns over near 0 alone; under two prompts each sample may be of a map of its own."""
    x = torch.tensor([[0.05], [2.0], [0.05], [2.0]], dtype=torch.float64)
    row = torch.full((4,), -0.8, dtype=torch.float64)
    tensors = {"scale": row, "shift": torch.zeros_like(row)}
    f = ConditionedMap(Turned(), Condition(tuple(prompts), tensors))
    found = noise_kl(f, x, certify=False)
    assert found.parts.sign.tolist() == [-1, 1, -1, 1]
    assert found.injective == word
