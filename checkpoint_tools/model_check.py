"""Whether a config.json describes the model that a checkpoint was saved from, by what the checkpoint says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.locate import Place
from checkpoint_tools.readers import Reader
from checkpoint_tools.safe_pickle import Inert
from dapo_megatron.launcher.identity import digest_of_model
from dapo_megatron.types import CheckpointError, MappingError
from dapo_megatron.weights.families import megatron_arguments

_NOT_ARCHITECTURE = ("vocab_size", "max_position_embeddings")
"""Differ for good reasons: the vocabulary is padded (its tensors are compared), positions are cut to the training length."""
_OLD_NAMES = {"layernorm_epsilon": "norm_epsilon"}
"""Argument -> its name in older Megatron-LM."""
_CONTROLLER_STATE = "controller.json"


def check_model(place: Place, reader: Reader, hf_config: Mapping[str, Any], hf_dir: Path) -> int:
    """Compare config.json with what the checkpoint has recorded; the number of values that agreed, 0 where nothing is recorded.

    Megatron-LM's arguments are compared field by field; a run of dapo-megatron has recorded the hash of config.json. MappingError
    has both values of everything that differs.
    """
    arguments = reader.common.get("args")
    recorded = vars(arguments) if hasattr(arguments, "__dict__") else {}
    return _check_arguments(place, recorded, megatron_arguments(hf_config)) + _check_run(place, hf_dir)


def _check_arguments(place: Place, recorded: Mapping[str, Any], expected: Mapping[str, Any]) -> int:
    compared = {}
    for name, value in expected.items():
        found = recorded.get(name, recorded.get(_OLD_NAMES.get(name, "")))
        if name not in _NOT_ARCHITECTURE and found is not None and not isinstance(found, Inert):
            compared[name] = (found, value)
    if not expected.get("group_query_attention", True):
        compared.pop("num_query_groups", None)  # Megatron-LM keeps a default of 1 that means nothing then
    differing = [
        f"{name} is {found!r} in the checkpoint, {value!r} by config.json"
        for name, (found, value) in sorted(compared.items())
        if not _equal(found, value)
    ]
    if differing:
        raise MappingError(f"{place.root}: {'; '.join(differing)}; use the config.json of this model")
    return len(compared)


def _equal(found: Any, value: Any) -> bool:
    if isinstance(found, float) or isinstance(value, float):
        return isinstance(found, int | float) and value is not None and math.isclose(found, value, rel_tol=1e-6)
    if isinstance(found, list | tuple) and isinstance(value, list | tuple):
        return list(found) == list(value)
    return bool(found == value)


def _check_run(place: Place, hf_dir: Path) -> int:
    file = place.root / _CONTROLLER_STATE
    if not place.sealed or not file.is_file():  # a checkpoint that is kept for its weights has none
        return 0
    try:
        recorded = json.loads(file.read_text())["identity"]["items"]["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); use another checkpoint of the run") from error
    if (now := digest_of_model(hf_dir)) != recorded:
        raise MappingError(
            f"{place.root} was trained with a config.json of hash {recorded}, {hf_dir / 'config.json'} has {now}; "
            "give the folder of the original with --hf-config"
        )
    return 1
