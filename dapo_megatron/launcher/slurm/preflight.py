"""The preflight of a job: the checks of all its nodes as one table, and what follows from them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dapo_megatron.config.checks import read_hf_config
from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.slurm.checks import Finding, Gathered, all_findings, bad_nodes, needed_host_bytes
from dapo_megatron.launcher.slurm.facts import folder_problem, gather
from dapo_megatron.launcher.slurm.network import free_ports
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.parameters import num_params
from dapo_megatron.types import BadNodeError

EXCLUDED = "excluded_nodes"
"""File in RUN/slurm with the nodes that must not be used again, one a line; the batch script gives them to Slurm."""
_STYLES = {"good": "green", "bad": "bold red", "skipped": "dim"}


def preflight(config: Config, gathered: Gathered, console: Console, exclude_from: Path | None = None) -> None:
    """Print the findings. BadNodeError when one is bad; with slurm.exclude_bad_nodes its node is noted in the folder `exclude_from`."""
    findings = all_findings(config, gathered, _needed_bytes(config, gathered))
    console.print(table(findings))
    bad = [finding for finding in findings if finding.verdict == "bad"]
    if not bad:
        return
    names = bad_nodes(findings)
    noted = ""
    if config.slurm.exclude_bad_nodes and exclude_from is not None and names:
        file = exclude_from / EXCLUDED
        known = file.read_text().split() if file.is_file() else []
        file.write_text("".join(f"{name}\n" for name in dict.fromkeys([*known, *names])))
        noted = f"; left out from now on ({file})"
    where = ", ".join(names) or "the nodes together"
    words = "; ".join(f"{finding.node or 'all nodes'}: {finding.check}: {finding.words}" for finding in bad)
    raise BadNodeError(f"preflight: {where} cannot run this{noted}. {words}")


def preflight_here(config: Config, console: Console, name: str | None = None, exclude_from: Path | None = None) -> None:
    """`preflight` of this machine alone, by `name`, else its host name: the run would have no other node."""
    try:
        free_ports("127.0.0.1", config.slurm, seed=0)
        network = ""
    except BadNodeError as error:
        network = str(error)
    facts = gather(name or socket.gethostname(), "127.0.0.1", network=network, run_folder=folder_problem(config.run.dir))
    preflight(config, Gathered((facts,)), console, exclude_from)


def table(findings: Sequence[Finding]) -> Table:
    """One row per finding."""
    found = Table(title="preflight", title_justify="left")
    for column in ("check", "node", "verdict", "finding"):
        found.add_column(column, overflow="fold")
    for finding in findings:
        found.add_row(finding.check, finding.node or "all", finding.verdict, finding.words, style=_STYLES[finding.verdict])
    return found


def _needed_bytes(config: Config, gathered: Gathered) -> int:
    parameters = num_params(ModelShape.from_hf(read_hf_config(config.model.path))) if config.model.path.is_dir() else 0
    num_nodes = sum(node.group == 0 for node in gathered.nodes)
    return needed_host_bytes(config, parameters, num_nodes, on_gpus=any(node.gpus for node in gathered.nodes))
