"""The fallback broker, for demos only: amqtt in a process of its own, ``-m broker_server.amqtt_broker HOST PORT``.

amqtt 0.12 speaks MQTT 3.1.1, has no limits on payloads or queues and no permissions that know a client's name; it is
here so that a demo runs where no mosquitto is installed.
"""

import asyncio
import logging
import signal
import sys

from amqtt.broker import Broker


async def serve(host: str, port: int) -> None:
    """Serve anonymous clients on ``host:port`` until SIGTERM."""
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}", "max_connections": 0}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await broker.start()
    await stopped.wait()
    await broker.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
