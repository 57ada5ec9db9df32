"""The ledger against sums that are done by hand, on real and on fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hnkit.training.plan.cards import CARDS, LAUNCH, Card
from hnkit.training.plan.ledger import Operation, Work, counting, stored
from hnkit.training.plan.skeleton import fake_mode, make_fake, without_weights

ROWS, IN, OUT = 64, 32, 48


def tensors(fake: bool):
    """A layer without bias and its input, that needs a gradient."""
    if not fake:
        return nn.Linear(IN, OUT, bias=False), torch.ones(ROWS, IN, requires_grad=True)
    mode = fake_mode()
    layer = without_weights(lambda: nn.Linear(IN, OUT, bias=False))
    make_fake(mode, [layer])
    with mode:
        x = torch.ones(ROWS, IN)
    return layer, x.requires_grad_()


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_bytes_and_operations_of_a_layer_are_those_done_by_hand(fake):
    layer, x = tensors(fake)
    with counting() as ledger:
        ledger.enter("forward")
        hidden = layer(x)
        y = torch.nn.functional.silu(hidden)
        del hidden  # silu saves it
        assert ledger.live == 2 * 4 * ROWS * OUT
        ledger.enter("backward")
        y.backward(torch.ones_like(y))
        # what is left: the output, the gradient that was given to it is gone, those of input and weights have come
        assert ledger.live == 4 * (ROWS * OUT + ROWS * IN + IN * OUT)
    assert ledger.work["forward"].flops == 2 * ROWS * IN * OUT
    assert ledger.work["backward"].flops == 2 * (2 * ROWS * IN * OUT)
    assert ledger.peak("forward") == 2 * 4 * ROWS * OUT
    # the gradient behind silu beside both activations and the given gradient; later those of input and weights, beside
    # the output, the given gradient, which the caller holds, and the one behind silu
    activation = 4 * ROWS * OUT
    assert ledger.peak("backward") == max(4 * activation, 3 * activation + 4 * (ROWS * IN + IN * OUT))


def test_a_view_costs_nothing_and_what_is_changed_in_place_is_there_already():
    x = torch.ones(8, 4)
    with counting() as ledger:
        ledger.enter("views")
        x.t()[1:].reshape(-1, 2)
        moved = ledger.work.get("views", Work()).counts
        x.t().unsqueeze(0)
        assert ledger.work.get("views", Work()).counts == moved
        x.add_(1)
        assert ledger.live == 0
    assert sum(operation.moved for operation in ledger.work["views"].counts) >= 2 * 8 * 4 * 4


def test_attention_is_counted_where_it_is_one_kernel():
    q = torch.ones(1, 2, 64, 16, requires_grad=True)
    with counting() as ledger:
        ledger.enter("attention")
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert ledger.work["attention"].flops == 2 * 2 * (2 * 64 * 64 * 16)


def test_storages_are_summed_once():
    x = torch.ones(10)
    assert stored([x, x[2:], x.view(2, 5), torch.ones(3)]) == 4 * 13


def test_an_operation_takes_the_longest_of_computing_moving_and_launching():
    card = Card("test", "test", 1e9, half=1e12, single=1e11, bandwidth=1e10, source="made up")
    assert Operation(10**9, 1, half=True).seconds(card) == 1e-3
    assert Operation(10**9, 1, half=False).seconds(card) == 1e-2
    assert Operation(0, 10**9, half=True).seconds(card) == 0.1
    assert Operation(0, 10**9, half=True).seconds(card, rows=3) == pytest.approx(0.3)
    assert Operation(1, 1, half=True).seconds(card) == LAUNCH


def test_shared_tensors_stay_shared_when_they_are_made_fake():
    def build():
        one, two = nn.Linear(3, 3), nn.Linear(3, 3)
        two.weight = one.weight
        return one, two

    one, two = without_weights(build, torch.bfloat16)
    make_fake(fake_mode(), [one, two])
    assert one.weight is two.weight
    assert one.weight.dtype == torch.bfloat16
    assert one.bias is not two.bias


def test_every_card_says_where_its_figures_are_from_and_is_named_once():
    for name, card in CARDS.items():
        assert card.name == name
        assert card.source
        assert card.single < card.half
        assert 20e9 < card.memory < 150e9
