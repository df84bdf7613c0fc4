"""Copies are copies, whatever is copied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sidecast.trainer.partitions.host_copy import copy_to_host


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (torch.zeros(5), torch.tensor([float("nan"), -0.0, 1.0, 2.0, float("inf")])),
        (torch.zeros(5, dtype=torch.bfloat16), torch.arange(5).to(torch.bfloat16)),
        (torch.zeros(5), torch.arange(5).to(torch.bfloat16)),
        (torch.zeros(()), torch.tensor(3.0)),
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(2, 3), torch.arange(6.0).view(3, 2).t()),
        (torch.zeros(10)[::2], torch.arange(5.0)),
        (torch.zeros(3), torch.nn.Parameter(torch.arange(3.0))),
    ],
    ids=["fp32", "bf16", "widened", "scalar", "empty", "transposed", "strided", "parameter"],
)
def test_what_is_copied_arrives(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        copy_to_host(target, source)
    assert target.equal(source.detach().to(target.dtype)) or target.isnan().any()
    assert target.isnan().equal(source.detach().float().isnan())
