"""Who is muted is told to the broker: each change, its end, and what cannot be told."""

import asyncio
import contextlib

from broker_server.hush import Hush
from edge_client.errors import ConfigError


class Broker:
    """Keeps what it is told, and lets a test wait for it."""

    def __init__(self, fail: int = 0) -> None:
        self.told: list[tuple[str, ...]] = []
        self.fail, self.lines = fail, []
        self.hush = Hush(self._tell, self.lines.append)
        self.loop, self.coming = asyncio.get_running_loop(), asyncio.Queue()

    def _tell(self, muted):
        self.told.append(muted)
        self.loop.call_soon_threadsafe(self.coming.put_nowait, muted)
        if len(self.told) == self.fail:
            raise ConfigError("the disk is full")

    @contextlib.asynccontextmanager
    async def running(self):
        life = asyncio.ensure_future(self.hush.run())
        yield
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)

    async def hears(self, *told):
        async with asyncio.timeout(20):
            for muted in told:
                assert await self.coming.get() == muted


def test_a_client_is_muted_and_heard_again_when_its_time_is_over():
    async def play():
        broker = Broker()
        async with broker.running():
            await broker.hears(())
            broker.hush.mute("a", 0.05)
            await broker.hears(("a",), ())

    asyncio.run(play())


def test_all_who_are_muted_are_told_together():
    async def play():
        broker = Broker()
        async with broker.running():
            await broker.hears(())
            broker.hush.mute("b", 60.0)
            broker.hush.mute("a", 60.0)
            await broker.hears(("a", "b"))

    asyncio.run(play())


def test_a_name_that_belongs_to_another_key_is_heard_again():
    async def play():
        broker = Broker()
        async with broker.running():
            await broker.hears(())
            broker.hush.mute("a", 60.0)
            broker.hush.mute("b", 60.0)
            await broker.hears(("a", "b"))
            broker.hush.lift(("a", "c"))
            await broker.hears(("b",))

    asyncio.run(play())


def test_what_cannot_be_told_is_said_and_the_next_is_told():
    async def play():
        broker = Broker(fail=2)
        async with broker.running():
            await broker.hears(())
            broker.hush.mute("a", 60.0)
            await broker.hears(("a",))
            broker.hush.mute("b", 60.0)
            await broker.hears(("a", "b"))
        assert broker.lines == ["the broker cannot be told who is not listened to: the disk is full"]

    asyncio.run(play())
