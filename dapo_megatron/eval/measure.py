"""Responses to a fixed set of problems, scored. The engines answer with the weights they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dapo_megatron.config.schema import Config
from dapo_megatron.eval.records import ProblemRecord
from dapo_megatron.eval.summary import summarize
from dapo_megatron.rollout.engine import Generator, SamplingParams
from dapo_megatron.rollout.groups import Scorer, for_each_group
from dapo_megatron.types import Prompt


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
) -> None:
    """Calls `take` with the record of each problem (number -> prompt) as soon as it is scored.

    What is drawn for a problem depends on its number, the protocol and the weights, not on which others are asked for. Raises
    EngineError when the engines hold different weight versions or answer with another than they report.
    """
    version = engines[0].weight_version
    await for_each_group(
        engines,
        scorer,
        problems,
        protocol.num_samples,
        protocol.params,
        protocol.seed,
        lambda group: take(ProblemRecord.of(group, version)),
    )


async def held_out_metrics(
    engines: Sequence[Generator], scorer: Scorer, prompts: Sequence[Prompt], protocol: Protocol
) -> dict[str, float]:
    """Metrics `eval/*` of a training run; what cannot be measured with these samples has no key."""
    records: list[ProblemRecord] = []
    await measure(
        engines,
        scorer,
        dict(enumerate(prompts)),
        protocol,
        lambda record: records.append(
            replace(record, prompt="", responses=tuple(replace(response, text="") for response in record.responses))
        ),
    )
    summary = summarize(sorted(records, key=lambda record: record.problem))
    metrics = {
        "eval/accuracy": summary.avg.value,
        "eval/accuracy_standard_error": summary.avg.standard_error,
        "eval/solved_fraction": sum(record.num_correct > 0 for record in records) / len(records),
        "eval/majority_accuracy": summary.majority.value if summary.majority else None,
        "eval/response_length_tokens": summary.response_length_mean_tokens,
        "eval/truncated_fraction": summary.truncated_fraction,
    }
    return {name: value for name, value in metrics.items() if value is not None}
