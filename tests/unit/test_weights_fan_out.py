"""A version to many servers: one that fails is left out and named, the others get all of it."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file

from dapo_megatron.types import ConfigError, EngineEndpoint, EngineLostError
from dapo_megatron.weights.transports.channel import StagedBucket, plain_entries
from dapo_megatron.weights.transports.disk import DiskChannel, VersionFolder
from dapo_megatron.weights.transports.distributed import DistributedChannels
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
    payload = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()])
    entries = plain_entries([(name, tuple(tensor.shape)) for name, tensor in tensors.items()], "float32")
    return StagedBucket(VERSION, index, is_last, entries, payload)


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
            self.wfile.write(self.server.text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths, server.answers = [], []
    server.text = b'{"success": false, "message": "a weight-update session is already open"}'
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


def test_path_of_a_gateway_stays_in_front(answering):
    answering.answers = [200]
    url = f"http://127.0.0.1:{answering.server_port}/engines/3"
    WeightServer(endpoint("engine 0", url), 5, 5).end()
    assert answering.paths == [("/engines/3/end_weight_update", "Bearer secret")]


def test_https_is_spoken_where_the_url_says_so(answering):
    """The server here does not understand it, so that the handshake fails."""
    with pytest.raises(EngineLostError, match="SSL"):
        WeightServer(endpoint("engine 0", f"https://127.0.0.1:{answering.server_port}"), 5, 5).end()


def test_answer_that_is_no_answer_of_sglang_is_a_refusal(answering):
    answering.answers, answering.text = [200], b"<html>please log in</html>"
    with pytest.raises(ServerRefusedError, match="engine 0 .*answered /end_weight_update with .*please log in.* no JSON"):
        client(answering).end()


@pytest.mark.parametrize("fails", ["folder", "file"])
def test_sender_that_cannot_write_its_files_does_not_blame_the_servers(tmp_path, monkeypatch, fails):
    directory = tmp_path / "versions"
    if fails == "folder":
        directory.write_text("a file")
        with pytest.raises(ConfigError, match="rollout.engine.weight_sync_dir .*versions. cannot be written"):
            VersionFolder(directory, VERSION)
        return
    folder = VersionFolder(directory, VERSION)
    folder.path.rmdir()  # what happens to a folder on a file system that is full or gone
    with ThreadPoolExecutor(3) as pool:
        channels = [DiskChannel(client_of(name), folder, VERSION) for name in ("engine 0", "engine 1")]
        fan_out = FanOut(channels, [], pool)
        fan_out.open()
        fan_out.start(bucket(0, True, a=torch.ones(2)))
        with pytest.raises(ConfigError, match="cannot be written"):
            fan_out.wait()
    assert fan_out.failures == {}


def client_of(name):
    return WeightServer(endpoint(name), 5, 5)


def test_server_that_came_back_is_met_anew():
    """A group with ranks that are gone would be taken for one with the new ones."""
    channels = DistributedChannels(5)
    first = channels.of(client_of("engine 0"))
    assert channels.of(client_of("engine 0")) is first and channels.of(client_of("engine 1")) is not first
    returned = WeightServer(replace(endpoint("engine 0"), life=1), 5, 5)
    assert channels.of(returned) is not first and channels.of(returned).endpoint.life == 1


def test_server_that_is_gone_is_named():
    with pytest.raises(EngineLostError, match="engine 0 .http://127.0.0.1:1. is gone: /end_weight_update"):
        WeightServer(endpoint("engine 0"), 5, 5).end()
