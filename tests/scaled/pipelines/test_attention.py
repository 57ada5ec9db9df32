"""On a card the attention that is wrong there is switched off; elsewhere torch's choice stays as it was."""

from __future__ import annotations

import pytest
import torch

from hnkit.scaled.pipelines import loading


@pytest.fixture
def cudnn():
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(enabled)


@pytest.mark.parametrize(("device", "left"), [("cuda", False), ("cuda:1", False), ("cpu", True), ("mps", True)])
def test_cudnn_attention_is_left_out_on_a_card_alone(device, left, cudnn):
    loading.leave_out_cudnn_attention(torch.device(device))
    assert cudnn() == left
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_a_pipeline_asks_for_it_when_it_is_loaded(make_backend, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "leave_out_cudnn_attention", asked.append)
    make_backend("sd-turbo")
    assert asked == [torch.device("cpu")]
