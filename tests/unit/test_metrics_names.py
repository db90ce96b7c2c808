"""The table of metrics."""

import re

import pytest

from dapo_megatron.metrics.names import METRICS, require_known


def test_names_are_unique_and_shaped_like_room_slash_name():
    assert all(re.fullmatch(r"[a-z]+/[a-z0-9_]+", name) for name in METRICS)
    assert all(metric.unit and metric.meaning for metric in METRICS.values())


def test_units_follow_the_names():
    for name, metric in METRICS.items():
        for ending, unit in (("_seconds", "seconds"), ("_bytes", "bytes"), ("_nats", "nats"), ("_fraction", "fraction")):
            if name.endswith(ending):
                assert metric.unit == unit, name


def test_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"rollout/accuraccy is not a metric; did you mean rollout/accuracy"):
        require_known(["actor/loss", "rollout/accuraccy"])
