"""The names of SGLang's ServerArgs: what `rollout.sglang_extra` is checked against. The one place that imports sglang."""

from __future__ import annotations

import importlib.util


def sglang_is_installed() -> bool:
    """Without importing it, which takes 20 seconds of CPU."""
    return importlib.util.find_spec("sglang") is not None


def server_argument_names() -> frozenset[str]:
    """Fields of `sglang.srt.server_args.ServerArgs`."""
    import msgspec
    from sglang.srt.server_args import ServerArgs

    return frozenset(field.name for field in msgspec.structs.fields(ServerArgs))
