"""A version to many servers: one that fails is left out and named, the others get all of it."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file

from dapo_megatron.types import EngineEndpoint, EngineLostError
from dapo_megatron.weights.sync import BucketPiece, BucketPlan
from dapo_megatron.weights.transports.channel import StagedBucket
from dapo_megatron.weights.transports.disk import VersionFolder
from dapo_megatron.weights.transports.fan_out import FanOut
from dapo_megatron.weights.transports.server import ServerRefusedError, WeightServer

VERSION = 4


def endpoint(name, url="http://127.0.0.1:1"):
    return EngineEndpoint(name=name, url=url, tensor_parallel_size=1, device="cpu", api_key="secret")


class RecordingChannel:
    def __init__(self, name, fails_at=None):
        self.endpoint, self.fails_at, self.calls = endpoint(name), fails_at, []

    def _call(self, what):
        self.calls.append(what)
        if what == self.fails_at:
            raise EngineLostError(f"{self.endpoint.name} is gone", self.endpoint.name)

    def open(self):
        self._call("open")

    def send(self, bucket):
        self._call((bucket.index, bucket.version_if_last))

    def close(self):
        self._call("close")

    def abandon(self):
        self.calls.append("abandon")


class RecordingHashes:
    def __init__(self):
        self.names = []

    def add(self, name, tensor):
        self.names.append((name, tensor.sum().item()))


def bucket(index, is_last, **tensors):
    """A staged bucket of float32 tensors."""
    pieces, start = [], 0
    for name, tensor in tensors.items():
        pieces.append(BucketPiece(name, 0, tensor.shape[0], start, tensor.nbytes))
        start += tensor.nbytes
    payload = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()])
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return StagedBucket(VERSION, index, is_last, "float32", BucketPlan(tuple(pieces), start, {}), shapes, payload)


def send_two_buckets(*channels):
    hashes = RecordingHashes()
    with ThreadPoolExecutor(len(channels) + 1) as pool:
        fan_out = FanOut(channels, [hashes], pool)
        fan_out.open()
        fan_out.start(bucket(0, False, a=torch.ones(2, 3)))
        fan_out.wait()
        fan_out.start(bucket(1, True, b=torch.full((4,), 2.0), c=torch.zeros(1)))
        fan_out.close()
    return fan_out, hashes


def test_every_server_gets_all_buckets_in_order_and_the_last_names_the_version():
    channels = [RecordingChannel("engine 0"), RecordingChannel("engine 1")]
    fan_out, hashes = send_two_buckets(*channels)
    assert [channel.calls for channel in channels] == [["open", (0, None), (1, VERSION), "close"]] * 2
    assert hashes.names == [("a", 6.0), ("b", 8.0), ("c", 0.0)]
    assert fan_out.failures == {}


@pytest.mark.parametrize("moment", ["open", (0, None), (1, VERSION), "close"], ids=str)
def test_server_that_fails_is_left_alone_and_the_others_get_the_version(moment):
    good, bad = RecordingChannel("engine 0"), RecordingChannel("engine 1", fails_at=moment)
    fan_out, hashes = send_two_buckets(good, bad)
    assert good.calls == ["open", (0, None), (1, VERSION), "close"]
    assert bad.calls[-2:] == [moment, "abandon"]
    assert fan_out.failures == {"engine 1": "engine 1 is gone"}
    assert [channel.endpoint.name for channel in fan_out.alive] == ["engine 0"]
    assert len(hashes.names) == 3


def test_files_of_a_version_hold_its_tensors_and_are_written_once(tmp_path):
    folder = VersionFolder(tmp_path, VERSION)
    for _ in range(2):  # two servers
        folder.write(bucket(0, False, a=torch.arange(6.0).view(2, 3)))
    folder.write(bucket(1, True, b=torch.ones(4)))
    files = sorted(folder.path.iterdir())
    assert math.prod(load_file(files[0])["a"].shape) == 6 and torch.equal(load_file(files[1])["b"], torch.ones(4))
    assert len(files) == 2
    folder.remove()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def answering():
    """A server that answers 200 to the calls in `accepted`, else 400; it keeps the paths that were asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.server.paths.append((self.path, self.headers["Authorization"]))
            status = self.server.answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"success": false, "message": "a weight-update session is already open"}')

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths, server.answers = [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client(server):
    return WeightServer(endpoint("engine 0", f"http://127.0.0.1:{server.server_port}"), 5, 5)


def test_update_that_a_sender_left_open_is_ended_first(answering):
    answering.answers = [400, 200, 200]
    client(answering).begin()
    paths = ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]
    assert answering.paths == [(path, "Bearer secret") for path in paths]


def test_refusal_is_told_with_the_words_of_the_server(answering):
    answering.answers = [400]
    with pytest.raises(ServerRefusedError, match="engine 0 .*refused /end_weight_update with status 400.*already open"):
        client(answering).end()


def test_server_that_is_gone_is_named():
    with pytest.raises(EngineLostError, match="engine 0 .http://127.0.0.1:1. is gone: /end_weight_update"):
        WeightServer(endpoint("engine 0"), 5, 5).end()
