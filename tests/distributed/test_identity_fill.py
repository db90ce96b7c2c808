"""Identity fill: tensors hold their own element numbers, and every rank of every layout must hold the numbers it should.

megatron-core builds each rank's model in one process, over process groups that exist in name only, so that a grid with hundreds of ranks
takes seconds. What a parameter must hold is worked out from the HF tensors by plain tensor algebra, with nothing of `weights`.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo_megatron.config.schema import Config
from tests.distributed import programs
from tests.distributed.nominal_ranks import rank_of
from tests.distributed.ranks import run_ranks
from tests.tiny_models import FAMILIES, MOE_FAMILIES, SIZES

WITH_EXPERTS = tuple(itertools.product((1, 2), (1, 2, 4), (1, 2)))
DENSE = ((1, 1, 1), (2, 1, 1), (4, 1, 1))
"""Tensor, expert and expert tensor parallel sizes."""
CASES = (
    ("qwen3_moe_some_dense", 1, None),
    ("qwen3_moe_some_dense", 2, None),
    ("qwen3_moe_some_dense", 2, 2),
    ("deepseek_v3", 2, None),
    ("mixtral", 1, None),
    ("llama3_tied", 2, 2),
    ("qwen2", 2, None),
)
"""Model, pipeline stages, chunks of a stage: each under all the sizes above."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands in its groups, as megatron-core counts."""

    tensor: tuple[int, int]
    expert: tuple[int, int]
    expert_tensor: tuple[int, int]


@pytest.mark.parametrize(("family", "num_stages", "num_chunks"), CASES)
def test_every_rank_of_the_grid_holds_its_numbers(tmp_path: Path, family: str, num_stages: int, num_chunks: int | None):
    config = (FAMILIES | MOE_FAMILIES)[family](**SIZES, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    layouts = []
    for tensor, expert, expert_tensor in WITH_EXPERTS if family in MOE_FAMILIES else DENSE:
        actor: dict[str, Any] = {"tensor_parallel_size": tensor, "expert_parallel_size": expert}
        actor |= {"expert_tensor_parallel_size": expert_tensor, "pipeline_parallel_size": num_stages}
        actor |= {"virtual_pipeline_size": num_chunks} if num_chunks else {}
        num_ranks = num_stages * math.lcm(tensor, expert * expert_tensor)
        layouts.append(programs.make_config(tmp_path, **actor, num_ranks=num_ranks))
    ((num_built, mismatches),) = run_ranks(fill_and_compare, 1, layouts)
    assert num_built == sum(layout.actor.world_size for layout in layouts)
    assert mismatches == []


def fill_and_compare(rank: int, init_method: str, layouts: list[Config]) -> tuple[int, list[str]]:
    """(ranks built, what was wrong): every rank of every layout, one after the other in this process."""
    from dapo_megatron.weights.checkpoint_keys import checkpoint_places
    from dapo_megatron.weights.families import megatron_arguments
    from dapo_megatron.weights.plan import check_cover, compile_mapping
    from dapo_megatron.weights.share_ledger import ShareLedger, share_table, shares_of

    hf_config = json.loads((layouts[0].model.path / "config.json").read_text())
    mapping = compile_mapping(hf_config)
    ends = np.cumsum([0, *(math.prod(shape) for shape in mapping.hf_tensors.values())])
    assert ends[-1] < 2**24, "fp32 must hold every number"
    hf = {
        name: torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(shape)
        for start, (name, shape) in zip(ends[:-1].tolist(), mapping.hf_tensors.items(), strict=True)
    }
    num_built, mismatches = 0, []
    homogeneous = not isinstance(megatron_arguments(hf_config).get("moe_layer_freq"), list)
    for layout in layouts:
        owned: list[Any] = []
        tables: list[Any] = []
        by_stacking: dict[bool, set[Any]] = {True: set(), False: set()}
        for layout_rank in range(layout.actor.world_size):
            boxes, is_owner, wrong, keys = _one_rank(layout, layout_rank, hf_config, mapping, hf)
            owned += itertools.compress(boxes, is_owner)
            tables.append(share_table(mapping, shares_of(mapping, boxes), is_owner))
            by_stacking = {form: of_form | keys[form] for form, of_form in by_stacking.items()}
            mismatches += [f"{layout.actor.model_dump(exclude_defaults=True)} rank {layout_rank}: {name}" for name in wrong]
            num_built += 1
        check_cover(mapping, owned)
        ShareLedger(tuple(mapping.hf_tensors), tables)  # raises unless each copy is one of an owner's boxes
        for asked, found in by_stacking.items():
            places = checkpoint_places(mapping, stacked_layers=asked and homogeneous).values()
            if found != {(place.key, place.index, place.axes) for place in places}:
                mismatches.append(f"{layout.actor.model_dump(exclude_defaults=True)}: names in a checkpoint, stacked: {asked}")
    return num_built, mismatches


def _one_rank(
    layout: Config, rank: int, hf_config: dict, mapping: Any, hf: dict
) -> tuple[list[Any], list[bool], list[str], dict[bool, set[Any]]]:
    """Boxes, which of them this rank owns, the parameters whose numbers are not those of the tensor algebra, the names it would save.

    Names are (key, leading index, leading axes), by whether megatron-core was left to stack layers.
    """
    from megatron.core import parallel_state

    from dapo_megatron.actor.live_weights import live_boxes
    from dapo_megatron.weights.plan import import_plan, padding_slices

    actor = layout.actor
    with rank_of(layout, rank) as modules:
        live = live_boxes(modules)
        for item in live:
            item.data.fill_(-1)
            for padding in padding_slices(mapping, item.box):
                item.data[padding] = 0
        for copy in import_plan(mapping, [item.box for item in live]):
            live[copy.box_index].data[copy.box_slices] = hf[copy.hf_name][copy.hf_slices]
        place = Place(
            (parallel_state.get_tensor_model_parallel_rank(), actor.tensor_parallel_size),
            (parallel_state.get_expert_model_parallel_rank(), actor.expert_parallel_size),
            (parallel_state.get_expert_tensor_parallel_rank(), actor.expert_tensor_parallel_size),
        )
        wrong = []
        for module in modules:
            tensors = dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if n.endswith("expert_bias")}
            layers = [layer.layer_number - 1 for layer in module.decoder.layers]
            for name, tensor in tensors.items():
                expected = expected_numbers(name, layers, hf_config, hf, place)
                if expected.shape != tensor.shape or not torch.equal(expected, tensor.detach()):
                    wrong.append(name)
        keys = {stacked: _checkpoint_names(modules, stacked) for stacked in (True, False)}
        return [item.box for item in live], [item.is_owner for item in live], wrong, keys


def _checkpoint_names(modules: list[Any], stacked: bool) -> set[Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    names = set()
    for module in modules:
        for value in module.sharded_state_dict(metadata={"non_homogeneous_layers": not stacked}).values():
            built = value.build() if isinstance(value, ShardedTensorFactory) else value
            for tensor in built if isinstance(built, list) else [built]:
                if isinstance(tensor, ShardedTensor):
                    axes = tensor.prepend_axis_num
                    names.add((tensor.key, tuple(tensor.global_offset[:axes]), tuple(tensor.global_shape[:axes])))
    return names


def expected_numbers(name: str, layers: list[int], config: dict, hf: dict, place: Place) -> torch.Tensor:
    """What the parameter of that local name holds."""

    def part(tensor: torch.Tensor, axis: int, of: tuple[int, int] = place.tensor) -> torch.Tensor:
        return tensor.chunk(of[1], dim=axis)[of[0]]

    def gated(gate: torch.Tensor, up: torch.Tensor, of: tuple[int, int] = place.tensor) -> torch.Tensor:
        return torch.cat([part(gate, 0, of), part(up, 0, of)])

    if "embedding" in name or "output_layer" in name:
        tied = config.get("tie_word_embeddings") or "embedding" in name
        table = hf["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return part(torch.nn.functional.pad(table, (0, 0, 0, -len(table) % place.tensor[1])), 0)
    if name == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    _, _, layer, *rest = name.split(".")
    prefix, local = f"model.layers.{layers[int(layer)]}.", ".".join(rest)
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    if local == "input_layernorm.weight" or local == "pre_mlp_layernorm.weight":
        return hf[prefix + local.replace("pre_mlp", "post_attention")]
    if local.startswith("self_attention.linear_qkv."):
        groups = config["num_key_value_heads"]
        q, k, v = (hf[f"{attention}{p}_proj.{rest[2]}"].unflatten(0, (groups, -1)) for p in "qkv")
        return part(torch.cat([q, k, v], dim=1).flatten(0, 1), 0)
    replicated = {"q_layernorm": "q_a_layernorm" if "kv_lora_rank" in config else "q_norm", "k_layernorm": "k_norm"}
    replicated |= {"kv_layernorm": "kv_a_layernorm"}
    rows = {"linear_q_proj": "q_proj", "linear_q_down_proj": "q_a_proj", "linear_q_up_proj": "q_b_proj"}
    rows |= {"linear_kv_down_proj": "kv_a_proj_with_mqa", "linear_kv_up_proj": "kv_b_proj"}
    if rest[0] == "self_attention":
        if rest[1] in replicated:
            return hf[f"{attention}{replicated[rest[1]]}.weight"]
        if rest[1] in rows:
            return part(hf[f"{attention}{rows[rest[1]]}.weight"], 0)
        return part(hf[f"{attention}o_proj.weight"], 1)
    if config["model_type"] == "mixtral":
        mlp = f"{prefix}block_sparse_moe."
    gate, up, down = ("w1", "w3", "w2") if config["model_type"] == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    if rest[1] == "router":
        return hf[mlp + ("gate.weight" if rest[2] == "weight" else "gate.e_score_correction_bias")]
    of = place.tensor
    if rest[1] == "experts":
        num_local = _num_experts(config) // place.expert[1]
        mlp += f"experts.{place.expert[0] * num_local + int(rest[3])}."
        of = place.expert_tensor
    elif rest[1] == "shared_experts":
        mlp += "shared_experts."
    if "linear_fc1" in local:
        return gated(hf[f"{mlp}{gate}.weight"], hf[f"{mlp}{up}.weight"], of)
    return part(hf[f"{mlp}{down}.weight"], 1, of)


def _num_experts(config: dict) -> int:
    return next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)
