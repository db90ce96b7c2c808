r"""Seconds and resident memory of a conversion there and back, beside `cp -r` of the same bytes on the same disk.

    python -m benchmarks.convert --folder /fast/disk                    a checkpoint of Qwen2.5-7B's shape, random, 15.2 GB of bf16
    python -m benchmarks.convert --folder /fast/disk --num-layers 4     the same, 4 layers: 4 GB
    python -m benchmarks.convert --folder /fast/disk --model models/SmolLM2

Sides take turns. A side's clock runs until its bytes are on the disk (`cp` is followed by `sync`; the converter flushes by itself), and is
also shown without that for `cp`. Memory is the largest sum of resident sets over the side's processes, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from checkpoint_tools.byte_sizes import format_bytes
from dapo_megatron.weights.plan import compile_mapping

QWEN_2_5_7B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
_SHARD_BYTES = 4 * 10**9
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one side."""

    seconds: float
    flushed_seconds: float
    """Until everything is on the disk."""
    peak_memory_bytes: int


def write_random_model(directory: Path, config: dict[str, object]) -> None:
    """Sharded safetensors of the config's tensors in bf16, filled with one random block again and again."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    block = os.urandom(2**26)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in compile_mapping(config).hf_tensors.items():
        if shards[-1] and size + math.prod(shape) * 2 > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += math.prod(shape) * 2
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        header: dict[str, object] = {}
        end = 0
        for name, shape in shard.items():
            start, end = end, end + math.prod(shape) * 2
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, end, len(block)):
                out.write(block[: end - start])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(command: list[str | Path]) -> Measured:
    """Run it to its end; AssertionError when it fails."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_resident(pid) for pid in _tree(process.pid)))
        time.sleep(_SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, output
    os.sync()
    return Measured(seconds, time.perf_counter() - start, peak)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in _tree(int(child)))]


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="scratch folder on the disk to measure; three times the model's size"
    )
    parser.add_argument("--model", type=Path, help="an HF directory instead of the random model")
    parser.add_argument("--num-layers", type=int, default=QWEN_2_5_7B["num_hidden_layers"], help="of the random model")
    parser.add_argument("--max-memory", default="1GiB")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each side")
    arguments = parser.parse_args()

    folder = arguments.folder / f"convert-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        model = arguments.model
        if model is None:
            model = folder / "hf"
            write_random_model(model, QWEN_2_5_7B | {"num_hidden_layers": arguments.num_layers})
        compare(model, folder, arguments.max_memory, arguments.repeat)
    finally:
        shutil.rmtree(folder)


def compare(model: Path, folder: Path, max_memory: str, repeat: int) -> None:
    """Print the table."""
    num_bytes = sum(file.stat().st_size for file in model.iterdir())
    tool: list[str | Path] = [sys.executable, "-m", "checkpoint_tools"]
    there, back, copy = folder / "megatron", folder / "again", folder / "copy"
    sides: dict[str, list[str | Path]] = {
        "cp -r": ["cp", "-r", model, copy],
        "hf-to-megatron": [*tool, "hf-to-megatron", model, there, "--max-memory", max_memory],
        "megatron-to-hf": [*tool, "megatron-to-hf", there, back, "--max-memory", max_memory],
    }
    runs: dict[str, list[Measured]] = {side: [] for side in sides}
    for _ in range(repeat):
        for side, command in sides.items():
            runs[side].append(measure(command))
            if side == "cp -r":
                shutil.rmtree(copy)
        shutil.rmtree(there)
        shutil.rmtree(back)
    print(
        f"{model.name}: {format_bytes(num_bytes)}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}, --max-memory {max_memory}\n"
    )
    print("| | s | s, on the disk | of cp -r | peak memory |\n|---|---|---|---|---|")
    for side, measured in runs.items():
        seconds, flushed = (statistics.median(getattr(run, name) for run in measured) for name in ("seconds", "flushed_seconds"))
        ratio = statistics.median(
            run.flushed_seconds / other.flushed_seconds for run, other in zip(measured, runs["cp -r"], strict=True)
        )
        memory = max(run.peak_memory_bytes for run in measured)
        print(f"| {side} | {seconds:.1f} | {flushed:.1f} | {ratio:.2f} | {format_bytes(memory)} |")


if __name__ == "__main__":
    main()
