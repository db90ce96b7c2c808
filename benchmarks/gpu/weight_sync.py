"""`benchmarks.weight_sync` on three GPUs: weights go from GPU memory to the server, mapped (tensor) or over NCCL (distributed).

    python -m benchmarks.gpu.weight_sync --shape qwen2-1.5b

It has not been run: no machine with three GPUs was at hand.
"""

from benchmarks.weight_sync import main

if __name__ == "__main__":
    main("cuda", __doc__)
