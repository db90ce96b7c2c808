"""Which node a rank or an engine goes to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dapo_megatron.launcher.placement import ClusterNode, Role, Wanted, place
from dapo_megatron.types import ConfigError, EngineError


def nodes(*slots: int, roles: tuple[Role, ...] = ()) -> list[ClusterNode]:
    kinds = roles or ("any",) * len(slots)
    return [
        ClusterNode(f"n{at}", f"10.0.0.{at}", number, role) for at, (number, role) in enumerate(zip(slots, kinds, strict=True))
    ]


def wanted(ranks: int, tp: int = 1, engines: int = 0, size: int = 1) -> Wanted:
    return Wanted(num_ranks=ranks, tensor_parallel_size=tp, num_engines=engines, engine_size=size)


def test_gpus_are_filled_node_by_node():
    assert place(nodes(4, 4), wanted(6, tp=2), on_gpus=True).ranks == (0, 0, 0, 0, 1, 1)


def test_a_tensor_parallel_group_skips_a_gap_that_is_too_small_for_it():
    assert place(nodes(6, 4, 4), wanted(12, tp=4), on_gpus=True).ranks == (0,) * 4 + (1,) * 4 + (2,) * 4


@pytest.mark.parametrize(
    ("slots", "request_", "words"),
    [
        (
            (4, 4),
            wanted(8, tp=8),
            r"tensor_parallel_size \(8\) must .*: n0 has 4, n1 has 4, and none has 8 left for group 0; use",
        ),
        (
            (6, 6),
            wanted(12, tp=4),
            r"tensor_parallel_size \(4\) must .*: n0 has 6, n1 has 6, and none has 4 left for group 2; use",
        ),
    ],
)
def test_a_tensor_parallel_group_that_would_span_nodes_is_refused_unless_that_is_wanted(
    slots: tuple[int, ...], request_: Wanted, words: str
):
    with pytest.raises(ConfigError, match=words + ".*set cluster.tensor_parallel_across_nodes"):
        place(nodes(*slots), request_, on_gpus=True)
    ranks = place(nodes(*slots), replace(request_, may_span=True), on_gpus=True).ranks
    assert sorted(ranks) == [0] * slots[0] + [1] * slots[1]


def test_ranks_on_cpus_are_spread_evenly():
    assert place(nodes(16, 16), wanted(4, tp=2), on_gpus=False).ranks == (0, 0, 1, 1)
    assert place(nodes(16, 16), wanted(3), on_gpus=False).ranks == (0, 0, 1)


def test_engines_of_a_split_run_take_what_is_left_each_on_one_node():
    placement = place(nodes(8, 8), wanted(4, tp=4, engines=3, size=4), on_gpus=True)
    assert placement.engines == (0, 1, 1)


def test_in_a_heterogeneous_job_each_kind_keeps_to_its_nodes():
    placement = place(nodes(8, 8, roles=("engine", "actor")), wanted(4, engines=2, size=2), on_gpus=True)
    assert placement.ranks == (1, 1, 1, 1) and placement.engines == (0, 0)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (wanted(9), r"9 actor ranks do not fit: n0 has 4, n1 has 4"),
        (wanted(4, engines=2, size=3), r"engine 1 does not fit: .*tensor_parallel_size \(3\)"),
    ],
)
def test_what_does_not_fit_is_said_in_words(request_: Wanted, words: str):
    with pytest.raises(EngineError, match=words):
        place(nodes(4, 4), request_, on_gpus=True)
