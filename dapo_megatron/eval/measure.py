"""Responses to a fixed set of problems, scored. The engines answer with the weights they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dapo_megatron.config.schema import Config
from dapo_megatron.eval.records import ProblemRecord
from dapo_megatron.eval.summary import summarize
from dapo_megatron.rollout.engine import Generator, SamplingParams
from dapo_megatron.rollout.groups import Scorer, for_each_group
from dapo_megatron.types import EngineError, Prompt, RolloutGroup


@dataclass(frozen=True, slots=True)
class Protocol:
    """How an evaluation samples. Its random streams are its own (`seed`), so training goes on as if it had not happened."""

    num_samples: int
    params: SamplingParams
    seed: int

    @classmethod
    def of(cls, config: Config, stop_token_ids: tuple[int, ...]) -> Protocol:
        """The `eval` section; no top-k, whatever the rollout uses."""
        settings = config.eval
        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_response_tokens=config.max_eval_response_tokens,
            stop_token_ids=stop_token_ids,
        )
        return cls(settings.num_samples, params, settings.sampling_seed)


async def measure(
    engines: Sequence[Generator],
    scorer: Scorer,
    problems: Mapping[int, Prompt],
    protocol: Protocol,
    take: Callable[[ProblemRecord], None],
    *,
    stall_seconds: float | None = None,
) -> int:
    """Calls `take` with the record of each problem (number -> prompt) as soon as it is scored; returns how many tokens were redrawn.

    What is drawn for a problem depends on its number, the protocol and the weights, not on which others are asked for. Raises
    EngineError when an engine answers with another weight version than it reports, or when for `stall_seconds` no problem is finished.
    """
    version = engines[0].weight_version
    clock = asyncio.get_running_loop().time

    def take_group(group: RolloutGroup) -> None:
        take(ProblemRecord.of(group, version))
        if stall_seconds is not None:
            limit.reschedule(clock() + stall_seconds)

    limit = asyncio.timeout(stall_seconds)
    try:
        async with limit:
            return await for_each_group(
                engines, scorer, problems, protocol.num_samples, protocol.params, protocol.seed, take_group
            )
    except TimeoutError:
        if not limit.expired():
            raise
        raise EngineError(
            f"no problem was finished within cluster.phase_deadline_seconds ({stall_seconds:g}); look at the logs of the engines, or "
            "raise the deadline"
        ) from None


async def held_out_metrics(
    engines: Sequence[Generator], scorer: Scorer, prompts: Sequence[Prompt], protocol: Protocol
) -> dict[str, float]:
    """Metrics `eval/*` of a training run; what cannot be measured with these samples has no key."""
    records: list[ProblemRecord] = []
    num_tokens_redrawn = await measure(
        engines,
        scorer,
        dict(enumerate(prompts)),
        protocol,
        lambda record: records.append(
            replace(record, prompt="", responses=tuple(replace(response, text="") for response in record.responses))
        ),
    )
    summary = summarize(records)
    metrics = {
        "eval/accuracy": summary.avg.value,
        "eval/accuracy_standard_error": summary.avg.standard_error,
        "eval/solved_fraction": sum(record.num_correct > 0 for record in records) / len(records),
        "eval/majority_accuracy": summary.majority.value if summary.majority else None,
        "eval/response_length_tokens": summary.response_length_mean_tokens,
        "eval/truncated_fraction": summary.truncated_fraction,
        "eval/num_tokens_generated": num_tokens_redrawn + sum(r.num_tokens for record in records for r in record.responses),
        "eval/num_tokens_redrawn": num_tokens_redrawn,
    }
    return {name: value for name, value in metrics.items() if value is not None}
