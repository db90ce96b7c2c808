"""Simulated ranks: their shares add up to the tensors under every layout, and what is wrong is said with tensors and ranks."""

import numpy as np
import pytest
import torch

from dapo_megatron.types import MappingError
from dapo_megatron.weights.place_hash import PlaceHash
from dapo_megatron.weights.plan import compile_mapping
from dapo_megatron.weights.share_ledger import ShareLedger, share_table, shares_of
from tests.unit.weights_simulation import CONFIGS, LLAMA_TIED, QWEN2, identity_fill, simulate_ranks

CPU = torch.device("cpu")


class Simulated:
    """The ledger of a layout, and what its ranks and the assembler say."""

    def __init__(self, config, tp, pp=1, num_replicas=1):
        mapping, hf = compile_mapping(config), identity_fill(config)
        ranks = simulate_ranks(config, hf, tp, pp, vocab_multiple=8 * tp) * num_replicas
        hasher = PlaceHash(mapping.hf_tensors.values(), torch.float32, CPU)
        tables, self.by_rank = [], []
        for rank, pieces in enumerate(ranks):
            shares = shares_of(mapping, [piece.box for piece in pieces])
            tables.append(share_table(mapping, shares, [piece.owned and rank < tp * pp for piece in pieces]))
            data = [torch.from_numpy(piece.expected).float() for piece in pieces]
            parts = [[hasher.of(data[c.box_index][c.box_slices], c.hf_slices) for c in share.copies] for share in shares]
            self.by_rank.append(np.array([int(torch.stack(of_share).sum()) for of_share in parts]))
        self.names, self.tables = list(mapping.hf_tensors), tables
        self.ledger = ShareLedger(self.names, tables)
        whole = {
            name: (torch.from_numpy(tensor).float(), tuple(map(slice, (0,) * tensor.ndim, tensor.shape)))
            for name, tensor in hf.items()
        }
        self.gathered = np.array([int(hasher.of(*whole[name])) for name in self.names])

    def differences(self):
        return self.ledger.differences(self.gathered, self.by_rank)

    def place(self, rank, name, owned):
        """Of the share in the rank's own vector."""
        table = self.tables[rank]
        return np.flatnonzero((table.tensors == self.names.index(name)) & (table.owned == owned))[0]


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_shares_add_up_to_the_tensors_and_copies_are_equal(config, tp, pp, num_replicas):
    assert Simulated(config, tp, pp, num_replicas).differences() == []


def test_tensor_that_is_not_what_its_owners_hold_is_named_with_them():
    simulated = Simulated(QWEN2, tp=2, pp=2)
    simulated.gathered[simulated.names.index("model.layers.1.mlp.down_proj.weight")] += 1
    assert simulated.differences() == [
        "1 tensors were not gathered as their ranks hold them: model.layers.1.mlp.down_proj.weight (ranks 2, 3)"
    ]


@pytest.mark.parametrize(
    ("name", "layout", "owner", "copy"),
    [
        ("model.layers.1.input_layernorm.weight", (2, 1, 1), 0, 1),
        ("model.embed_tokens.weight", (2, 2, 1), 1, 3),
        ("model.layers.0.self_attn.k_proj.weight", (2, 2, 2), 1, 5),
    ],
    ids=["norm", "tied_embedding", "data_parallel"],
)
def test_copy_that_has_gone_its_own_way_is_named_with_its_owner(name, layout, owner, copy):
    simulated = Simulated(LLAMA_TIED, *layout)
    simulated.by_rank[copy][simulated.place(copy, name, owned=False)] ^= 1
    (sentence,) = simulated.differences()
    assert sentence.startswith(
        f"1 tensors differ between ranks that hold copies of them: {name} (ranks {owner}, {copy}) (rollout.comp"
    )


def test_owner_that_has_gone_its_own_way_before_it_was_gathered_is_named_too():
    simulated = Simulated(LLAMA_TIED, tp=1, num_replicas=3)
    number = simulated.names.index("model.norm.weight")
    simulated.by_rank[0][simulated.place(0, "model.norm.weight", owned=True)] += 5
    simulated.gathered[number] += 5
    (sentence,) = simulated.differences()
    assert sentence.startswith(
        "1 tensors differ between ranks that hold copies of them: model.norm.weight (ranks 0, 1, 2) (rollout."
    )


def test_long_lists_are_cut():
    simulated = Simulated(LLAMA_TIED, tp=1)
    simulated.gathered += 1
    (sentence,) = simulated.differences()
    assert sentence.startswith(f"{len(simulated.names)} tensors were") and sentence.endswith("(rank 0), ...")
    assert sentence.count("(rank 0)") == 3


def test_copy_of_what_nobody_owns_is_refused():
    simulated = Simulated(LLAMA_TIED, tp=2)
    owner, copy = simulated.tables
    owner.areas[simulated.place(0, "model.norm.weight", owned=True)] += np.uint64(1)
    with pytest.raises(MappingError, match=r"model\.norm\.weight: rank 1 holds a copy of elements that no rank owns"):
        ShareLedger(simulated.names, [owner, copy])
