"""Storages that are emptied and filled again under the tensors that lie in them."""

import pytest
import torch

from dapo_megatron.actor import host_copy
from dapo_megatron.actor.host_copy import HostCopy, storages_of


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_copy, "PIECE_BYTES", 24)  # storages span several pieces, and share them


def test_views_see_their_bytes_again_and_nothing_is_held_meanwhile():
    whole = torch.arange(23, dtype=torch.float32)
    view, other = whole[5:9], torch.arange(7, dtype=torch.bfloat16)
    copy = HostCopy(torch.device("cpu"))
    for turn in range(3):
        storages = storages_of([whole, view, other, torch.empty(0)])
        copy.take(storages)
        assert copy.num_bytes == 23 * 4 + 7 * 2
        assert [tensor.untyped_storage().nbytes() for tensor in (whole, view, other)] == [0, 0, 0]
        copy.give_back()
        assert copy.num_bytes == 0
        assert torch.equal(whole, torch.arange(23.0) + turn) and torch.equal(other, torch.arange(7, dtype=torch.bfloat16))
        view += 0  # still the memory of `whole`
        assert view.data_ptr() == whole[5:].data_ptr()
        whole += 1


def test_what_is_taken_cannot_be_taken_twice():
    copy = HostCopy(torch.device("cpu"))
    copy.take(storages_of([torch.ones(3)]))
    with pytest.raises(AssertionError, match="not been given back"):
        copy.take(storages_of([torch.ones(3)]))
