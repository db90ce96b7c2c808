"""How the suite is cut into pieces that run beside each other, under pytest-xdist (`make test`)."""

from __future__ import annotations

from collections import defaultdict

import pytest

SHARED = ("whole_run", "pair", "slurm_cluster")
"""Fixtures that take long to make: the files that use one run one after the other, in one worker."""
FIRST = (*SHARED, "tests/sglang/", "tests/slurm/", "tests/e2e/", "tests/distributed/")
"""What takes longest comes first, so that the workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One group a file, so that fixtures of a module are made once; one for each of SHARED."""
    files: dict[str, set[str]] = defaultdict(set)
    for item in items:
        files[_file(item)].update(getattr(item, "fixturenames", ()))
    groups = {file: next((fixture for fixture in SHARED if fixture in fixtures), file) for file, fixtures in files.items()}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[_file(item)]))
    items.sort(key=lambda item: _rank(groups[_file(item)]))


def _file(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


def _rank(group: str) -> int:
    return next((rank for rank, start in enumerate(FIRST) if group.startswith(start)), len(FIRST))
