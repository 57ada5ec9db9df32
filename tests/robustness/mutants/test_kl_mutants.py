"""Small errors in `hnkit/kl.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

from dataclasses import replace

import torch

from hnkit import noise_kl


def test_no_truncation_is_not_printed():
    estimate = noise_kl(lambda x: 0.1 * x, torch.zeros(3, 2, dtype=torch.float64))
    assert "truncation" not in str(replace(estimate, bias_bound=None, bias_estimate=0.0))
    assert "truncation about 0.5" in str(replace(estimate, bias_bound=None, bias_estimate=0.5))
