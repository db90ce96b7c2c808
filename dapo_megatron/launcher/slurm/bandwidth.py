"""All processes of the job reduce together: `python -m dapo_megatron.launcher.slurm.bandwidth ADDRESS PORT RANK WORLD DEVICE`.

DEVICE is the index of a GPU, or `cpu`. Prints one JSON object: bus bandwidth in GB/s. nccl on GPUs, else gloo.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

TIMEOUT_SECONDS = 60
_NUM_ROUNDS = 5
_NUM_BYTES = {"gloo": 4 * 2**20, "nccl": 256 * 2**20}


def main(address: str, port: str, rank: int, world: int, device: str) -> None:
    import torch
    import torch.distributed as dist

    from dapo_megatron.launcher.slurm.network import interface_of

    own = os.environ.get("DAPO_NODE_ADDRESS")
    if own and (interface := interface_of(own)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    backend = "gloo" if device == "cpu" else "nccl"
    if device != "cpu":
        torch.cuda.set_device(int(device))
    place = "cpu" if device == "cpu" else f"cuda:{device}"
    dist.init_process_group(
        backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_SECONDS)
    )
    values = torch.ones(_NUM_BYTES[backend] // 4, device=place)
    dist.all_reduce(values)
    if values[0].item() != world:
        raise SystemExit(f"an all-reduce of ones over {world} processes gave {values[0].item():g}")
    start = time.perf_counter()
    for _ in range(_NUM_ROUNDS):
        dist.all_reduce(values)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / _NUM_ROUNDS
    dist.destroy_process_group()
    print(json.dumps({"gigabytes_per_second": 2 * (world - 1) / world * _NUM_BYTES[backend] / seconds / 1e9}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
