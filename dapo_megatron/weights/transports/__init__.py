"""How a version of the weights reaches rollout servers.

The protocol in words; it goes on where `weights/sync.py` ends, with the assembler's rank as the sender.
1.  A version goes to a set of servers, each by its own channel. Channels know nothing of each other: a server that fails leaves
    the others alone, and the report names it. The ranks always walk through the whole plan, so that none of them waits for good.
2.  The caller has made sure that a server does not draw tokens meanwhile: it is idle, or its generation is paused. Afterwards
    the caller drops the server's prefix cache, unless requests that were paused in place go on with it.
3.  There are two staging buffers, as long as the longest bucket, shared between processes where a server needs that. Bucket k + 1 is
    gathered into one while bucket k leaves the other and is hashed: the extra memory of the sender. They lie on the host, or on the
    sender's GPU when all servers of the version can read there. Weights of FP8 models are quantised on the way into them (`codecs.py`).
4.  tensor: `begin_weight_update`, then one `update_weights_from_tensor` a bucket (`flattened_bucket`), then `end_weight_update`.
    A request carries names, shapes, offsets and the name of the shared memory (of a GPU: its CUDA IPC handle), once per
    tensor-parallel rank; no weights. The answer comes when every rank has copied its share out: no extra memory in the engine. Same node only.
5.  distributed: as 4, but a bucket is broadcast from the sender (rank 0) to the ranks of the engine (1, 2, ...) over a process
    group of their own: gloo to engines on CPUs, NCCL to engines on GPUs. It is made at the first version, kept, and made anew
    after a failure. The extra memory in the engine is one bucket.
6.  disk: every bucket is a safetensors file in a new folder that both sides see; servers are asked to load it, then it is removed.
7.  The last message of a version carries its number; what a server generates from then on bears it. It leaves when what was gathered has
    proven to be what the ranks hold (4 of `weights/sync.py`), else not at all.
8.  Then each server is asked for the hash of every tensor of every rank (`weights_checker`), and the answer is compared with hashes
    that the sender made of the same bytes (`held_hashes.py`), cut as the engine's ranks cut them (`engine_layout.py`). A tensor
    that differs, lacks or was never sent is a FingerprintError that names it, and nothing may be generated.
"""
