"""The Ray that a run's processes live under: one of its own, or a cluster's."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.backends import RayCluster
from dapo_megatron.types import EngineError


@contextmanager
def ray_session(config: Config, cluster: RayCluster | None = None) -> Iterator[None]:
    """Connect to the configured Ray, or start a local one (loopback only) and stop it at the end.

    With `cluster`: EngineError that names its nodes that did not join.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.cluster.ray_address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, config.actor.world_size + config.rollout.num_engines),
            "_node_ip_address": "127.0.0.1",
        }
    else:
        options |= {"address": config.cluster.ray_address}
        if cluster is not None:  # this process is on the node of its head
            options |= {"_node_ip_address": cluster.address.rpartition(":")[0]}
    try:
        ray.init(**options)
    except Exception as error:  # ray raises bare Exception when its processes do not come up in time
        raise EngineError(
            f"Ray did not start ({error}); look at /tmp/ray/session_latest/logs, or set cluster.ray_address"
        ) from error
    try:
        if cluster is not None:
            _wait_for_nodes(cluster, config.cluster.startup_deadline_seconds)
        yield
    finally:
        ray.shutdown()


def _wait_for_nodes(cluster: RayCluster, deadline_seconds: float) -> None:
    end = time.monotonic() + deadline_seconds
    while missing := [node.name for node in cluster.nodes if node.address not in alive_nodes()]:
        if time.monotonic() > end:
            raise EngineError(
                f"{', '.join(missing)} did not join Ray at {cluster.address} within cluster.startup_deadline_seconds ({deadline_seconds:g})"
            )
        time.sleep(0.1)


def alive_nodes() -> dict[str, dict[str, float]]:
    """Address -> resources, of the nodes of the Ray that this process is connected to."""
    return {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
