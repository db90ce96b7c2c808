"""HF config.json -> megatron-core TransformerConfig, layer spec and GPTModel chunks."""
