"""The dict of metrics, to those who read a dict past its methods."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from vcr1_fast.ops import grpo_loss


def _stored(metrics):
    file = io.BytesIO()
    torch.save(metrics, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


READERS = {
    "json": lambda metrics: json.loads(json.dumps(metrics, default=float)),
    "pytree": lambda metrics: pytree.tree_map(float, metrics),
    "torch.load": _stored,
    "pickle": lambda metrics: pickle.loads(pickle.dumps(metrics)),
    "deepcopy": copy.deepcopy,
}


def _metrics():
    return grpo_loss(torch.zeros(2, 3, requires_grad=True), None, torch.ones(2), None)[1]


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_metrics_are_a_plain_dict(read):
    metrics = _metrics()
    assert type(metrics) is dict
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    expected = {name: float(value) for name, value in metrics.items()}
    assert expected["num_tokens"] == 6
    got = read(_metrics())  # which nobody has looked at
    assert {name: float(value) for name, value in got.items()} == expected
