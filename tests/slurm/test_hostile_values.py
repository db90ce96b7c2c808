"""Whatever is in a value reaches the program as it is; no shell and no sbatch ever acts on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dapo_megatron.config.load import load_config
from dapo_megatron.launcher.slurm.logs import follow, log_file
from dapo_megatron.launcher.slurm.status import lines_of, runs_of, status_of
from tests.slurm.cluster import Cluster
from tests.slurm.plays import STAND_IN, Play

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]

LINE = "a  b'c\"d $(touch PWNED)`touch PWNED`;touch PWNED #e &|>f <g *?~![h]{i,j} \u00fc\U0001f600 -"
TEXT = f"\n {LINE} %j\\x41\\\n\t\r\x7f\u2028$'\\n'\n"


def test_values_of_every_setting_reach_the_program_unchanged(
    slurm: Cluster, play: Play, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    here = shared_dir / TEXT.replace("/", "")
    here.mkdir()
    monkeypatch.chdir(here)
    python = here / STAND_IN.name
    shutil.copy(STAND_IN, python)
    monkeypatch.setenv("BASH_FUNC_module%%", '() { shift; printf %s "$1" > "$OUT/modules"; }')
    monkeypatch.setenv("OUT", str(shared_dir))
    settings = {
        "slurm.job_name": LINE,
        "slurm.account": LINE,
        "slurm.sbatch": [f"--comment='{LINE.replace("'", '')}'", "--nice=3"],
        "slurm.modules": [LINE],
        "slurm.environment": {"HOSTILE": TEXT, "EMPTY": ""},
        "slurm.setup": ["IN_SETUP='a b'; export IN_SETUP"],
        "slurm.python": str(python),
        "data.prompt_template": TEXT,
        "data.answer_pattern": TEXT,
        "actor.megatron_extra": {TEXT: [TEXT]},
    }
    run = play("0", *(f"--{path}={json.dumps(value)}" for path, value in settings.items()), name=LINE.replace("/", ""))
    slurm.wait(run.job, "COMPLETED")

    assert (run.folder / "arguments").read_text() == f"-m\ndapo_megatron\njob-node\n{run.folder}/slurm/config.json\n"
    assert (run.folder / "cwd").read_bytes() == f"{here}\n".encode()
    assert (shared_dir / "modules").read_text() == LINE
    environment = run.environment(0)
    assert (environment["HOSTILE"], environment["EMPTY"], environment["IN_SETUP"]) == (TEXT, "", "a b")
    config = load_config([run.folder / "slurm" / "config.json"])
    assert (config.data.prompt_template, config.data.answer_pattern) == (TEXT, TEXT)
    assert config.actor.megatron_extra == {TEXT: [TEXT]}
    assert (config.slurm.environment, config.run.dir) == ({"HOSTILE": TEXT, "EMPTY": ""}, run.folder)
    shown = slurm.run("scontrol", "show", "job", run.job).stdout
    assert f"JobName={LINE}\n" in shown and f"Comment={LINE.replace("'", '')}" in shown
    assert f"Account={LINE.lower()} " in shown  # Slurm's accounts are lower case
    assert "Nice=3" in shown
    assert b"".join(follow(log_file(run.folder, None), lambda: True)).decode().endswith("finished\n")
    assert not list(slurm.folder.rglob("PWNED")), "a value was acted on"


def test_runs_of_an_array_have_folders_and_settings_of_their_own(slurm: Cluster, play: Play):
    values = ["a, b", "$(touch PWNED)", TEXT]
    array = f"data.prompt_template={','.join(json.dumps(value) for value in values)}"
    run = play("0", name="sweep", array=(array, "run.seed=7,8"))
    runs = runs_of(str(run.folder))
    assert [folder.name for folder in runs[:4]] == [
        *("prompt_template=a_b,seed=7", "prompt_template=a_b,seed=8"),
        *("prompt_template=_touch_PWNED_,seed=7", "prompt_template=_touch_PWNED_,seed=8"),
    ]
    for index, folder in enumerate(runs):
        slurm.wait(f"{run.job}_{index}", "COMPLETED")
        assert (folder / "arguments").read_text().splitlines()[-1] == str(folder / "slurm" / "config.json")
        config = load_config([folder / "slurm" / "config.json"])
        assert (config.data.prompt_template, config.run.seed) == (values[index // 2], 7 + index % 2)
        assert runs_of(f"{run.job}_{index}") == [folder]
        assert dict(lines_of(status_of(folder)))["job"] == f"{run.job}_{index} COMPLETED"
    assert not list(slurm.folder.rglob("PWNED")), "a value was acted on"
