"""Measurements that need GPUs."""
