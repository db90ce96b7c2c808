"""Lets unmodified megatron-core 0.19.2 run on a machine without CUDA, over gloo. Off wherever CUDA exists. See UPSTREAM.md.

megatron-core names the device "cuda" in literals and calls torch.cuda directly. `install` adds an import hook that compiles
`megatron.*` from a syntax tree in which those names mean the CPU. Neither torch nor the files of megatron-core are changed,
and nothing is slower at run time. What the tree rewriting does:

    "cuda", f"cuda:{i}"           -> "cpu"
    "torch.cuda.FloatTensor"      -> "torch.FloatTensor"
    torch.cuda                    -> CpuDevice below
    x.cuda(...), x.is_cuda        -> x.cpu(), x.is_cpu
    f(..., pin_memory=...)        -> f(...)
    torch.compile                 -> uncompiled below: importing its compilers takes seconds, and compiling needs a C++ compiler
    x.record_stream(...)          -> None
    import flashinfer, ...        -> ImportError: packages of GPU kernels, which come with SGLang, take two thirds of a rank's start to
                                     import, and flash_mla raises OSError without a CUDA driver

Besides, the places that look for apex's or TransformerEngine's FusedAdam find CpuAdam.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import logging
import marshal
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Self

import torch
import xxhash

from dapo_megatron.actor.cpu_adam import CpuAdam

_DEVICE_NAME, _UNCOMPILED_NAME = "__cpu_device__", "__uncompiled__"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dapo_megatron" / "cpu_adapter"
"""Rewritten bytecode: compiling all of megatron-core takes seconds, in every rank."""
_GPU_KERNELS = ("flash_attn", "flash_attn_3", "flash_mla", "flashinfer")
_REWRITING = sys.version.encode() + Path(__file__).read_bytes()
"""What the bytecode depends on besides its source."""


class _NoStream:
    """A stream or event of a device that has none: every method returns the object itself."""

    def __init__(self, *_: object, **__: object):
        pass

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class CpuDevice:
    """What `torch.cuda` is inside megatron-core; names not listed here are the real torch.cuda's."""

    Stream = Event = _NoStream
    default_generators = (torch.default_generator,)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_stream(*_: object) -> _NoStream:
        return _NoStream()

    @staticmethod
    def stream(_: object) -> nullcontext:
        return nullcontext()

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return False

    @staticmethod
    def synchronize(*_: object) -> None:
        pass

    empty_cache = set_device = synchronize

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: object, **__: object) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: object, **__: object) -> None:
        torch.set_rng_state(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def uncompiled[F: Callable](function: F | None = None, **_: object) -> F | Callable[[F], F]:
    """As the decorator `torch.compile`, with or without arguments: the function as it is."""
    return function if function is not None else lambda decorated: decorated


class _ToCpu(ast.NodeTransformer):
    """The rewriting listed in the module's docstring."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if node.value == "cuda":
            node.value = "cpu"
        elif isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            node.value = node.value.replace("torch.cuda.", "torch.")
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant) and first.value == "cuda:":
            return ast.copy_location(ast.Constant("cpu"), node)
        for value in node.values:  # the literal parts of messages keep their text
            if isinstance(value, ast.FormattedValue):
                self.generic_visit(value)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if node.attr == "is_cuda":
            node.attr = "is_cpu"
        elif isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in ("cuda", "compile"):
            return ast.copy_location(ast.Name(_DEVICE_NAME if node.attr == "cuda" else _UNCOMPILED_NAME, node.ctx), node)
        return node

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        return _absent_if_for_gpus(node, node.names[0].name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        return node if node.level else _absent_if_for_gpus(node, node.module or "")

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "record_stream":
            return ast.copy_location(ast.Constant(None), node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr, node.args, node.keywords = "cpu", [], []
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "pin_memory"]
        return node


def _absent_if_for_gpus(node: ast.stmt, module: str) -> ast.stmt:
    package = module.split(".")[0]
    if package not in _GPU_KERNELS:
        return node
    absent = ast.Call(ast.Name("ImportError", ast.Load()), [ast.Constant(f"{package} needs CUDA")], [])
    return ast.copy_location(ast.Raise(absent), node)


class _CpuLoader(importlib.machinery.SourceFileLoader):
    """Compiles a megatron module from its rewritten tree; its bytecode goes to a cache of our own, never beside the source."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        cached = _CACHE / f"{xxhash.xxh3_64_hexdigest(_REWRITING + path.encode() + source)}.bin"
        if cached.is_file():
            return marshal.loads(cached.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.fix_missing_locations(_ToCpu().visit(ast.parse(source, path)))
            code = compile(tree, path, "exec", dont_inherit=True)
        with suppress(OSError):  # a cache that cannot be written costs time only
            _CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=_CACHE, delete=False) as file:
                file.write(marshal.dumps(code))
            os.replace(file.name, cached)
        return code

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update({_DEVICE_NAME: CpuDevice(), _UNCOMPILED_NAME: uncompiled})
        super().exec_module(module)
        if module.__name__ == "megatron.core.tensor_parallel.random":
            # These two go through torch's lazy CUDA queue, which never runs without a device.
            module._get_cuda_rng_state = CpuDevice.get_rng_state  # type: ignore[attr-defined]
            module._set_cuda_rng_state = CpuDevice.set_rng_state  # type: ignore[attr-defined]
        elif module.__name__ == "megatron.core.optimizer":
            vars(module).update(Adam=CpuAdam, USING_PYTORCH_OPTIMIZER=False)
        elif module.__name__ == "megatron.core.optimizer.distrib_optimizer":
            vars(module).update(Adam=CpuAdam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)


class _CpuFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _CpuLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Make later imports of megatron run on the CPU; nothing where CUDA exists or when installed already.

    Raises RuntimeError when megatron.core was imported before: those modules would still want CUDA.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _CpuFinder) for finder in sys.meta_path):
        return
    if any(name.startswith("megatron.core") for name in sys.modules):
        raise RuntimeError("cpu_adapter.install() must run before the first import of megatron.core")
    sys.meta_path.insert(0, _CpuFinder())
    _silence()


def _silence() -> None:
    """megatron-core's advice about GPUs and optional packages, which cannot apply here."""
    for category in (UserWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"megatron\.core(\.|$)")
    warnings.filterwarnings("ignore", r".*torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)", FutureWarning)
    for name in (
        "torch.utils.cpp_extension",
        "megatron.core.distributed.distributed_data_parallel",
        "megatron.core.tensor_parallel.random",
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.dist_checkpointing.strategies.torch",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
