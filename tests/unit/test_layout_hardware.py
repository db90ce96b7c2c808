from __future__ import annotations

from pathlib import Path

import pytest

from dapo_megatron.layout.efficiency import EFFICIENCIES
from dapo_megatron.layout.hardware import gpu_named, known_gpus, read_gpus
from dapo_megatron.types import ConfigError

ENTRY = """
MI300X:
  name: MI300X 192 GB
  memory_mib: 196592
  hbm_gb_per_second: 5300
  bf16_tflops: 1307
  nvlink_gb_per_second: 448
  internode_gb_per_second: 50
  pcie_gb_per_second: 55
  efficiency: {efficiency}
  source: data sheet
"""


def test_every_device_has_a_source_and_shares():
    gpus = known_gpus()
    assert {"a100-80", "h100-80", "h200", "h20", "b200", "gb200"} <= gpus.keys()
    assert all(gpu.source and gpu.efficiency in EFFICIENCIES for gpu in gpus.values())
    for shares in EFFICIENCIES.values():
        rates = (shares.matmul, shares.attention_forward, shares.attention_backward, shares.memory, shares.link, shares.network)
        assert all(0 < rate < 1 for rate in rates) and shares.fitted_on


def test_unknown_device_is_refused_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"--gpu \(h100\) must be one of a100-80, .*did you mean h200 or h100-80\?"):
        gpu_named("h100")


def test_device_of_the_user_is_found_by_name_in_any_case(tmp_path: Path):
    file = tmp_path / "gpus.yaml"
    file.write_text(ENTRY.format(efficiency="hopper"))
    own = read_gpus(file)
    assert gpu_named("mi300x", own).memory_bytes == 196592 * 2**20
    assert gpu_named("H200", own).bf16_tflops == 989.4


@pytest.mark.parametrize(
    "text, words",
    [
        (ENTRY.format(efficiency="hoper"), r"mi300x.*hoper.*must be one of .*did you mean hopper"),
        (ENTRY.format(efficiency="hopper").replace("pcie_gb", "pci_gb"), "pci_gb_per_second"),
        (ENTRY.format(efficiency="hopper").replace("5300", "-1"), "hbm_gb_per_second: Input should be greater than 0"),
        ("- a list", "must map names to GPU entries"),
        ("mi300x: 3", "must map fields to values"),
        ("a: [", "must be YAML"),
        (None, "cannot be read"),
    ],
)
def test_unusable_table_is_refused_in_words(tmp_path: Path, text: str | None, words: str):
    file = tmp_path / "gpus.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=f"(?is){words}"):
        read_gpus(file)
