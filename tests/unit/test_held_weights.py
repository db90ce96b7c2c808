"""What the actor brings to a server that comes back between two updates, and what it refuses."""

import asyncio

import pytest

from dapo_megatron.launcher.held_weights import HeldWeights
from dapo_megatron.types import EngineEndpoint, EngineError, EngineLostError, VersionGoneError
from dapo_megatron.weights.transports.records import PushReport

ENGINE = EngineEndpoint("engine 0", "http://127.0.0.1:1", 1, "cpu")


class Pushes:
    """A fake of the actor's push: notes what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[str]]] = []
        self.failures: dict[str, str] = {}
        self.held = HeldWeights(self)

    async def __call__(self, version, endpoints):
        self.held.are(version)
        await asyncio.sleep(0)
        self.sent.append((version, [endpoint.name for endpoint in endpoints]))
        return PushReport(version, 1, 1.0, 0.0, 1.0, self.failures)


async def test_version_that_was_sent_can_be_sent_again_until_training_begins():
    actor = Pushes()
    await actor(3, [])
    await actor.held.resync(ENGINE, 3)
    assert actor.sent[1:] == [(3, ["engine 0"])]
    with actor.held.while_training(3), pytest.raises(VersionGoneError, match="weight version 3"):
        await actor.held.resync(ENGINE, 3)
    with pytest.raises(VersionGoneError):
        await actor.held.resync(ENGINE, 3)
    await actor.held.resync(ENGINE, 4)


async def test_newest_version_is_the_one_that_training_leaves():
    actor = Pushes()
    await actor(3, [])
    with actor.held.while_training(3):
        renewing = asyncio.ensure_future(actor.held.renew(ENGINE))
        await asyncio.sleep(0.01)
        assert not renewing.done() and len(actor.sent) == 1
    assert await renewing == 4 and actor.sent[1:] == [(4, ["engine 0"])]


async def test_an_engine_that_returns_while_the_actor_has_the_devices_waits_for_room():
    actor = Pushes()
    await actor(3, [])
    actor.held.keep_back()  # also for a save alone
    with pytest.raises(VersionGoneError):
        await actor.held.resync(ENGINE, 3)
    with actor.held.while_training(3):
        renewing = asyncio.ensure_future(actor.held.renew(ENGINE))
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    assert not renewing.done() and len(actor.sent) == 1
    actor.held.let_go()
    assert await renewing == 4 and actor.sent[1:] == [(4, ["engine 0"])]


async def test_training_that_fails_leaves_nothing_to_wait_for():
    actor = Pushes()
    actor.held.keep_back()
    with pytest.raises(ZeroDivisionError), actor.held.while_training(3):
        renewing = asyncio.ensure_future(actor.held.renew(ENGINE))
        await asyncio.sleep(0.01)
        _ = 1 / 0
    with pytest.raises(EngineError, match="holds none any more"):
        await renewing


async def test_training_that_begins_while_a_version_is_sent_makes_it_old():
    actor = Pushes()
    sending = asyncio.ensure_future(actor(3, []))
    await asyncio.sleep(0)
    with actor.held.while_training(3):
        await sending
        with pytest.raises(VersionGoneError):
            await actor.held.resync(ENGINE, 3)


async def test_server_that_fails_is_named_and_an_actor_that_failed_has_nothing_to_send():
    actor = Pushes()
    await actor(3, [])
    actor.failures = {"engine 0": "connection reset"}
    with pytest.raises(EngineLostError, match="connection reset"):
        await actor.held.resync(ENGINE, 3)
    with pytest.raises(RuntimeError), actor.held.while_training(3):
        raise RuntimeError("rank 0 died")
    with pytest.raises(EngineError, match="the actor holds none any more"):
        await actor.held.renew(ENGINE)
