"""How long the phases of a run took, kept in its folder, so that a run that starts again knows its deadlines."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from pydantic import TypeAdapter, ValidationError

from dapo_megatron.config.load import resolved_dict
from dapo_megatron.config.schema import Config
from dapo_megatron.whole_files import write_whole

NUM_TO_LEARN = 3
"""So often a phase must have ended before its history counts."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Of one phase."""

    num_ended: int
    longest_seconds: float


@dataclass(frozen=True, slots=True)
class _Kept:
    """Content of the file."""

    settings: str
    phases: dict[str, PhaseTimes] = field(default_factory=dict)


_KEPT = TypeAdapter(_Kept)


class PhaseHistory:
    """Times by phase; with a file, those of earlier attempts with the same settings too."""

    def __init__(self, file: Path | None = None, settings: str = ""):
        """`settings` is what the times depend on, see `settings_of`: a file of others is written anew."""
        self._file, self._settings = file, settings
        self._phases = dict(_read(file, settings)) if file is not None else {}

    def of(self, phase: str) -> PhaseTimes | None:
        """None until the phase has ended NUM_TO_LEARN times."""
        times = self._phases.get(phase)
        return times if times is not None and times.num_ended >= NUM_TO_LEARN else None

    def add(self, phase: str, seconds: float) -> None:
        """A phase has ended. The file is written when that says something new."""
        before = self._phases.get(phase, PhaseTimes(0, 0.0))
        if before.num_ended >= NUM_TO_LEARN and seconds <= before.longest_seconds:
            return
        self._phases[phase] = PhaseTimes(before.num_ended + 1, max(seconds, before.longest_seconds))
        if self._file is not None:
            _write(self._file, _Kept(self._settings, self._phases))


def settings_of(config: Config) -> str:
    """A digest of the settings that decide how long a phase takes: nothing learnt under others is used."""
    tree = resolved_dict(config)
    del tree["run"], tree["metrics"], tree["cluster"]["ray_address"]  # of one attempt, in a job
    return xxhash.xxh3_64_hexdigest(json.dumps(tree, sort_keys=True).encode())


def _read(file: Path, settings: str) -> dict[str, PhaseTimes]:
    try:
        kept = _KEPT.validate_json(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        logger.warning(f"{file} is damaged ({error.errors()[0]['msg']}): deadlines of phases are learnt anew")
        return {}
    return kept.phases if kept.settings == settings else {}


def _write(file: Path, kept: _Kept) -> None:
    try:
        write_whole(file, _KEPT.dump_json(kept) + b"\n")
    except OSError as error:  # the run is worth more
        logger.warning(f"{file} cannot be written ({error.strerror}): a restart learns the deadlines of phases anew")
