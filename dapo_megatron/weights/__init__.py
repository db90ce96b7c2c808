"""Weights: the HF <-> megatron-core mapping as data, copy plans compiled from it, and the protocol that sends weights to engines.

Reading order: `layout.py` (the language), `families/` (the tables), `plan.py` (copies), `sync.py` (buckets), `receiver.py`; for files
`hf_files.py`, `codecs.py` (FP8) and `checkpoint_keys.py` (megatron-core's names).
"""
