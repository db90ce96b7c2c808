"""Time, FLOPs and ranking of the layout planner against published measurements: a part of `benchmarks.planner`.

Three figures: seconds of an optimizer step; FLOPs per token against published TFLOP/s over published tokens/s; and the regret of
ranking: how much slower the layout that the planner likes best is than the best one measured, where several were.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from benchmarks.layout_rows import Refusal, RowInputs, decimal, inputs_of, shape_of_row, tidy
from dapo_megatron.config.layout_rules import divisors
from dapo_megatron.layout.efficiency import Efficiency
from dapo_megatron.layout.flops import training_flops_per_token
from dapo_megatron.layout.hardware import Gpu, known_gpus
from dapo_megatron.layout.layer_time import Machine, TimeOptions
from dapo_megatron.layout.train_time import MicroBatches, update_seconds

FIT_SOURCES = ("SimuMax docs/b200", "Megatron-LM README", "gpt3_7b_")
"""Rows with these words in source or model were used to fit `layout/efficiency.py`; every other row is a prediction."""
FIT_DEVICES = ("B200-192", "H100-80", "A100-80")
OVERLAPPED = ("Megatron-Bridge", "NeMo", "Megatron-LM README", "ModelZoo")
"""Frameworks whose recipes overlap data- and tensor-parallel communication with compute."""
ONCE_PER_NODE = ("Megatron-Bridge", "flex", "DeepEP")
"""Recipes that dispatch tokens with DeepEP or HybridEP."""
ASSUMED_MICRO_BATCH_SIZES = (1, 2, 4)
"""Where none is published: the fastest of these, since tables of results show tuned runs."""
SAME_MEMORY = 0.1
"""Share by which the memory in a device's name differs from what is usable of it."""
MAX_SECONDS_APART = 0.02
"""Rows whose tokens/s differ by less tie in a ranking."""


@dataclass(frozen=True, slots=True)
class TimeScore:
    """One row: predicted and published seconds of an optimizer step."""

    inputs: RowInputs
    num_gpus: int
    num_tokens: int
    """Of the optimizer step."""
    predicted_seconds: float
    published_seconds: float
    is_fit: bool

    @property
    def error(self) -> float:
        """Relative, positive when the prediction is too slow."""
        return self.predicted_seconds / self.published_seconds - 1

    @property
    def predicted_rate(self) -> float:
        """Tokens a second and GPU."""
        return self.num_tokens / self.num_gpus / self.predicted_seconds

    @property
    def published_rate(self) -> float:
        """Likewise, as measured."""
        return self.num_tokens / self.num_gpus / self.published_seconds


@dataclass(frozen=True, slots=True)
class FlopsScore:
    """One row: FLOPs per token as `layout/flops.py` has it, and as published TFLOP/s over tokens/s says."""

    row_id: str
    model: str
    predicted: float
    published: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.published - 1


def gpu_of(name: str) -> Gpu | None:
    """The device of a row (`B200-192`, `H100-80(DGX)`); None for one that the table does not have.

    A variant with another memory (`A100-40`) is the table's device with that memory.
    """
    wanted = name.lower().split("(")[0].strip()
    gpus = known_gpus()
    if wanted in gpus:
        return gpus[wanted]
    family, _, size = wanted.partition("-")
    gpu = next((gpu for known, gpu in gpus.items() if known.split("-")[0] == family), None)
    if gpu is None or not size.isdigit() or abs(int(size) * 1024 / gpu.memory_mib - 1) < SAME_MEMORY:
        return gpu
    return gpu.model_copy(update={"memory_mib": int(size) * 1024, "name": f"{family.upper()} {size} GB"})


@dataclass(frozen=True, slots=True)
class TimedRow:
    """A row with a published time, in the planner's words; several variants where it leaves a size open."""

    variants: tuple[RowInputs, ...]
    gpu: Gpu
    options: TimeOptions
    num_tokens: int
    published_seconds: float
    is_fit: bool

    def score(self, shares: Efficiency | None = None) -> TimeScore:
        """Of the fastest variant. `shares` take the place of the GPU's own efficiency."""
        machine = Machine(self.gpu, self.options, shares)
        times = [_predicted(machine, inputs) for inputs in self.variants]
        seconds = min(times)
        inputs = self.variants[times.index(seconds)]
        return TimeScore(inputs, inputs.layout.world_size, self.num_tokens, seconds, self.published_seconds, self.is_fit)


def timed_rows(rows: list[dict[str, str]]) -> tuple[list[TimedRow], list[tuple[str, str, str]]]:
    """The rows with a published time or rate, and (id, model, reason) of those that cannot be mapped."""
    timed, refused = [], []
    for row in map(tidy, rows):
        if not (row["step_s"] or row["tok_per_s_gpu"] or row["tflops_gpu"]):
            continue
        try:
            timed.append(_timed(row))
        except Refusal as reason:
            refused.append((row["id"], row["model"], str(reason)))
    return timed, refused


def score_flops(rows: list[dict[str, str]]) -> list[FlopsScore]:
    """Of the rows that publish TFLOP/s and tokens/s."""
    scores = []
    for row in map(tidy, rows):
        try:
            rate, tflops, sequence = (decimal(row, name) for name in ("tok_per_s_gpu", "tflops_gpu", "seq"))
            shape = shape_of_row(row)
        except Refusal:
            continue
        if not (rate and tflops and sequence):
            continue
        published = tflops * 1e12 / rate
        predicted = training_flops_per_token(shape, sequence)
        scores.append(FlopsScore(row["id"], row["model"], predicted, published))
    return scores


def regrets(scores: list[TimeScore]) -> list[tuple[str, int, float]]:
    """(group, layouts, regret) of every model, device and batch that was measured under several layouts."""
    groups: dict[tuple[object, ...], list[TimeScore]] = defaultdict(list)
    for score in scores:
        one = score.inputs
        batches = one.layout.num_micro_batches if one.framework == "SimuMax" else score.num_tokens
        key = (one.framework, one.model, one.gpu, score.num_gpus, one.sequence_tokens, batches)
        groups[key].append(score)
    found = []
    for key, members in groups.items():
        if len({str(member.inputs.layout) for member in members}) > 1:
            chosen = max(members, key=lambda score: score.predicted_rate)
            best = max(member.published_rate for member in members)
            found.append((" ".join(map(str, key[1:])), len(members), best / chosen.published_rate - 1))
    return found


def _timed(row: Mapping[str, str]) -> TimedRow:
    gpu, precision = gpu_of(row["gpu"]), row["precision"].lower()
    if gpu is None:
        raise Refusal(f"{row['gpu']} is not in the table of GPUs")
    batch, sequence = decimal(row, "gbs"), decimal(row, "seq")
    if not batch or not sequence:
        raise Refusal(f"the {'sequence length' if batch else 'global batch size'} is not published")
    if precision not in ("bf16", "") and not precision.startswith(("fp8", "mxfp8")):
        raise Refusal(f"precision {row['precision']} has no measured efficiency")
    variants = tuple(_variants(row))
    if not variants[0].options.flash_attention:
        raise Refusal("attention without a fused kernel has no time model")
    overlapped = any(name in row["source"] for name in OVERLAPPED)
    num_tokens = int(batch * sequence)
    return TimedRow(
        variants,
        gpu,
        TimeOptions(
            precision="bf16" if precision in ("bf16", "") else "fp8",
            overlap_data_parallel=overlapped,
            overlap_tensor_parallel=overlapped,
            dispatch_once_per_node=_dispatches_once_per_node(row),
            overlap_expert_parallel="EP overlap" in row["note"],
        ),
        num_tokens,
        _published_seconds(row, variants[0], num_tokens, variants[0].layout.world_size),
        is_fit=any(word in row["source"] or word in row["model"] for word in FIT_SOURCES) and row["gpu"] in FIT_DEVICES,
    )


def _dispatches_once_per_node(row: Mapping[str, str]) -> bool:
    """As the row says, else as its framework does."""
    if "alltoall" in row["note"]:
        return False
    return any(word in row["source"] + row["model"] + row["note"] for word in ONCE_PER_NODE)


def _published_seconds(row: Mapping[str, str], inputs: RowInputs, num_tokens: int, num_gpus: int) -> float:
    seconds, rate, tflops = (decimal(row, name) for name in ("step_s", "tok_per_s_gpu", "tflops_gpu"))
    if seconds:
        return seconds
    if rate:
        return num_tokens / num_gpus / rate
    if not tflops:
        raise Refusal("neither a step's time nor a rate is published")
    flops = training_flops_per_token(inputs.shape, inputs.sequence_tokens) * num_tokens
    return flops / num_gpus / tflops / 1e12


def _predicted(machine: Machine, inputs: RowInputs) -> float:
    options = inputs.options
    own = replace(
        machine.options,
        grad_bytes=options.precision.grad_bytes,
        fully_sharded=options.fully_sharded,
        dropout=options.dropout,
    )
    layout = inputs.layout
    batches = MicroBatches(layout.num_micro_batches, layout.max_tokens_per_micro_batch, inputs.sequence_tokens)
    return update_seconds(replace(machine, options=own), inputs.shape, layout, batches, options.layers).total


def _variants(row: Mapping[str, str]) -> Iterator[RowInputs]:
    """The row; where no micro-batch size is published every assumed one, and with a pipeline every number of chunks as well."""
    if row["mbs"]:
        yield inputs_of(row, for_time=True)
        return
    found = False
    for size in ASSUMED_MICRO_BATCH_SIZES:
        plain = inputs_of({**row, "mbs": str(size)}, for_time=True)
        layout = plain.layout
        if layout.num_micro_batches * size * layout.data_parallel_size != decimal(row, "gbs"):
            continue
        stages, num_layers = layout.pipeline_parallel_size, plain.shape.num_layers
        chunks = [1]
        if stages > 1 and not row["vpp"] and num_layers % stages == 0 and layout.num_micro_batches % stages == 0:
            chunks = divisors(num_layers // stages)
        for count in chunks:
            found = True
            yield (
                replace(plain, layout=replace(layout, virtual_pipeline_size=count if count > 1 else None)) if count > 1 else plain
            )
    if not found:
        raise Refusal("neither a micro-batch size nor a batch that one divides is published")


def print_errors(errors: Sequence[tuple[float, bool]]) -> None:
    """A line for all of them, for those of fitted rows and for those of predicted ones: (relative error, is_fit)."""
    for name, kinds in (("all", (True, False)), ("fit", (True,)), ("prediction", (False,))):
        sizes = [abs(error) for error, is_fit in errors if is_fit in kinds]
        if sizes:
            print(
                f"{name}: {len(sizes)} rows, mean |error| {mean(sizes):.2%}, median {median(sizes):.2%}, worst {max(sizes):.2%}"
            )


def print_time(rows: list[dict[str, str]]) -> None:
    """The tables of all three figures."""
    timed, refused = timed_rows(rows)
    scores = [row.score() for row in timed]
    print(f"\n{'row':>5}  {'model':34} {'layout':28} {'GPU':12} {'published':>10} {'predicted':>10} {'error':>8}")
    for score in scores:
        one = score.inputs
        print(
            f"{one.row_id:>5}  {one.model[:34]:34} {str(one.layout)[:28]:28} {one.gpu[:12]:12} {score.published_seconds:8.3f} s "
            f"{score.predicted_seconds:8.3f} s {score.error:+8.1%}  {'fit' if score.is_fit else 'prediction'}"
        )
    print_errors([(score.error, score.is_fit) for score in scores])
    flops = score_flops(rows)
    if flops:
        errors = [abs(score.error) for score in flops]
        print(f"FLOPs per token: {len(flops)} rows, median |error| {median(errors):.2%}, worst {max(errors):.2%}")
    groups = regrets(scores)
    for group, count, regret in groups:
        print(f"ranking: {group}: {count} layouts, regret {regret:.1%}")
    if groups:
        print(f"ranking: {len(groups)} groups, mean regret {mean(regret for *_, regret in groups):.1%}")
    print(f"not mapped for time: {len(refused)} rows")
    for row_id, model, reason in refused:
        print(f"  {row_id} {model}: {reason}")
