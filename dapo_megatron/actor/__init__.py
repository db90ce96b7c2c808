"""megatron-core ranks: build, load, train, checkpoint, send weights."""
