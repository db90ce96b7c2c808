"""What `actor.megatron_extra` may name."""

from __future__ import annotations

from dataclasses import fields


def transformer_config_fields() -> frozenset[str]:
    """Fields of megatron-core's TransformerConfig. Importing it takes seconds, so only on demand."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return frozenset(field.name for field in fields(TransformerConfig))
