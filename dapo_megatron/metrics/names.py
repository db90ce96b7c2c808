"""Every metric of a run: name, unit, reduction, meaning. One row of metrics.jsonl has a value for each one that was measured.

A row also carries `rollout_step`, the number of rollout steps done with this one: 1 in the first row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from dapo_megatron.config.fields import did_you_mean, nearest

STEP_KEY = "rollout_step"

Reduction = Literal["mean", "sum", "max", "value"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured quantity of a rollout step.

    `reduction` says how many observations became one number, `meaning` over what; `value` is a single observation.
    """

    name: str
    unit: str
    reduction: Reduction
    meaning: str


_TABLE = (
    Metric("rollout/accuracy", "fraction", "mean", "correct samples of all judged groups, before dynamic sampling"),
    Metric("rollout/reward", "reward", "mean", "verdict's reward over samples of all judged groups, without overlong penalty"),
    Metric("rollout/shaped_reward", "reward", "mean", "reward with overlong penalty, over samples trained on"),
    Metric("rollout/response_length_tokens", "tokens", "mean", "response length over samples of all judged groups"),
    Metric("rollout/truncated_fraction", "fraction", "mean", "samples of all judged groups that reached max_response_tokens"),
    Metric("rollout/num_groups_generated", "groups", "sum", "groups judged in this step"),
    Metric("rollout/num_groups_kept", "groups", "sum", "groups trained on in this step"),
    Metric("rollout/num_groups_all_correct", "groups", "sum", "groups dropped because every sample is correct"),
    Metric("rollout/num_groups_all_wrong", "groups", "sum", "groups dropped because no sample is correct"),
    Metric(
        "rollout/num_groups_out_of_band", "groups", "sum", "groups dropped for an accuracy outside accuracy_min .. accuracy_max"
    ),
    Metric("rollout/num_groups_surplus", "groups", "value", "groups with signal held over for the next step"),
    Metric("rollout/num_groups_stale", "groups", "sum", "held-over groups dropped because their weights are too old"),
    Metric("rollout/num_groups_unfinished", "groups", "value", "groups the next step goes on with, or asks again"),
    Metric("rollout/num_tokens_generated", "tokens", "sum", "response tokens generated in this step"),
    Metric("rollout/num_tokens_used", "tokens", "sum", "response tokens of the groups trained on"),
    Metric("rollout/num_tokens_zero_variance", "tokens", "sum", "response tokens of groups dropped as all correct or all wrong"),
    Metric("rollout/num_tokens_out_of_band", "tokens", "sum", "response tokens of groups dropped as out of band"),
    Metric("rollout/num_tokens_surplus", "tokens", "value", "response tokens of the groups held over"),
    Metric(
        "rollout/num_tokens_stale", "tokens", "sum", "response tokens dropped as stale, of held-over and of unfinished groups"
    ),
    Metric("rollout/num_tokens_aborted", "tokens", "sum", "response tokens thrown away when the step was full"),
    Metric(
        "rollout/num_tokens_unfinished", "tokens", "value", "response tokens of unfinished groups that go on in the next step"
    ),
    Metric("rollout/num_tokens_redrawn", "tokens", "sum", "response tokens thrown away with a lost engine, and drawn again"),
    Metric("rollout/num_reward_errors", "samples", "sum", "verdicts that are defaults: time-out, killed worker, exception"),
    Metric("rollout/staleness_max", "weight versions", "max", "age of the oldest token trained on"),
    Metric("data/epoch", "epochs", "value", "passes over the prompts that are complete"),
    Metric("actor/loss", "loss", "mean", "DAPO loss over the optimizer steps of this rollout step"),
    Metric("actor/grad_norm", "norm", "mean", "global gradient norm before clipping, over optimizer steps"),
    Metric("actor/entropy_nats", "nats", "mean", "entropy of the policy over trained tokens"),
    Metric("actor/mean_probability", "probability", "mean", "policy's probability of the trained tokens"),
    Metric("actor/clip_fraction_low", "fraction", "mean", "trained tokens whose gradient the lower clip stopped"),
    Metric("actor/clip_fraction_high", "fraction", "mean", "trained tokens whose gradient the upper clip stopped"),
    Metric("actor/ratio_max", "ratio", "max", "largest importance ratio over trained tokens"),
    Metric("actor/log_prob_diff_mean", "nats", "mean", "|actor - engine| log-probability of the sampled tokens"),
    Metric("actor/log_prob_diff_max", "nats", "max", "|actor - engine| log-probability of the sampled tokens"),
    Metric(
        "actor/mismatch_mean", "nats", "mean", "|actor - engine| log-probability over trained tokens, those of older weights too"
    ),
    Metric(
        "actor/mismatch_max", "nats", "max", "|actor - engine| log-probability over trained tokens, those of older weights too"
    ),
    Metric(
        "actor/mismatch_kl_nats", "nats", "mean", "KL(policy that drew the tokens || actor), estimator k3, over trained tokens"
    ),
    Metric("actor/tis_clip_fraction", "fraction", "mean", "trained tokens whose importance weight algo.tis_clip cut"),
    Metric("actor/learning_rate", "1/step", "value", "learning rate of this rollout step"),
    Metric("actor/num_optimizer_steps", "steps", "sum", "optimizer steps of this rollout step"),
    Metric("actor/num_loss_tokens", "tokens", "sum", "trained tokens over all optimizer steps"),
    Metric(
        "actor/offload_bytes", "bytes", "sum", "parameters and optimizer state of rank 0 in host memory while engines generate"
    ),
    Metric("actor/offload_seconds", "seconds", "sum", "rank 0 moved memory between device and host, since the row before"),
    Metric("eval/accuracy", "fraction", "mean", "correct responses to held-out prompts, after this step"),
    Metric("eval/accuracy_standard_error", "fraction", "value", "standard error of eval/accuracy, clustered by problem"),
    Metric("eval/solved_fraction", "fraction", "mean", "held-out problems with at least one correct response: pass@num_samples"),
    Metric(
        "eval/majority_accuracy", "fraction", "mean", "held-out problems whose most frequent answer is correct: maj@num_samples"
    ),
    Metric("eval/num_tokens_generated", "tokens", "sum", "response tokens to held-out prompts, redrawn ones too"),
    Metric("eval/num_tokens_redrawn", "tokens", "sum", "of these, thrown away with a lost engine, and drawn again"),
    Metric("eval/response_length_tokens", "tokens", "mean", "length of responses to held-out prompts"),
    Metric("eval/truncated_fraction", "fraction", "mean", "responses to held-out prompts that reached max_response_tokens"),
    Metric("weights/version", "version", "value", "weights the engines hold after this step; grows by one per rollout step"),
    Metric("weights/sync_bytes", "bytes", "sum", "size of the weights sent to each engine"),
    Metric(
        "weights/sync_gb_per_second", "GB/second", "value", "of weights to each server, from the first byte to the last check"
    ),
    Metric(
        "weights/sync_to_memcpy_ratio", "ratio", "value", "time of the sync over that of a plain copy of as many bytes in memory"
    ),
    Metric(
        "weights/shard_check_seconds",
        "seconds",
        "sum",
        "of the sync: what rank 0 gathered is compared with what the ranks hold, and copies on ranks with each other",
    ),
    Metric(
        "weights/check_seconds", "seconds", "sum", "of the sync, after the last byte: servers say what they hold, it is compared"
    ),
    Metric("weights/num_engines_failed", "engines", "sum", "servers that did not get the version; they are started again"),
    Metric("time/rollout_seconds", "seconds", "sum", "generation, rewards and dynamic sampling"),
    Metric(
        "time/rollout_wait_seconds",
        "seconds",
        "sum",
        "of these, what training waited for; the rest ran beside it (train.rollout_lag)",
    ),
    Metric("time/train_seconds", "seconds", "sum", "old log-probs, forward, backward and optimizer"),
    Metric("time/sync_seconds", "seconds", "sum", "weights from actor to engines, fingerprints checked"),
    Metric("time/eval_seconds", "seconds", "sum", "held-out evaluation, in steps that evaluate"),
    Metric("time/save_seconds", "seconds", "sum", "training held up by checkpoints: copying, and waiting for the save before"),
    Metric("time/step_seconds", "seconds", "sum", "the whole rollout step"),
    Metric("throughput/tokens_per_second", "tokens/second", "value", "generated tokens per second of the whole step"),
    Metric("throughput/rollout_tokens_per_second", "tokens/second", "value", "generated tokens per second of generation"),
    Metric("throughput/train_tokens_per_second", "tokens/second", "value", "trained tokens per second of training"),
    Metric("checkpoint/bytes", "bytes", "sum", "size of the checkpoint that was written, in the step that found it so"),
    Metric("checkpoint/write_seconds", "seconds", "sum", "from the start of its save until its files were found written"),
    Metric("checkpoint/num_failed_saves", "saves", "sum", "saves that failed since the process started"),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}
"""All metrics by name."""


def require_known(names: Iterable[str]) -> None:
    """Raises ValueError, with the nearest names, when a name is not in `METRICS`."""
    for name in names:
        if name not in METRICS:
            hint = did_you_mean(nearest(name, METRICS)) or "; add it to metrics/names.py."
            raise ValueError(f"{name} is not a metric{hint}")
