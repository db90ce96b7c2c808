"""Accuracy on prompts that are never trained on, measured by the engines as they stand."""

from __future__ import annotations

from collections.abc import Sequence

from dapo_megatron.rollout.engine import Generator, SamplingParams
from dapo_megatron.rollout.groups import Scorer, generate_groups
from dapo_megatron.types import Prompt


async def evaluate(
    engines: Sequence[Generator],
    scorer: Scorer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    num_samples: int,
    seed: int,
) -> dict[str, float]:
    """Metrics `eval/*`: means over `num_samples` responses to each prompt (so accuracy is avg@num_samples).

    Draws from random streams of its own (`seed`), so training goes on as if it had not happened.
    """
    groups = await generate_groups(engines, scorer, dict(enumerate(prompts)), num_samples, params, seed)
    samples = [sample for group in groups for sample in group.samples]
    return {
        "eval/accuracy": sum(group.accuracy for group in groups) / len(groups),
        "eval/response_length_tokens": sum(len(sample.token_ids) for sample in samples) / len(samples),
        "eval/truncated_fraction": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
    }
