"""Imports without garbage collection."""

from __future__ import annotations

import gc

from dapo_megatron.launcher.imports import without_collection


def test_collection_pauses_and_comes_back():
    before = gc.get_freeze_count()
    with without_collection():
        assert not gc.isenabled()
        with without_collection():  # one that imports another
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > before
    gc.unfreeze()


def test_who_has_turned_collection_off_keeps_it_off():
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
