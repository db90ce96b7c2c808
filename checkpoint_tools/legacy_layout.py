"""How Megatron-LM's legacy format deals a model out to ranks: the layers to pipeline stages, the rows and columns of a tensor, the files.

    mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt    TT tensor-parallel, PPP pipeline rank (PP > 1), EEE expert-parallel rank (EP > 1)

In a file, layers and experts are counted from 0 within the rank; here from 0 over the whole model, and experts have the names
of the mapping tables. Rules are those of megatron-core 0.19.2 (core/tensor_parallel/layers.py, core/transformer/transformer_layer.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dapo_megatron.types import ConfigError, MappingError

RANK_FILE = "model_optim_rng.pt"
OUTPUT_LAYER, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class Cut:
    """`axis` is shared out to the tensor-parallel ranks, None: every rank has the whole tensor.

    The axis holds `num_parts` equal parts that are cut each for itself: gate and up rows of a gated linear_fc1.
    """

    axis: int | None
    num_parts: int = 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """What decides, beside its name, how a tensor is cut. `cuts_latents`: the down projections of latent attention, which
    TransformerEngine's layer spec keeps whole.
    """

    is_gated: bool
    cuts_latents: bool


_WHOLE, _ROWS, _COLUMNS = Cut(None), Cut(0), Cut(1)
_CUTS: tuple[tuple[str, Cut], ...] = (
    (r"(embedding\.word_embeddings|output_layer)\.weight", _ROWS),
    (r".*\.self_attention\.linear_(qkv|q_proj|q_up_proj|kv_up_proj)\.(weight|bias)", _ROWS),
    (r".*\.(self_attention\.linear_proj|linear_fc2)\.weight", _COLUMNS),
    (r".*\.(self_attention\.linear_proj|linear_fc2)\.bias", _WHOLE),
    (r".*\.linear_fc1\.(weight|bias)", _ROWS),
    (r".*layernorm\.(weight|bias)|.*\.layer_norm_(weight|bias)", _WHOLE),
    (r".*\.mlp\.router\.(weight|bias|expert_bias)|.*\.mlp\.shared_experts\.gate_weight", _WHOLE),
    (r"embedding\.position_embeddings\.weight", _WHOLE),
)
"""Pattern of tensor names -> how they are cut."""
_GATED = r".*\.linear_fc1\.(weight|bias)"
_LATENT = r".*\.self_attention\.linear_(q|kv)_down_proj\.(weight|bias)"
_EXPERT = re.compile(r"\.mlp\.experts\.experts\.(\d+)\.")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(
    r"\.mlp\.experts\.(?:local_experts\.(?P<one>\d+)\.(?P<rest>.*)|(?P<linear>linear_fc[12])\.(?P<kind>weight|bias)(?P<of>\d+))$"
)


def cut_of(name: str, architecture: Architecture) -> Cut:
    """How the tensor of that name is cut. MappingError when megatron-core has none of that name."""
    if re.fullmatch(_LATENT, name):
        return _ROWS if architecture.cuts_latents else _WHOLE
    if architecture.is_gated and re.fullmatch(_GATED, name):
        return Cut(0, num_parts=2)
    for pattern, cut in _CUTS:
        if re.fullmatch(pattern, name):
            return cut
    raise MappingError(
        f"{name}: it is not known how tensor parallelism cuts it; load and save with Megatron-LM, --ckpt-format torch_dist"
    )


@dataclass(frozen=True, slots=True)
class Strip:
    """`size` along the cut axis lie from `local` on in a rank's tensor, from `whole` on in the whole one."""

    whole: int
    local: int
    size: int


def strips(cut: Cut, whole_size: int, rank: int, num_ranks: int) -> tuple[Strip, ...]:
    """What a rank has along the cut axis, whose size the number of ranks divides for each part."""
    part = whole_size // cut.num_parts
    size = part // num_ranks
    return tuple(Strip(i * part + rank * size, i * size, size) for i in range(cut.num_parts))


@dataclass(frozen=True, slots=True)
class Rank:
    """Of a file. `expert_tensor`: its rank among those that an expert is cut over."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, and the number of layers of each model chunk: `layers[stage][chunk]`.

    ConfigError when megatron-core has no such layout.
    """

    tensor: int
    expert: int
    expert_tensor: int
    layers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        problems = [f"{what} size ({size}) must be at least 1" for what, size in self._sizes() if size < 1]
        if not problems and self.tensor % self.expert_tensor:
            rule = f"expert-tensor size ({self.expert_tensor}) must divide tensor size ({self.tensor})"
            why = "the names of legacy files do not tell the parts of an expert otherwise"
            problems = [f"{rule}: {why}; choose one of {divisors(self.tensor)}"]
        if problems:
            raise ConfigError(problems)

    def _sizes(self) -> tuple[tuple[str, int], ...]:
        return (
            ("tensor", self.tensor),
            ("pipeline", self.pipeline),
            ("expert", self.expert),
            ("expert-tensor", self.expert_tensor),
        )

    @property
    def pipeline(self) -> int:
        return len(self.layers)

    @property
    def num_chunks(self) -> int:
        """Of a stage; above 1 with virtual pipeline stages."""
        return len(self.layers[0])

    @property
    def num_layers(self) -> int:
        return sum(map(sum, self.layers))

    def first_layer(self, stage: int, chunk: int) -> int:
        """Chunk 0 of all stages comes first, then chunk 1."""
        before = sum(sum(stage_layers[:chunk]) for stage_layers in self.layers)
        return before + sum(stage_layers[chunk] for stage_layers in self.layers[:stage])

    def place(self, layer: int) -> tuple[int, int]:
        """(stage, chunk) of a layer."""
        return _places(self.layers)[layer]

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """Those that have files of their own, in the order of their stages."""
        num_ranks = math.lcm(self.tensor, self.expert * self.expert_tensor)
        of_stage = sorted(
            {(i % self.tensor, (i // self.expert_tensor) % self.expert, i % self.expert_tensor) for i in range(num_ranks)}
        )
        return tuple(Rank(tensor, stage, expert, cut) for stage in range(self.pipeline) for tensor, expert, cut in of_stage)

    def folder(self, rank: Rank) -> str:
        """Of the rank's file."""
        return folder_name(rank.tensor, rank.pipeline if self.pipeline > 1 else None, rank.expert if self.expert > 1 else None)

    def __str__(self) -> str:
        sizes = f"TP {self.tensor}, PP {self.pipeline}" + (f", VPP {self.num_chunks}" if self.num_chunks > 1 else "")
        return sizes + (
            f", EP {self.expert}, ETP {self.expert_tensor}" if self.expert > 1 or self.expert_tensor != self.tensor else ""
        )


@lru_cache
def _places(layers: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (stage, chunk) for chunk in range(len(layers[0])) for stage in range(len(layers)) for _ in range(layers[stage][chunk])
    )


def folder_name(tensor: int, pipeline: int | None, expert: int | None) -> str:
    """As Megatron-LM's `get_checkpoint_name` has it."""
    return f"mp_rank_{tensor:02d}" + "".join(f"_{number:03d}" for number in (pipeline, expert) if number is not None)


def deal_layers(
    num_layers: int, num_stages: int, num_chunks: int, layers_per_stage: Sequence[int] | None
) -> tuple[tuple[int, ...], ...]:
    """The layers of every chunk of every stage, equal or as `layers_per_stage` says. ConfigError when they do not come out even."""
    if num_stages < 1 or num_chunks < 1:
        raise ConfigError([f"--pipeline ({num_stages}) and --virtual-pipeline ({num_chunks}) must be at least 1"])
    if num_chunks > 1 and num_stages == 1:
        raise ConfigError([f"--virtual-pipeline ({num_chunks}) needs --pipeline above 1; give both or leave it out"])
    if layers_per_stage is None:
        if num_layers % num_stages:
            rule = f"--pipeline ({num_stages}) must divide the {num_layers} layers"
            others = "or say how many layers each stage has with --layers-per-stage"
            raise ConfigError([f"{rule}; choose one of {divisors(num_layers)}, {others}"])
        layers_per_stage = [num_layers // num_stages] * num_stages
    given = ",".join(map(str, layers_per_stage))
    if len(layers_per_stage) != num_stages or sum(layers_per_stage) != num_layers or min(layers_per_stage) < 0:
        raise ConfigError(
            [f"--layers-per-stage ({given}) must be {num_stages} numbers with the sum {num_layers}; write one a pipeline stage"]
        )
    if any(count % num_chunks for count in layers_per_stage):
        sizes = divisors(math.gcd(*layers_per_stage))
        raise ConfigError(
            [f"--virtual-pipeline ({num_chunks}) must divide the layers of each stage ({given}); choose one of {sizes}"]
        )
    return tuple((count // num_chunks,) * num_chunks for count in layers_per_stage)


def divisors(number: int) -> list[int]:
    """In rising order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def layer_of(name: str) -> int | None:
    """The number of the layer in a name; None when the tensor belongs to no layer."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def expert_of(name: str) -> int | None:
    """The number of the expert in a whole model's name."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def whole_name(local_name: str, first_layer: int, first_expert: int) -> str:
    """The name in the whole model of what a rank calls `local_name`."""
    name = _LAYER.sub(lambda match: f"decoder.layers.{first_layer + int(match[1])}.", local_name)
    match = _LOCAL_EXPERT.search(name)
    if match is None:
        return name
    number, rest = (match["one"], match["rest"]) if match["one"] else (match["of"], f"{match['linear']}.{match['kind']}")
    return f"{name[: match.start()]}.mlp.experts.experts.{first_expert + int(number)}.{rest}"


def local_name(name: str, first_layer: int, first_expert: int, *, grouped_experts: bool) -> str:
    """The inverse of `whole_name`. `grouped_experts`: experts of a layer are one module, TransformerEngine's grouped linear."""
    name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) - first_layer}.", name)
    match = _EXPERT.search(name)
    if match is None:
        return name
    number, rest = int(match[1]) - first_expert, name[match.end() :]
    prefix = f"{name[: match.start()]}.mlp.experts"
    return f"{prefix}.{rest}{number}" if grouped_experts else f"{prefix}.local_experts.{number}.{rest}"


def is_grouped_expert(local: str) -> bool | None:
    """How experts are spelled in a name; None when it is no expert's."""
    match = _LOCAL_EXPERT.search(local)
    return None if match is None else match["one"] is None


def chunk_names(num_chunks: int) -> Iterator[str]:
    """The keys of a file's models."""
    yield from (["model"] if num_chunks == 1 else [f"model{chunk}" for chunk in range(num_chunks)])
