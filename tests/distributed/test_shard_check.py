"""Gathers that go wrong on real ranks, each in its own way: the version does not come about, and tensors and ranks are named."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from dapo_megatron.config.schema import Config
from dapo_megatron.types import FingerprintError
from tests.distributed import programs
from tests.distributed.ranks import run_ranks
from tests.tiny_models import make_hf_model

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": ("llama3_tied", {"tensor_parallel_size": 2}),
    "pp2_vpp2": ("llama3_tied", {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
    "ep2": ("qwen3_moe_some_dense", {"num_ranks": 2, "expert_parallel_size": 2}),
}
BUCKET_BYTES = 60_000
GATHER_FAULTS = ("exchanged_by_sender", "exchanged_by_assembler", "lost", "of_the_version_before", "one_bit")
FAULTS = (*GATHER_FAULTS, "copy")


@pytest.fixture(scope="module", params=LAYOUTS)
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, set[str]]]:
    family, layout = LAYOUTS[request.param]
    model = make_hf_model(tmp_path_factory.mktemp(request.param) / "model", family)
    (said, _), (_, names_of_copy) = run_ranks(send_with_faults, 2, programs.make_config(model, **layout))
    return said | {"copy": (said["copy"][0], names_of_copy)}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_ends_the_version_and_is_named(said: dict[str, tuple[str, set[str]]], fault: str):
    message, names = said[fault]
    assert message.startswith(f"weights of version {FAULTS.index(fault)} are not one model: {len(names)} tensors ")
    assert ("were not gathered as their ranks hold them" in message) == (fault in GATHER_FAULTS)
    assert ("differ between ranks that hold copies of them" in message) == (fault == "copy")
    shown = re.findall(r"(\S+) \(ranks? [01]", message)
    assert set(shown) <= names and len(shown) == min(3, len(names))
    assert fault != "copy" or "(ranks 0, 1)" in message


def test_version_after_the_faults_is_complete(said: dict[str, tuple[str, set[str]]]):
    assert said["none"] == ("", set())


def test_copies_may_drift_where_that_is_configured(said: dict[str, tuple[str, set[str]]]):
    assert said["copy_that_may_drift"] == ("", set())


def test_context_parallel_ranks_that_differ_are_named(tmp_path_factory: pytest.TempPathFactory):
    model = make_hf_model(tmp_path_factory.mktemp("cp2") / "model", "llama3_tied")
    (said, _), (_, names_of_copy) = run_ranks(send_with_faults, 2, programs.make_config(model, context_parallel_size=2))
    assert "differ between ranks that hold copies of them" in said["copy"][0] and "(ranks 0, 1)" in said["copy"][0]
    assert set(re.findall(r"(\S+) \(ranks? [01]", said["copy"][0])) <= names_of_copy
    assert said["none"] == said["copy_that_may_drift"] == ("", set())


def send_with_faults(rank: int, init_method: str, config: Config) -> tuple[dict[str, tuple[str, set[str]]], set[str]]:
    """Fault -> what the sender says on rank 0, and the tensors that suffer: one version each, then one without a fault.

    Beside it, the tensors of the copy that rank 1 spoils.
    """
    from dapo_megatron.actor.live_weights import live_boxes
    from dapo_megatron.actor.weight_sender import WeightSender
    from dapo_megatron.actor.worker import ActorWorker
    from dapo_megatron.weights.plan import import_plan

    class Faulty(WeightSender):
        """Does its `fault` to the first bucket that has room for it, and keeps the `names` of the tensors."""

        fault = "none"
        names: frozenset[str] = frozenset()

        def gather(self, plan: Any, payload: Any) -> bool:
            found = None if self.names else altered(plan, self.fault)
            if found is None:
                return super().gather(plan, payload)
            at, plan_there, names = found
            self.names = frozenset(names)
            payload.zero_()
            if self.fault == "of_the_version_before" and rank == at:
                return before.gather(plan, payload)
            is_assembler = super().gather(plan_there if rank == at else plan, payload)
            if self.fault == "one_bit" and is_assembler:
                payload[plan.pieces[-1].byte_offset + 5] ^= 16
            return is_assembler

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    live = live_boxes(worker.policy.modules)
    before = WeightSender(worker.mapping, [replace(item, data=item.data.clone()) for item in live], BUCKET_BYTES)
    for item in live:
        item.data.mul_(1.01)
    sender = Faulty(worker.mapping, live, BUCKET_BYTES)
    lenient = Faulty(worker.mapping, live, BUCKET_BYTES, compare_copies=False)
    copy = next((item for item in reversed(live) if not item.is_owner), live[0])
    said = {}
    for version, fault in enumerate((*FAULTS, "none", "copy_that_may_drift")):
        sender = lenient if fault == "copy_that_may_drift" else sender
        sender.fault, sender.names = fault, frozenset()
        kept = copy.data.clone()
        if fault.startswith("copy") and rank == 1:
            copy.data.view(-1)[3] += 1
        try:
            programs.received(worker.mapping, list(sender.send(version)))
            said[fault] = "", sender.names
        except FingerprintError as error:
            said[fault] = str(error), sender.names
        copy.data.copy_(kept)
    return said, {piece.hf_name for piece in import_plan(worker.mapping, [copy.box])}


def altered(plan: Any, fault: str) -> tuple[int, Any, set[str]] | None:
    """The rank that goes wrong, the plan it goes by, and the tensors that suffer; None where the bucket has no room for the fault."""
    chunks = {rank: list(of_rank) for rank, of_rank in plan.chunks_by_rank.items()}

    def name(chunk: Any) -> str:
        return plan.pieces[chunk.piece_index].name

    if fault.startswith("exchanged"):
        for (i, first), (j, second) in combinations(enumerate(chunks.get(1, [])), 2):
            if name(first) != name(second) and shape(first) == shape(second):
                chunks[1][i] = replace(first, box_index=second.box_index, box_slices=second.box_slices)
                chunks[1][j] = replace(second, box_index=first.box_index, box_slices=first.box_slices)
                if fault.endswith("assembler"):
                    chunks[1][i], chunks[1][j] = second, first
                return int(fault.endswith("sender")), replace(plan, chunks_by_rank=chunks), {name(first), name(second)}
    if fault == "lost" and 0 in chunks:
        lost = chunks[0].pop()
        return 0, replace(plan, chunks_by_rank=chunks), {name(lost)}
    if fault == "of_the_version_before" and 1 in chunks:
        return 1, plan, {name(chunk) for chunk in chunks[1]}
    if fault == "one_bit":
        return 0, plan, {plan.pieces[-1].name}
    return None


def shape(chunk: Any) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in chunk.piece_slices)
