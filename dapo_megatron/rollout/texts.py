"""Responses as texts."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def response_texts(tokenizer: PreTrainedTokenizerBase, token_ids: list[list[int]]) -> list[str]:
    """What `batch_decode` gives without special tokens, in one call of the Rust tokenizer where that is all it does."""
    if _decodes_by_backend_alone(tokenizer):
        return tokenizer.backend_tokenizer.decode_batch(token_ids, skip_special_tokens=True)
    return tokenizer.batch_decode(token_ids, skip_special_tokens=True)


def _decodes_by_backend_alone(tokenizer: PreTrainedTokenizerBase) -> bool:
    """transformers 5.19.0: then it calls its backend for each response, after a look at each token's type."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and not tokenizer.clean_up_tokenization_spaces
        and kind._decode is PreTrainedTokenizerFast._decode
        and kind.decode is PreTrainedTokenizerFast.decode
    )
