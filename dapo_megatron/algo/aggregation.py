"""How the token losses of an optimizer step become one number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dapo_megatron.types import LossAggregation


def sample_loss_weights(aggregation: LossAggregation, num_tokens: Sequence[int], group_of: Sequence[int]) -> list[float]:
    """Weight w_i of each sample of an optimizer step, so that one formula serves every aggregation.

    The loss of the step is sum_i w_i sum_t loss_it / N. Sample i has `num_tokens[i]` trained tokens and belongs to group
    `group_of[i]`; N = sum_i num_tokens[i]. Both sums run over all samples of the optimizer step, whatever rank or
    micro-batch holds them, so the weights must be taken before the samples are spread.

    * `token_mean`: mean over the tokens of the step, w_i = 1. What DAPO was released with, and the default.
    * `prompt_mean`: mean over groups of the mean over a group's tokens, w_i = N / (num_groups * tokens of the group).
      Eq. 8 of arXiv 2503.14476 read literally: the expectation is over prompts, the normaliser inside it is the group's.
    * `sample_mean`: mean over samples of the mean over a sample's tokens, w_i = N / (num_samples * num_tokens[i]). GRPO
      (arXiv 2402.03300, eq. 3).

    Raises ValueError for a sample without tokens or an unknown aggregation.
    """
    if any(count < 1 for count in num_tokens):
        raise ValueError(f"num_tokens has {min(num_tokens)}; every sample needs a trained token, leave out those without")
    total = sum(num_tokens)
    match aggregation:
        case "token_mean":
            return [1.0] * len(num_tokens)
        case "prompt_mean":
            group_tokens = Counter[int]()
            for group, count in zip(group_of, num_tokens, strict=True):
                group_tokens[group] += count
            return [total / (len(group_tokens) * group_tokens[group]) for group in group_of]
        case "sample_mean":
            return [total / (len(num_tokens) * count) for count in num_tokens]
    raise ValueError(f"loss_aggregation is {aggregation!r}; use token_mean, prompt_mean or sample_mean")
