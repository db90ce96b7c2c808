"""The search behind `plan`: best first, and exact for the fastest layouts.

Every cut of the model has a bound: its training without recompute beside the fastest generation possible. Cuts are looked at from the
lowest bound on, and when enough layouts fit that are faster than the next bound, the cuts that are left are slower, each with its
bound. When enough cuts have a layout that fits, memory is planned only for what is faster than the slowest of the best of them. Of one cut and token limit, recompute that keeps more is faster, so once one fits those after it are only slower; and what does
not fit with few tokens does not fit with more.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dapo_megatron.layout.calibration import Calibration
from dapo_megatron.layout.engine_choice import fastest_rollout_seconds, with_engines
from dapo_megatron.layout.fit import reason_not_fitting
from dapo_megatron.layout.gains import gains_of, limit_of
from dapo_megatron.layout.layer_time import Machine, TimeOptions
from dapo_megatron.layout.layout import FULL_RECOMPUTE, Layout, Recompute
from dapo_megatron.layout.memory import kv_cache_tokens, plan_memory
from dapo_megatron.layout.memory_records import DEFAULT_OPTIONS, MemoryOptions, MemoryPlan, Precision
from dapo_megatron.layout.model_shape import LatentAttention, ModelShape
from dapo_megatron.layout.plan import Candidate, Plan, PlanRequest, Rejection
from dapo_megatron.layout.space import cuts, recompute_choices, release_problem, rule_problem, token_limits
from dapo_megatron.layout.states import stage_states
from dapo_megatron.layout.step_time import StepTime, step_time
from dapo_megatron.layout.train_time import layer_counts, micro_batches, update_seconds

GIB, GB = 2**30, 1e9
UNCORRECTED = Calibration("", 0)
EQUAL = 0.02
"""Share of a step below which layouts are as fast as each other: the model is not better than that."""
MAX_EQUAL_CUTS = 120
"""Cuts up to which one that may be as fast as the fastest, and simpler, is looked at although enough are faster."""
MIN_CUTS = 60
"""Cuts that are looked at in full in any case, so that the picture of the space has more than its best corner."""


def plan(request: PlanRequest, only: Callable[[Layout], bool] | None = None) -> Plan:
    """All layouts that fit, fastest first and of equal ones the simplest, and every other with its reason. No device is touched.

    `only` restricts the answer to cuts for which it is true; of those none is left out because others are faster.
    """
    search = _Search.of(request)
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    bounded: list[tuple[float, int, Layout]] = []
    for number, cut in enumerate(cuts(request)):
        if only is not None and not only(cut.layout if isinstance(cut, Rejection) else cut):
            continue
        if isinstance(cut, Rejection):
            rejections.append(cut)
        else:
            bounded.append((search.bound_seconds(cut), number, cut))
    bounded.sort()
    fastest: list[float] = []  # minus the seconds of the `top` fastest so far, a heap
    best_of_cut: dict[tuple[int, ...], float] = {}
    for done, (bound, _, cut) in enumerate(bounded):
        worst = math.inf
        if only is None and done >= MIN_CUTS and len(best_of_cut) >= request.top:
            worst = sorted(best_of_cut.values())[request.top - 1] * (1 + EQUAL)
        if only is None and done >= MIN_CUTS and len(fastest) == request.top:
            shown = -fastest[0] if done >= MAX_EQUAL_CUTS else max(-fastest[0], -max(fastest) * (1 + EQUAL))
            if bound > shown:
                rejections.append(_bounded_out(cut, bound, shown))
                continue
        for found in search.of_cut(cut, worst):
            if isinstance(found, Rejection):
                rejections.append(found)
                continue
            candidates.append(found)
            sizes = cut_sizes(found.layout)
            best_of_cut[sizes] = min(found.time.step_seconds, best_of_cut.get(sizes, math.inf))
            heapq.heappush(fastest, -found.time.step_seconds)
            if len(fastest) > request.top:
                heapq.heappop(fastest)
    candidates = _ranked(candidates)
    return Plan(request, tuple(search.with_gains(candidates)), tuple(rejections), _notes(request, candidates))


def memory_options(request: PlanRequest) -> MemoryOptions:
    """How the memory of a request is counted. Weights in fp32 are their own master copy."""
    actor, engine = _DTYPE_BYTES[request.dtype], _DTYPE_BYTES[request.engine_dtype]
    precision = Precision(
        weight_bytes=actor,
        activation_bytes=actor,
        master_bytes=0 if request.dtype == "fp32" else DEFAULT_OPTIONS.precision.master_bytes,
        kv_cache_bytes=engine,
        engine_weight_bytes=engine,
    )
    return MemoryOptions(
        gpus_per_node=request.gpus_per_node, precision=precision, disk_bytes_per_second=1e9 * request.disk_gb_per_second
    )


_DTYPE_BYTES = {"bf16": 2, "fp32": 4}


def time_of(request: PlanRequest, layout: Layout) -> StepTime:
    """Time of one layout as it is given, whether it fits or not."""
    search = _Search.of(request)
    memory = plan_memory(request.model, layout, request.gpu.memory_bytes, search.options, {0})
    return search.time(layout, memory.kv_cache_tokens)


def _ranked(candidates: list[Candidate]) -> list[Candidate]:
    """By time; of those that are as fast as the fastest, those with fewer chunks, even stages, fewer cuts and no offload first."""
    by_time = sorted(candidates, key=lambda candidate: candidate.time.step_seconds)
    if not by_time:
        return []
    longest = by_time[0].time.step_seconds * (1 + EQUAL)
    equal = [candidate for candidate in by_time if candidate.time.step_seconds <= longest]
    return [*sorted(equal, key=lambda candidate: _intricacy(candidate.layout)), *by_time[len(equal) :]]


def cut_sizes(layout: Layout) -> tuple[int, ...]:
    """How the model is cut, whatever the schedule: a row of the table."""
    return (
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.context_parallel_size,
        layout.expert_parallel_size,
        layout.expert_tensor_parallel_size,
    )


def _intricacy(layout: Layout) -> tuple[int, bool, int]:
    is_uneven = layout.num_layers_in_first_pipeline_stage is not None or layout.num_layers_in_last_pipeline_stage is not None
    cuts = layout.model_parallel_size * layout.expert_parallel_size * layout.expert_tensor_parallel_size
    return layout.num_chunks + 2 * is_uneven, layout.swap_optimizer, cuts


def _bounded_out(cut: Layout, bound: float, worst: float) -> Rejection:
    reason = (
        f"a step takes at least {bound:.0f} s with this cut, even without recompute; the layouts shown take up to {worst:.0f} s"
    )
    return Rejection(cut, "slower", reason, step_seconds=bound)


def evaluate(request: PlanRequest, layout: Layout) -> Candidate | Rejection:
    """One layout as it is given; of a layout without engines training alone."""
    problem = rule_problem(request, layout)
    if problem:
        return Rejection(layout, "rule", problem)
    if request.only_runnable and (problem := release_problem(layout)):
        return Rejection(layout, "release", problem)
    return _Search.of(request).of_layout(layout)


@dataclass(frozen=True, slots=True)
class _Search:
    request: PlanRequest
    machine: Machine
    options: MemoryOptions
    fastest_rollout: float

    @classmethod
    def of(cls, request: PlanRequest) -> _Search:
        machine = Machine(request.gpu, TimeOptions(gpus_per_node=request.gpus_per_node))
        options = memory_options(request)
        return cls(request, machine, options, fastest_rollout_seconds(request, machine, options))

    def bound_seconds(self, cut: Layout) -> float:
        """No layout of this cut has a faster step."""
        request, workload = self.request, self.request.workload
        seconds = []
        for limit in token_limits(request, cut):
            update = update_seconds(self.machine, request.model, cut, micro_batches(workload, cut, limit))
            log_probs = update.forward.total if workload.has_old_log_probs_pass else 0.0
            seconds.append(workload.num_updates_per_rollout * (update.total + log_probs))
        calibration = request.calibration or UNCORRECTED
        train, rollout = min(seconds) * calibration.train, self.fastest_rollout * calibration.rollout
        return max(train, rollout) if workload.rollout_lag else train + rollout

    def of_cut(self, cut: Layout, worst: float = math.inf) -> Iterator[Candidate | Rejection]:
        """Everything that can be made of one cut: offload and engines, limits of micro-batches, recompute.

        What takes more than `worst` seconds is left out by its time alone.
        """
        kept: Layout | None = None  # without offload, where rollout and sync have room for it
        for swap in (False, True) if self.request.colocated else (False,):
            layout = replace(cut, swap_optimizer=swap, swap_parameters=swap)
            with_engine = with_engines(self.request, self.machine, self.options, layout)
            if isinstance(with_engine, Rejection):
                yield with_engine
                continue
            if kept is not None and (needless := self._needless_swap(with_engine, kept)):
                yield needless
                continue
            fits = does_not_fit = False
            for found in self._of_engine(with_engine, worst):
                fits |= isinstance(found, Candidate)
                does_not_fit |= isinstance(found, Rejection) and found.kind != "slower"
                yield found
            kept = with_engine if fits or not does_not_fit else None
        if cut.data_parallel_size * cut.context_parallel_size > 1:
            yield self._whole_optimizer(cut)

    def _needless_swap(self, swapped: Layout, kept: Layout) -> Rejection | None:
        """Offload makes room in rollout and sync alone: where there is enough, it must save more of generation than it takes."""
        if self.request.workload.rollout_lag:
            return None  # what is waited for of generation depends on how long training takes
        request, gpu_bytes = self.request, self.request.gpu.memory_bytes
        limits, choices = token_limits(request, swapped), recompute_choices(request.model)
        layouts = [self._sized(layout, limits[0], choices[0]) for layout in (kept, swapped)]
        before, after = (self.time(one, kv_cache_tokens(request.model, one, gpu_bytes, self.options)) for one in layouts)
        if after.step_seconds < before.step_seconds:
            return None
        saved = before.phase_seconds("rollout") - after.phase_seconds("rollout")
        taken = after.phase_seconds("sync") - before.phase_seconds("sync")
        reason = f"actor.offload saves {max(saved, 0.0):.1f} s of generation and takes {taken:.1f} s of swaps, and the same cut has room without it"
        return Rejection(layouts[1], "slower", reason, len(limits) * len(choices), step_seconds=after.step_seconds)

    def _of_engine(self, layout: Layout, worst: float) -> Iterator[Candidate | Rejection]:
        limits, choices = token_limits(self.request, layout), recompute_choices(self.request.model)
        cache = kv_cache_tokens(self.request.model, layout, self.request.gpu.memory_bytes, self.options)
        first = 0  # of the choices: those before it do not fit with fewer tokens either
        for number, limit in enumerate(limits):
            if first:
                reason = f"recompute {choices[first - 1]} does not fit with micro-batches of {limits[number - 1]} tokens either"
                yield Rejection(self._sized(layout, limit, choices[0]), "memory", reason, first)
            for index in range(first, len(choices)):
                sized, rest = self._sized(layout, limit, choices[index]), choices[index + 1 :]
                time = self.time(sized, cache)
                if time.step_seconds > worst:
                    reason = f"a step takes {time.step_seconds:.0f} s; the layouts shown take up to {worst:.0f} s"
                    yield Rejection(sized, "slower", reason, 1 + len(rest), step_seconds=time.step_seconds)
                    first = index
                    break
                found = self.of_layout(sized, time)
                yield found
                if isinstance(found, Candidate):
                    if worst < math.inf and rest:
                        reason = (
                            f"recompute {rest[0]} and what recomputes more take longer than {time.step_seconds:.0f} s, with which the same "
                            f"layout fits with recompute {choices[index]}"
                        )
                        yield Rejection(self._sized(layout, limit, rest[0]), "slower", reason, len(rest))
                    else:
                        yield from (self._slower(self._sized(layout, limit, slower), found) for slower in rest)
                    first = index
                    break
            else:
                if number == 0 and (layout.swap_optimizer or not self.request.colocated):
                    yield self._optimizer_on_host(self._sized(layout, limit, FULL_RECOMPUTE))
                if larger := len(limits) - number - 1:
                    reason = f"micro-batches of {limit} tokens do not fit even with full recompute"
                    yield Rejection(self._sized(layout, limits[-1], FULL_RECOMPUTE), "memory", reason, larger * len(choices))
                return

    def of_layout(self, layout: Layout, time: StepTime | None = None) -> Candidate | Rejection:
        """Memory of the stages that can be the fullest, and time where it is not known; of what fits the memory of all stages."""
        request, gpu_bytes = self.request, self.request.gpu.memory_bytes
        memory = plan_memory(request.model, layout, gpu_bytes, self.options, _fullest_stages(request.model, layout))
        time = time or self.time(layout, memory.kv_cache_tokens)
        if reason := reason_not_fitting(memory, layout, gpu_bytes):
            return Rejection(layout, "memory", reason, peak_bytes=memory.peak_bytes, step_seconds=time.step_seconds)
        host_bytes = request.gpu.host_memory_gib_per_gpu * request.gpus_per_node * GIB
        if memory.host_bytes > host_bytes:
            reason = _host_reason(memory, host_bytes)
            return Rejection(layout, "host_memory", reason, peak_bytes=memory.peak_bytes, step_seconds=time.step_seconds)
        memory = plan_memory(request.model, layout, gpu_bytes, self.options)
        return Candidate(layout, memory, time, limit_of(memory, time, request.gpu))

    def _optimizer_on_host(self, layout: Layout) -> Candidate | Rejection:
        """The last resort of a cut: Adam and its state in host memory."""
        on_host = replace(layout, optimizer_offload_fraction=1.0)
        found = self.of_layout(on_host)
        if isinstance(found, Rejection) or not self.request.only_runnable:
            return found
        reason = f"fits only with the optimizer in host memory ({found.memory.peak_bytes / GB:.1f} GB a GPU): {release_problem(on_host)}"
        return Rejection(on_host, "release", reason, 1, found.memory.peak_bytes, found.time.step_seconds)

    def _whole_optimizer(self, cut: Layout) -> Rejection:
        """The same cut without the distributed optimizer, which costs memory and saves nothing."""
        whole, model = replace(cut, use_distributed_optimizer=False), self.request.model
        states = max(stage_states(model, whole, self.options), key=lambda stage: stage.optimizer_bytes)
        shared = max(stage.optimizer_bytes for stage in stage_states(model, cut, self.options))
        reason = (
            f"without actor.use_distributed_optimizer every rank holds {states.optimizer_bytes / GB:.1f} GB of optimizer state instead of "
            f"{shared / GB:.1f} GB, and no step is faster"
        )
        return Rejection(whole, "slower", reason)

    def with_gains(self, candidates: list[Candidate]) -> Iterator[Candidate]:
        """With what would gain how much for the best of each cut, as many as are asked for."""
        named: set[tuple[int, ...]] = set()
        for candidate in candidates:
            sizes = cut_sizes(candidate.layout)
            if sizes in named or len(named) == self.request.top:
                yield candidate
            else:
                named.add(sizes)
                yield replace(candidate, gains=gains_of(self.request, candidate, self.options))

    def time(self, layout: Layout, kv_cache_tokens: int | None) -> StepTime:
        """One rollout step of a layout whose engines hold so many tokens."""
        request = self.request
        return step_time(self.machine, request.model, layout, request.workload, kv_cache_tokens, request.calibration)

    def _sized(self, layout: Layout, limit: int, recompute: Recompute) -> Layout:
        count = micro_batches(self.request.workload, layout, limit).num_micro_batches
        return replace(layout, max_tokens_per_micro_batch=limit, recompute=recompute, num_micro_batches=count)

    def _slower(self, layout: Layout, faster: Candidate) -> Rejection:
        time = self.time(layout, faster.memory.kv_cache_tokens)
        gpu_bytes, model = self.request.gpu.memory_bytes, self.request.model
        memory = plan_memory(model, layout, gpu_bytes, self.options, _fullest_stages(model, layout))
        loss = time.step_seconds / faster.time.step_seconds - 1
        return Rejection(
            layout,
            "slower",
            f"recompute {layout.recompute} costs {loss:+.1%} of a step, and the same layout fits with recompute {faster.layout.recompute}",
            peak_bytes=memory.peak_bytes,
            step_seconds=time.step_seconds,
        )


def _fullest_stages(shape: ModelShape, layout: Layout) -> set[int]:
    """Both ends, the second one where the first holds fewer layers, and the first with the most experts: others hold no more."""
    counts = layer_counts(shape, layout)
    last = len(counts) - 1
    return {0, min(1, last), last, max(range(last + 1), key=lambda stage: (counts[stage][1], -stage))}


def _host_reason(memory: MemoryPlan, host_bytes: float) -> str:
    largest = max(memory.host_items, key=lambda item: item.num_bytes)
    return (
        f"host memory {memory.host_bytes / GB:.0f} GB a node, {largest.num_bytes / GB:.0f} GB of it {largest.name}, exceeds "
        f"{host_bytes / GB:.0f} GB; use more nodes, or no offload"
    )


def _notes(request: PlanRequest, candidates: list[Candidate]) -> tuple[str, ...]:
    workload, notes = request.workload, []
    if workload.mean_response_tokens is None:
        notes.append(
            f"responses are taken to have {workload.response_tokens:.0f} tokens on average, a third of the limit; measure it, or give it."
        )
    if isinstance(request.model.attention, LatentAttention):
        notes.append(
            "this version trains models with latent attention beside the embedded engine only (rollout.engine.type hf); the plan is for the day "
            "it takes SGLang servers too."
        )
    if any(candidate.layout.context_parallel_size > 1 for candidate in candidates):
        notes.append("CP above 1 is tested on CPU ranks and has not been run on GPUs yet; probe such a layout first.")
    if request.dtype == "fp32" or request.engine_dtype == "fp32":
        notes.append("fp32 is counted in memory; times are those of bf16, fp32 takes several times longer.")
    if request.calibration is not None:
        calibration = request.calibration
        notes.append(
            f"corrected by {calibration.num_steps} steps of {calibration.source}: rollout x{calibration.rollout:.2f}, train "
            f"x{calibration.train:.2f}, sync x{calibration.sync:.2f}."
        )
    return tuple(notes)
