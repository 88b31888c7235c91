"""The dict of metrics that is filled when it is looked at."""

import copy
import pickle

import pytest
import torch

from vcr1_fast.ops import grpo_loss
from vcr1_fast.ops.grpo_metrics import LossMetrics

NAMES = (("b", 2), ("a", 0))
VECTOR = torch.tensor([1.0, 2.0, 3.0])


def unlooked_at():
    return LossMetrics.of(VECTOR, NAMES)


def plain():
    return {"b": VECTOR[2], "a": VECTOR[0]}


def changed(change):
    def run(metrics):
        change(metrics)
        return list(metrics.items())

    return run


LOOKS = {
    "getitem": lambda m: m["a"],
    "get": lambda m: (m.get("a"), m.get("c"), m.get("c", 5)),
    "contains": lambda m: ("a" in m, "c" in m),
    "len": len,
    "bool": bool,
    "iter": list,
    "reversed": lambda m: list(reversed(m)),
    "keys": lambda m: list(m.keys()),
    "values": lambda m: list(m.values()),
    "items": lambda m: list(m.items()),
    "dict": lambda m: list(dict(m).items()),
    "unpacked": lambda m: list({**m}.items()),
    "arguments": lambda m: (lambda **given: list(given.items()))(**m),
    "updated": lambda m: list(_updated({"z": 1}, m).items()),
    "or": lambda m: list((m | {"z": 1}).items()),
    "ror": lambda m: list(({"z": 1} | m).items()),
    "ior": lambda m: list(_or_in_place(m).items()),
    "copy": lambda m: list(m.copy().items()),
    "copy.copy": lambda m: list(copy.copy(m).items()),
    "pickle": lambda m: list(pickle.loads(pickle.dumps(m)).items()),
    "repr": repr,
    "eq": lambda m: (m == {}, m != {}),
    "pop": lambda m: (m.pop("a"), list(m.items())),
    "popitem": lambda m: (m.popitem(), list(m.items())),
    "setdefault": lambda m: (m.setdefault("a", 1), m.setdefault("c", 1), list(m.items())),
    "setitem": changed(lambda m: m.__setitem__("a", 4)),
    "delitem": changed(lambda m: m.__delitem__("a")),
    "update": changed(lambda m: m.update(a=4)),
    "clear": changed(lambda m: m.clear()),
    "rebuilt": lambda m: list(type(m)({n: x * 2 for n, x in m.items()}).items()),
}


def _updated(target, other):
    target.update(other)
    return target


def _or_in_place(metrics):
    metrics |= {"a": 4}
    return metrics


@pytest.mark.parametrize("look", LOOKS)
def test_looks_like_a_filled_dict(look):
    assert LOOKS[look](unlooked_at()) == LOOKS[look](plain())


def test_no_method_of_dict_is_forgotten():
    harmless = set(dir(object)) - {"__eq__", "__ne__", "__repr__", "__reduce_ex__"}
    harmless |= {"__class_getitem__", "fromkeys"}
    assert {n for n in dir(dict) if n not in harmless} <= set(vars(LossMetrics))


def test_views_are_made_once_and_late():
    metrics = grpo_loss(torch.zeros(2, 3), None, torch.ones(2), None)[1]
    assert isinstance(metrics, dict) and dict.__len__(metrics) == 0
    assert metrics["num_tokens"] == 6 and metrics["num_tokens"] is metrics["num_tokens"]
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
