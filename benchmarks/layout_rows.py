"""Rows of published layouts -> inputs of the planner, or the reason why a row says too little.

A row is a line of a CSV file with the columns of `data/published_layouts.csv`. What a row leaves out comes from three places only: the
table of public models, the conventions of the framework that measured it (`_CONVENTIONS`), and for Megatron-LM's functional tests
their recipes. No number is chosen row by row.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.public_models import DATA, find_model, shape_of
from dapo_megatron.layout.layout import Layout, Recompute, RecomputedPart
from dapo_megatron.layout.memory_records import HeadLoss, MemoryOptions, Precision
from dapo_megatron.layout.model_shape import ModelShape

FACTS = DATA / "published_layouts.csv"
HELD_OUT = DATA / "held_out_layouts.csv"
"""Rows that were found after the formulas were written; no number was fitted to them."""
GIB, GB = 2**30, 1e9
_BF16 = ("bf16", "bfloat16", "")
Counter = Literal["allocated", "reserved", "device"]
"""What a published peak counts: torch's max_memory_allocated, its max_memory_reserved, or all that the device shows as used."""


class Refusal(Exception):
    """A row that cannot be planned for; the text says what it lacks."""


@dataclass(frozen=True, slots=True)
class Peak:
    """A published peak, in bytes."""

    num_bytes: float
    counter: Counter
    ends_only: bool
    """Of the first or the last pipeline stage; False: of the fullest."""


@dataclass(frozen=True, slots=True)
class RowInputs:
    """What a row says, in the planner's words."""

    row_id: str
    model: str
    framework: str
    shape: ModelShape
    layout: Layout
    options: MemoryOptions
    gpu: str
    sequence_tokens: int
    peak: Peak | None
    """None: no peak was published."""
    ran_out_of_memory: bool


@dataclass(frozen=True, slots=True)
class _Convention:
    """How a framework runs what its rows do not say."""

    head_loss: HeadLoss = "unfused"
    vocab_multiple: int = 128
    fused_grad_accumulation: bool = True
    grad_bytes: int = 4
    fp8_weights: bool = False
    """With fp8, weights are held in fp8 alone (fp8_param_gather); False: beside those in bf16."""
    gigabyte: float = GIB
    """Bytes of what its logs call GB."""


_CONVENTIONS: Mapping[str, _Convention] = {
    # simu_tools/megatron_scripts: no fusion of the cross-entropy but in the B200 release (1.2), see `_head_loss`.
    "SimuMax": _Convention(),
    "Megatron-LM": _Convention(),
    "mbridge": _Convention(),
    # Megatron Bridge and NeMo performance recipes: cross_entropy_loss_fusion with TransformerEngine's implementation, grad_reduce_in_fp32
    # off, fp8_param_gather; their logs divide bytes by 1e9.
    "Megatron-Bridge": _Convention(head_loss="fused", grad_bytes=2, fp8_weights=True, gigabyte=GB),
    "NeMo": _Convention(head_loss="fused", grad_bytes=2, fp8_weights=True, gigabyte=GB),
}


def read_rows(file: Path) -> list[dict[str, str]]:
    """The lines of a CSV file of layouts, as they are."""
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def inputs_of(row: Mapping[str, str], *, for_time: bool = False) -> RowInputs:
    """A row in the planner's words. Refusal when it says too little, or is of something that is not modelled.

    `for_time`: what only memory does not model (low precision, CUDA graphs) is let through.
    """
    row = tidy(row)
    framework = _framework(row["source"])
    convention = _CONVENTIONS.get(framework, _Convention())
    recipe = _recipe(row["model"]) if row["model"].startswith("mlm:") else {}
    _refuse_what_is_not_modelled(row, recipe, for_time)
    shape = _shape(row, framework, recipe)
    layout = _layout(row, shape, recipe)
    options = MemoryOptions(
        head_loss=_head_loss(row, recipe.get("head_loss", convention.head_loss)),
        precision=_precision(row, convention),
        fused_grad_accumulation=recipe.get("fused_grad_accumulation", convention.fused_grad_accumulation),
        vocab_multiple=convention.vocab_multiple,
        dropout=recipe.get("dropout", False),
        expert_imbalance=1.0,
        flash_attention=recipe.get("flash_attention", True),
        sequence_tokens=_number(row, "seq"),
        fully_sharded=_is_set(row["fsdp"]),
        # Pretraining cuts its text into sequences of one length.
        varying_sizes=row["phase"].lower() == "sft" and "expandable_segments" not in row["note"],
        layers=_layers(shape.num_layers, shape.num_mtp_layers, layout),
    )
    return RowInputs(
        row["id"],
        row["model"],
        framework,
        shape,
        layout,
        options,
        row["gpu"],
        _number(row, "seq"),
        _peak(row, convention),
        ran_out_of_memory="oom" in row["status"].lower() or "out of memory" in row["status"].lower(),
    )


_MX_SCALES = 1 / 32
"""Bytes of scales for each element in MXFP8: one of 8 bits for 32 elements."""


def _precision(row: Mapping[str, str], convention: _Convention) -> Precision:
    """bf16 with fp32 gradients and moments but where the row says otherwise. In fp8 TransformerEngine keeps weights as they are and
    transposed, and of each linear layer's input the transposed copy.
    """
    note, name = row["note"].lower(), row["precision"].lower()
    low: dict[str, float] = {}
    if name not in _BF16:
        element = 1 + (_MX_SCALES if "mx" in name else 0)
        has_fp8_weights = convention.fp8_weights or "fp8 weights" in note or "fp8 param" in note
        low = {"linear_weight_bytes": 2 * element + (0 if has_fp8_weights else 2), "linear_input_bytes": element}
    return Precision(
        grad_bytes=2 if re.search(r"bf16 grad|grads? in bf16", note) else convention.grad_bytes,
        moment_bytes=2 if re.search(r"bf16 moments|moments in bf16|precision.aware", note) else 4,
        **low,
    )


def shape_of_row(row: Mapping[str, str]) -> ModelShape:
    """The model of a row, whatever its layout. Refusal for an unknown one."""
    row = tidy(row)
    recipe = _recipe(row["model"]) if row["model"].startswith("mlm:") else {}
    return _shape(row, _framework(row["source"]), recipe)


def tidy(row: Mapping[str, str]) -> Mapping[str, str]:
    """Without blanks at the ends; a column that the file does not have is empty."""
    cells = {name: value.strip() for name, value in row.items() if name and isinstance(value, str)}
    return defaultdict(str, {name: "" if value.lower() in _NOTHING else value for name, value in cells.items()})


_NOTHING = ("n/a", "na", "-", "/", "?")
"""What tables write into a cell that says nothing."""


def _framework(source: str) -> str:
    names = {
        "simumax": "SimuMax",
        "mbridge": "mbridge",
        "bridge": "Megatron-Bridge",
        "nemo": "NeMo",
        "megatron-lm": "Megatron-LM",
    }
    return next((name for word, name in names.items() if word in source.lower()), "other")


@cache
def _recipes() -> list[dict[str, Any]]:
    return yaml.safe_load((DATA / "megatron_lm_recipes.yaml").read_text(encoding="utf-8"))


def _recipe(model: str) -> dict[str, Any]:
    name = model.removeprefix("mlm:")
    for recipe in _recipes():
        if any(re.fullmatch(pattern, name) for pattern in recipe["names"]):
            return recipe
    raise Refusal(f"the recipe {name} is not in data/megatron_lm_recipes.yaml: vocabulary and MLP are not in the row")


def _refuse_what_is_not_modelled(row: Mapping[str, str], recipe: Mapping[str, Any], for_time: bool) -> None:
    if "refused" in recipe:
        raise Refusal(recipe["refused"])
    if row["phase"].lower().replace("-", "") not in ("pretrain", "pretraining", "training", "train", "sft", ""):
        raise Refusal(f"phase {row['phase']}: what else is on the device (inference buffers, adapters) is not published")
    if "does not divide the GPU count" in row["note"]:
        raise Refusal("the layout does not divide the published number of GPUs")
    if row["model"].startswith("mlm:") and row["gpu"].startswith("GB"):
        raise Refusal("Megatron-LM's recipes do not say how many nodes of 4 GPUs they ran on")
    if for_time:
        return
    if row["precision"].lower() not in _BF16 and not re.match(r"(mx)?fp8", row["precision"].lower()):
        raise Refusal(f"precision {row['precision']}: its copies of weights and activations are not modelled")
    if re.search(r"cuda ?graph", row["note"], re.IGNORECASE) and not re.search(r"no cuda ?graph", row["note"], re.IGNORECASE):
        raise Refusal("the memory pools of CUDA graphs are not modelled")


def _shape(row: Mapping[str, str], framework: str, recipe: Mapping[str, Any]) -> ModelShape:
    num_layers = _number(row, "num_layers", default=0) or None
    if "model" in recipe:
        return shape_of(_with_note(recipe["model"], row["note"]), num_layers)
    name = re.sub(r"[\[(].*", "", row["model"])
    entry = find_model(name, framework)
    if entry is None:
        raise Refusal(f"model {name} is not in data/public_models.yaml")
    vocab = re.search(r"vocab(?:ulary)?[ =](\d+)", row["note"])
    mtp = 1 if re.search(r"\bMTP\b(?! *(=|off|0))", row["note"]) else 0
    return shape_of({**entry, **({"vocab_size": int(vocab[1])} if vocab else {}), "mtp_num_layers": mtp}, num_layers)


_NOTE_NAMES = {
    "h": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "kv": "num_query_groups",
    "E": "num_experts",
    "topk": "moe_router_topk",
    "moe_ffn": "moe_ffn_hidden_size",
}


def _with_note(entry: Mapping[str, Any], note: str) -> dict[str, Any]:
    """The sizes `h=6144 heads=48 ...` of a note win over a table's."""
    given = dict(re.findall(r"(\w+)=(\w+)", note))
    return {**entry, **{_NOTE_NAMES[key]: int(value) for key, value in given.items() if key in _NOTE_NAMES and value != "None"}}


def _layout(row: Mapping[str, str], shape: ModelShape, recipe: Mapping[str, Any]) -> Layout:
    tp, pp, cp, ep = (_number(row, name, default=1) for name in ("tp", "pp", "cp", "ep"))
    etp = _number(row, "etp", default=tp)  # megatron-core's default
    num_chunks = _number(row, "vpp", default=recipe.get("virtual_pipeline_size", 1)) if pp > 1 else 1
    num_gpus, mbs = _number(row, "gpus"), _number(row, "mbs")
    model_ranks = tp * pp * cp
    if num_gpus % model_ranks or (shape.experts is not None and num_gpus % (pp * ep * etp)):
        raise Refusal(f"the layout does not divide {num_gpus} GPUs")
    if shape.experts is not None and shape.experts.num_experts % ep:
        raise Refusal(f"ep ({ep}) does not divide {shape.experts.num_experts} experts")
    if shape.num_layers + _ENDS < pp * num_chunks:
        raise Refusal(f"{pp} stages of {num_chunks} chunks are more than {shape.num_layers} layers")
    dp = num_gpus // model_ranks
    return Layout(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        virtual_pipeline_size=num_chunks if num_chunks > 1 else None,
        context_parallel_size=cp,
        expert_parallel_size=ep if shape.experts is not None else 1,
        expert_tensor_parallel_size=etp if shape.experts is not None else 1,
        data_parallel_size=dp,
        sequence_parallel=tp > 1 and "sp=False" not in row["note"],
        use_distributed_optimizer="dist_opt=False" not in row["note"],
        max_tokens_per_micro_batch=_number(row, "seq") * mbs,
        num_micro_batches=_num_micro_batches(row, dp, mbs, pp),
        recompute=_recompute(row["recompute"]),
        optimizer_offload_fraction=_offload(row["offload"]),
    )


def _num_micro_batches(row: Mapping[str, str], dp: int, mbs: int, pp: int) -> int:
    stated = re.search(r"micro-batches (\d+)", row["note"])
    if stated:
        return int(stated[1])
    if row["gbs"]:
        return max(1, _number(row, "gbs") // (dp * mbs))
    if pp > 1:
        raise Refusal("neither gbs nor the number of micro-batches is published, and a pipeline holds as many as it has")
    return 1


_ENDS = 2
"""Embedding and loss, where recipes count each as a layer (account_for_embedding_in_pipeline_split, account_for_loss_...)."""


def _layers(num_layers: int, num_mtp_layers: int, layout: Layout) -> tuple[tuple[range, ...], ...] | None:
    """None where the pipeline's chunks are equal; else as megatron-core cuts them when embedding and loss count as layers, where that is
    even; else layers spread as evenly as can be, the last chunks with one less.

    Multi-token-prediction layers count as layers of the last chunk: a pipeline that is cut by hand is cut to be even with them.
    """
    stages, chunks = layout.pipeline_parallel_size, layout.num_chunks
    if num_layers % (stages * chunks) == 0:
        return None
    if (num_layers + _ENDS) % (stages * chunks) == 0 and not num_mtp_layers:
        sizes = [(num_layers + _ENDS) // (stages * chunks)] * (stages * chunks)
        sizes[0] -= 1
        sizes[-1] -= 1
    else:
        base, more = divmod(num_layers + num_mtp_layers, stages * chunks)
        sizes = [base + (index < more) for index in range(stages * chunks)]
        sizes[-1] -= num_mtp_layers
    starts = [sum(sizes[:index]) for index in range(stages * chunks)]
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return tuple(tuple(ranges[chunk * stages + stage] for chunk in range(chunks)) for stage in range(stages))


_MODULES: tuple[RecomputedPart, ...] = ("core_attn", "layernorm", "moe_act", "mla_up_proj", "shared_experts", "mlp", "moe")


def _recompute(text: str) -> Recompute:
    text = text.strip().lower()
    if text in ("", "none", "no"):
        return Recompute()
    if text.startswith(("full", "block", "uniform")):
        number = re.search(r"\d+", text)
        method: Literal["uniform", "block"] = "block" if "block" in text else "uniform"
        return Recompute("full", method=method, num_layers=int(number[0]) if number else 1)
    modules = frozenset(module for module in _MODULES if re.search(rf"\b{module}\b", text))
    if modules or text == "selective":
        return Recompute("selective", modules or frozenset({"core_attn"}))
    raise Refusal(f"recompute {text!r} is not one of none, full, block, or a list of megatron-core's modules")


def _offload(text: str) -> float:
    text = text.strip().lower()
    if text in ("", "none", "no", "0"):
        return 0.0
    share = re.search(r"(\d+(?:\.\d+)?) ?%", text)
    if "optim" in text:
        return float(share[1]) / 100 if share else 1.0
    raise Refusal(f"offload {text!r}: only that of the optimizer is modelled")


def _head_loss(row: Mapping[str, str], usual: HeadLoss) -> HeadLoss:
    note = row["note"].lower()
    if "unfused ce" in note or "no ce fusion" in note:
        return "unfused"
    if row["gpu"].startswith("B200") and _framework(row["source"]) == "SimuMax":
        return "fused"
    return "fused" if "fused ce" in note or "ce fusion" in note else usual


def _peak(row: Mapping[str, str], convention: _Convention) -> Peak | None:
    """`GB` with nothing else is what the framework logs; `GiB` and `1e9` say which."""
    peak = decimal(row, "peak_mem_GB")
    if peak is None:
        return None
    unit = row["mem_unit"].lower()
    counter: Counter = "reserved" if "reserved" in unit else "device" if "smi" in unit or "device" in unit else "allocated"
    unit_bytes = GB if "1e9" in unit else GIB if "gib" in unit else convention.gigabyte
    return Peak(peak * unit_bytes, counter, ends_only="rank0" in unit or "last" in unit)


def decimal(row: Mapping[str, str], name: str) -> float | None:
    """A number; None where there is none. Refusal where there is something else."""
    try:
        return float(row[name].replace(",", "")) if row[name] else None
    except ValueError:
        raise Refusal(f"{name} ({row[name]}) is not a number") from None


def _number(row: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A whole number. Refusal where there is none and no default, or something else."""
    if not row[name]:
        if default is not None:
            return default
        names = {"gpus": "the number of GPUs", "mbs": "the micro-batch size", "seq": "the sequence length"}
        raise Refusal(f"{names.get(name, name)} is not published")
    try:
        return int(float(row[name].replace(",", "")))
    except ValueError:
        raise Refusal(f"{name} ({row[name]}) is not a number") from None


def _is_set(text: str) -> bool:
    return text.strip().lower() not in ("", "0", "no", "none", "false")


def without_duplicates(inputs: list[RowInputs]) -> list[RowInputs]:
    """Rows that differ in time alone, as runs with more micro-batches, once."""
    seen: dict[tuple[Any, ...], RowInputs] = {}
    for one in inputs:
        key = (one.model, one.gpu, one.peak, replace(one.layout, num_micro_batches=1))
        seen.setdefault(key, one)
    return list(seen.values())
