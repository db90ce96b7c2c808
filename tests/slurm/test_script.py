"""The text of the batch script, and what decides about it: no cluster is needed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.slurm.lead import signal_lead_seconds
from dapo_megatron.launcher.slurm.limits import device_problems
from dapo_megatron.launcher.slurm.quoting import environment, option, options, word
from dapo_megatron.launcher.slurm.script import TEMPLATES
from dapo_megatron.launcher.slurm.submit import Request, plan_job
from dapo_megatron.launcher.slurm.sweep import elements_of
from dapo_megatron.types import ConfigError

GOLDEN = Path(__file__).with_name("golden")
REQUIRED = ("--model.path=model", "--data.path=data", "--run.dir=/lustre/me/runs/hot")

SCRIPTS = {
    "plain": ("--nodes=2", "--actor.num_ranks=16"),
    "everything": (
        *("--nodes=4", "--actor.num_ranks=32", "--slurm.gpu_type=h100", "--slurm.cpus_per_node=96", "--slurm.memory=900G"),
        *(
            "--time=2-00:00:00",
            "--partition=gpu",
            "--account=proj 7",
            "--qos=high",
            "--slurm.job_name=it's",
            "--slurm.max_restarts=0",
        ),
        *("--slurm.sbatch=['--constraint=\"ib&nvme\"', --mail-type=END]", "--slurm.signal_lead_seconds=900"),
        *("--slurm.modules=[cuda/12.8, nccl]", '--slurm.environment={NCCL_DEBUG: WARN, NOTE: "two\\nlines"}'),
        *(
            "--slurm.setup=[source /sw/activate]",
            "--slurm.container=/images/dapo.sqsh",
            "--slurm.container_mounts=['/data:/data']",
        ),
        "--slurm.exclude_bad_nodes=true",
    ),
    "two_kinds_of_nodes": (
        *("--nodes=2", "--actor.num_ranks=16", "--cluster.placement=split", "--rollout.num_engines=4", "--partition=h100"),
        *("--slurm.rollout_nodes=1", "--slurm.rollout_gpus_per_node=4", "--slurm.rollout_partition=l40"),
        *("--slurm.container=dapo.sif", "--slurm.container_runtime=apptainer"),
    ),
}


def script_of(monkeypatch: pytest.MonkeyPatch, *overrides: str, arrays: tuple[str, ...] = ()) -> str:
    """Of a dry run on a machine without Slurm."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("HOME", "/home/nobody")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/me/work"))
    monkeypatch.setattr("sys.executable", "/home/me/.venv/bin/python")
    return plan_job(Request([], [*REQUIRED, *overrides], arrays, dry_run=True), lambda config: None).script


@pytest.mark.parametrize("name", [*SCRIPTS, "array"])
def test_dry_run_prints_this_script(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    arrays = ("actor.optimizer.lr=1e-6,2e-6",) if name == "array" else ()
    script = script_of(monkeypatch, *SCRIPTS.get(name, ("--nodes=1", "--actor.num_ranks=8")), arrays=arrays)
    assert script == (GOLDEN / f"{name}.sbatch").read_text()
    assert "not compared with what the cluster has" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*SCRIPTS, "array"])
def test_every_script_is_bash(name: str):
    subprocess.run(["bash", "-n", str(GOLDEN / f"{name}.sbatch")], check=True)


def test_a_template_that_forgets_a_filter_or_a_name_is_an_error(tmp_path: Path):
    for text in ("{{ value }}", "{{ valeu | word }}", "{{ none }}", "{{ value ~ value }}"):
        (tmp_path / "t").write_text(text)
        with pytest.raises(Exception, match="unquoted|undefined"):
            environment(tmp_path).get_template("t").render(value="$(x)", none=None)
    (tmp_path / "t").write_text("{{ value | word }} {{ 3 }}\n")
    assert environment(tmp_path).get_template("t").render(value="$(x)") == "'$(x)' 3\n"


@pytest.mark.parametrize("text", ["a b", "it's", "a\n b\n", "$(x) `y` \\", "\u00fc\u2028\x7f", "", "-n", "\udcff"])
def test_a_word_is_one_line_and_comes_back_from_bash(text: str):
    quoted = word(text)
    assert len(quoted.splitlines()) <= 1
    said = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True).stdout
    assert said == text.encode(errors="surrogateescape")


def test_an_option_that_cannot_be_written_is_an_error():
    assert option("a b#'\\") == '"a b\\#\\\'\\\\"'
    assert options("--comment='a b' --nice") == '--comment="a b" --nice'
    with pytest.raises(ValueError, match="one line of text"):
        option("a\nb")
    with pytest.raises(ValueError, match="NUL"):
        word("a\0b")


def config_of(*overrides: str) -> Config:
    return load_config([], [*REQUIRED, *overrides])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("--actor.num_ranks=16",),
            "16 actor ranks need 16 GPUs, but slurm.nodes (1) x 8 GPUs = 8; use slurm.nodes 2, or other siz",
        ),
        (("--actor.num_ranks=8", "--nodes=3"), "would leave whole nodes idle: slurm.nodes (3) x 8 GPUs = 24; use slurm.nodes 1."),
        (
            ("--actor.num_ranks=8", "--cluster.placement=split", "--rollout.engine={type: sglang, tensor_parallel_size: 4}"),
            "8 actor ranks and the engines' 4 ranks need 12 GPUs, but slurm.nodes (1) x 8 GPUs = 8; use slurm.nodes 2",
        ),
        (("--slurm.rollout_nodes=1",), "set cluster.placement to split"),
        (("--nodes=2", "--cluster.backend=local", "--gpus-per-node=0"), "cluster.backend local runs in one process"),
        (("--cluster.ray_address=auto",), "cluster.ray_address (auto) must be null in a job"),
        (
            ("--actor.num_ranks=16", "--nodes=2", "--rollout.engine={type: sglang, tensor_parallel_size: 16}"),
            "rollout.engine.tensor_parallel_size (16) must be at most the GPUs of a node (8)",
        ),
        (
            ("--actor.num_ranks=16", "--nodes=2", "--actor.tensor_parallel_size=16"),
            "must leave every tensor-parallel group on one node, else each layer waits for the network: slurm.gpus_per_node is 8; use",
        ),
        (
            ("--actor.num_ranks=12", "--nodes=2", "--gpus-per-node=6", "--actor.tensor_parallel_size=4"),
            "of the 6 GPUs of a node 2 would be left, and 12 ranks need them",
        ),
        (
            ("--gpus-per-node=0", "--nodes=3", "--actor.num_ranks=2"),
            "slurm.nodes (3) is more than 2 actor ranks can be spread over",
        ),
    ],
)
def test_devices_that_do_not_fit_the_run_are_an_error(overrides: tuple[str, ...], problem: str):
    assert problem in "\n".join(device_problems(config_of(*overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ("--actor.num_ranks=16", "--nodes=2"),
        ("--actor.num_ranks=3",),
        ("--actor.num_ranks=2", "--nodes=2", "--gpus-per-node=0"),
        ("--actor.num_ranks=4", "--cluster.placement=split", "--rollout.num_engines=4"),
        ("--actor.num_ranks=8", "--nodes=2", "--gpus-per-node=6", "--actor.tensor_parallel_size=4"),
        (
            *("--actor.num_ranks=16", "--nodes=4", "--gpus-per-node=4", "--actor.tensor_parallel_size=16"),
            "--cluster.tensor_parallel_across_nodes=true",
        ),
    ],
)
def test_devices_that_fit_are_none(overrides: tuple[str, ...]):
    assert list(device_problems(config_of(*overrides))) == []


def test_the_request_to_save_comes_as_early_as_the_run_needs(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    assert signal_lead_seconds(config_of(), metrics) == 600
    assert signal_lead_seconds(config_of("--time=15"), metrics) == 450
    assert signal_lead_seconds(config_of("--slurm.signal_lead_seconds=77"), metrics) == 77
    rows = [{"time/train_seconds": 100, "time/rollout_seconds": 1000, "checkpoint/write_seconds": 300}, {"time/sync_seconds": 20}]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"time/tr')
    assert signal_lead_seconds(config_of(), metrics) == 1.5 * (100 + 20 + 300) + 60
    assert signal_lead_seconds(config_of("--train.rollout_lag=1"), metrics) == 1.5 * (100 + 20 + 300 + 1000) + 60


def test_an_array_is_every_combination_and_bad_ones_are_named():
    elements = elements_of(["actor.optimizer.lr=1e-6,2e-6", "--seed=1,2"])
    assert [element.name for element in elements] == ["lr=1e-06,seed=1", "lr=1e-06,seed=2", "lr=2e-06,seed=1", "lr=2e-06,seed=2"]
    assert elements[1].overrides == ("--actor.optimizer.lr=1e-06", "--seed=2")
    assert [element.name for element in elements_of(["a=x y,x*y"])] == ["0_a=x_y", "1_a=x_y"]
    for text in ("lr", "=1", "lr=", "lr=[1"):
        with pytest.raises(ConfigError):
            elements_of([text])


def test_an_array_cannot_change_the_job(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="--array cannot change the section slurm"):
        script_of(monkeypatch, "--gpus-per-node=0", arrays=("slurm.nodes=1,2",))


def test_site_settings_are_below_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site, own = tmp_path / "site.yaml", tmp_path / "own.yaml"
    site.write_text("slurm: {partition: site, account: site, qos: site}\n")
    own.write_text("slurm: {account: own, qos: own}\n")
    monkeypatch.setenv("PATH", "")
    request = Request([own], [*REQUIRED, "--qos=line", "--gpus-per-node=0"], site=site, dry_run=True)
    slurm = plan_job(request, lambda config: None).configs[0].slurm
    assert (slurm.partition, slurm.account, slurm.qos) == ("site", "own", "line")
    site.write_text("slurm: {partion: site}\n")
    with pytest.raises(ConfigError, match="slurm.partion is not a configuration key; did you mean slurm.partition"):
        plan_job(request, lambda config: None)


def test_the_templates_are_found_beside_the_package():
    assert sorted(path.name for path in TEMPLATES.glob("*.sbatch")) == ["convert.sbatch", "train.sbatch"]
