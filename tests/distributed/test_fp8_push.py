"""An FP8 model: real ranks train it in bf16, and what they push is what a server of that model wants, proven by value.

No server on a CPU serves such a model (SGLang 0.5.23 needs AMX for it), so the endpoint here has SGLang's calls, maps the memory it is told of
and reports hashes as SGLang does: of weights times scales, in bf16, as its ranks stack them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.types import EngineEndpoint, FingerprintError
from dapo_megatron.weights.codecs import quantise, scale_name
from dapo_megatron.weights.engine_layout import engine_layout
from dapo_megatron.weights.hf_files import HfFiles
from dapo_megatron.weights.plan import compile_mapping
from tests.distributed import programs
from tests.distributed.ranks import run_ranks
from tests.tiny_models import make_hf_model

BLOCK = (16, 16)
MISPLACED = "model.layers.11.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Projections in FP8, but for one that the config leaves as it is."""
    folder = make_hf_model(tmp_path_factory.mktemp("fp8") / "model", "qwen3", num_hidden_layers=12, intermediate_size=512)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight") and "layers.1.self_attn.o_proj" not in name:
            tensors[name], tensors[scale_name(name)] = quantise(tensor, BLOCK)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Endpoint(ThreadingHTTPServer):
    """A server of `model` on one rank."""

    def __init__(self, model: Path):
        self.config = json.loads((model / "config.json").read_text())
        self.tensors: dict[str, torch.Tensor] = {}
        self.spoils, self.version = "", None
        super().__init__(("127.0.0.1", 0), _Handler)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.version = body.get("weight_version", self.version)
        if path == "/update_weights_from_tensor":
            (payload,) = body["serialized_named_tensors"]
            bucket = pickle.loads(base64.b64decode(payload))
            flat = bucket["flattened_tensor"]
            for record in bucket["metadata"]:
                part = flat[record.start_idx : record.end_idx].view(record.dtype).reshape(record.shape)
                self.tensors[record.name] = part.clone()
        if path == "/weights_checker":
            if self.spoils:
                self.tensors[self.spoils].view(torch.uint8)[0, 2] ^= 1  # of a scale, a bit that bf16 shows
            return {"ranks": [{"checksums": self.hashes(), "parallelism_info": [{"tp_rank": 0}]}]}
        return {}

    def hashes(self) -> dict[str, str]:
        (of_rank,) = engine_layout(compile_mapping(self.config), self.config, 1, "cpu")
        found = {}
        for tensor in of_rank:
            running = hashlib.sha256()
            for part in tensor.parts:
                running.update(memoryview(self.weight(part.hf_name)[part.slices].contiguous().view(torch.uint8).numpy()))
            running.update(bytes(2 * tensor.num_zeros))
            found[tensor.name] = running.hexdigest()[:16]
        return found

    def weight(self, name: str) -> torch.Tensor:
        """As SGLang multiplies it out."""
        tensor = self.tensors[name]
        if scale_name(name) not in self.tensors:
            return tensor
        scales = self.tensors[scale_name(name)].repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        return (tensor.float() * scales[: tensor.shape[0], : tensor.shape[1]]).bfloat16()


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(model: Path) -> Iterator[Endpoint]:
    server = Endpoint(model)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(rank: int, init_method: str, config: Any, target: EngineEndpoint) -> Any:
    """What the pusher of a run says; its refusal as text."""
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    try:
        return worker.push_weights(1, [target], "127.0.0.1")
    except FingerprintError as error:
        return str(error)
    finally:
        left = [name for name in os.listdir("/dev/shm") if name.startswith(f"torch_{os.getpid()}_")]
        assert left == [], "between two versions no shared memory has a name"


def push_misplaced(rank: int, init_method: str, config: Any, target: EngineEndpoint) -> Any:
    """As `push`, by a sender that exchanges the first two elements of MISPLACED."""
    from dapo_megatron.actor import weight_pusher

    class Misplacing(weight_pusher.WeightSender):
        def gather(self, plan: Any, payload: torch.Tensor) -> bool:
            is_assembler = super().gather(plan, payload)
            for piece in plan.pieces if is_assembler else ():
                if piece.name == MISPLACED:
                    elements = payload[piece.byte_offset :].view(torch.bfloat16)
                    elements[:2] = elements[:2].flip(0)
            return is_assembler

    weight_pusher.WeightSender = Misplacing  # type: ignore[misc] # in this process of its own
    return push(rank, init_method, config, target)


def pushed(model: Path, endpoint: Endpoint, num_ranks: int, program: Any = push) -> Any:
    config = programs.make_config(model, "bf16", tensor_parallel_size=num_ranks, offload=True)
    engine = {"type": "sglang", "dtype": "bf16", "weight_transport": "tensor"}
    rollout = type(config.rollout).model_validate({"engine": engine, "weight_bucket_mib": 1})
    target = EngineEndpoint("engine 0", f"http://127.0.0.1:{endpoint.server_port}", 1, "cpu")
    return run_ranks(program, num_ranks, config.model_copy(update={"rollout": rollout}), target)[0]


def test_what_is_pushed_is_the_policy_as_the_codec_writes_it(model: Path, endpoint: Endpoint):
    report = pushed(model, endpoint, 2)
    assert report.failures == {} and endpoint.version == "1"
    files = HfFiles(model)
    assert set(endpoint.tensors) == set(files.tensors), "the same tensors as in the model's own files"
    for name in compile_mapping(endpoint.config).hf_tensors:
        trained = files.read(name)  # bf16, what the ranks have loaded
        if scale_name(name) in files.tensors:
            weight, scales = quantise(trained, BLOCK)
            assert torch.equal(endpoint.tensors[name].view(torch.uint8), weight.view(torch.uint8)), name
            assert torch.equal(endpoint.tensors[scale_name(name)], scales), name
        else:
            assert torch.equal(endpoint.tensors[name], trained), name
    assert report.num_bytes == sum(tensor.nbytes for tensor in endpoint.tensors.values())


@pytest.mark.parametrize("kind", ["", "_scale_inv"], ids=["weight", "scale"])
def test_one_wrong_bit_of_a_weight_or_of_a_scale_is_found(model: Path, endpoint: Endpoint, kind: str):
    endpoint.spoils = f"model.layers.2.mlp.down_proj.weight{kind}"
    said = pushed(model, endpoint, 1)
    assert "tensors of rank 0 differ from what was sent: model.layers.2.mlp.down_proj.weight" in said


def test_version_that_was_not_gathered_right_is_named_and_its_number_never_leaves(model: Path, endpoint: Endpoint):
    said = pushed(model, endpoint, 2, push_misplaced)
    assert said.startswith(
        f"weights of version 1 are not one model: 1 tensors were not gathered as their ranks hold them: {MISPLACED} (ranks 0, 1)"
    )
    assert endpoint.tensors and endpoint.version is None
