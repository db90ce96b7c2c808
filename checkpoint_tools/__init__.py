"""Checkpoint tools: conversion between Hugging Face and megatron-core, inspection and proof. The map: docs/checkpoint_tools.md."""
