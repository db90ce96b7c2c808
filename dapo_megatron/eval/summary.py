"""From the records of all problems to the numbers that are reported."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dapo_megatron.eval.records import ProblemRecord
from dapo_megatron.eval.statistics import Estimate, majority_accuracy, pass_at_k, pass_ks, sampling_standard_error


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of an evaluation; fractions are of 1, lengths in tokens over all responses."""

    num_problems: int
    num_samples: int
    avg: Estimate
    """avg@num_samples: mean accuracy of a response."""
    sampling_standard_error: float | None
    """Of avg when the same problems are evaluated again; None for one sample."""
    pass_at: dict[int, Estimate]
    """k -> pass@k."""
    majority: Estimate | None
    """maj@num_samples; None when no response states an answer that could vote (reward.type custom)."""
    response_length_mean_tokens: float
    response_length_median_tokens: float
    response_length_max_tokens: int
    truncated_fraction: float
    unanswered_fraction: float | None
    """Responses that state no answer; None where `majority` is."""
    num_reward_errors: int
    """Verdicts that are defaults: time-out, killed worker, exception."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; pass@k under `pass_at_K`, maj under `maj_at_N`, avg under `avg_at_N`."""
        plain = asdict(self)
        estimates = {
            f"avg_at_{self.num_samples}": plain.pop("avg"),
            **{f"pass_at_{k}": estimate for k, estimate in plain.pop("pass_at").items()},
            f"maj_at_{self.num_samples}": plain.pop("majority"),
        }
        return {**estimates, **plain}

    def rows(self) -> Iterator[tuple[str, Estimate]]:
        """Name and estimate of every accuracy, in the order in which they are shown."""
        yield f"avg@{self.num_samples}", self.avg
        for k, estimate in self.pass_at.items():
            yield f"pass@{k}", estimate
        if self.majority is not None:
            yield f"maj@{self.num_samples}", self.majority


def summarize(records: Iterable[ProblemRecord]) -> Summary:
    """Of at least one problem, all with the same number of samples. Texts are not kept, so records may be streamed from a file."""
    num_samples = 0
    num_correct: list[int] = []
    majority: list[float] = []
    lengths: list[int] = []
    num_truncated = num_unanswered = num_errors = 0
    for record in records:
        responses = record.responses
        num_samples = len(responses)
        num_correct.append(record.num_correct)
        answers = [response.stated_answer for response in responses]
        majority.append(majority_accuracy(answers, [response.correct for response in responses]))
        num_unanswered += answers.count(None)
        lengths += [response.num_tokens for response in responses]
        num_truncated += sum(response.finish_reason == "length" for response in responses)
        num_errors += sum(response.error is not None for response in responses)
    has_votes = num_unanswered < len(lengths)
    return Summary(
        num_problems=len(num_correct),
        num_samples=num_samples,
        avg=Estimate.over_problems([correct / num_samples for correct in num_correct]),
        sampling_standard_error=sampling_standard_error(num_samples, num_correct),
        pass_at={
            k: Estimate.over_problems([pass_at_k(num_samples, correct, k) for correct in num_correct])
            for k in pass_ks(num_samples)
        },
        majority=Estimate.over_problems(majority) if has_votes else None,
        response_length_mean_tokens=sum(lengths) / len(lengths),
        response_length_median_tokens=statistics.median(lengths),
        response_length_max_tokens=max(lengths),
        truncated_fraction=num_truncated / len(lengths),
        unanswered_fraction=num_unanswered / len(lengths) if has_votes else None,
        num_reward_errors=num_errors,
    )
