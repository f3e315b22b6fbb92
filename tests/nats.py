"""NATS servers on loopback that speak MQTT, one alone or a cluster of them, each to be killed by a test."""

import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.errors import TransportError

PROGRAM = shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/usr/local/sbin")
needs_nats = pytest.mark.skipif(PROGRAM is None, reason="needs the Debian package nats-server")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Node:
    """One server of a cluster of ``nodes``."""

    def __init__(self, folder: Path, number: int, nodes: int, ports: list[list[int]]) -> None:
        client, self.mqtt, route = ports[number]
        folder.mkdir(parents=True)
        routes = ", ".join(f'"nats://127.0.0.1:{other[2]}"' for other in ports)
        cluster = f'cluster {{ name: fedge, listen: "127.0.0.1:{route}", routes: [ {routes} ] }}' if nodes > 1 else ""
        (folder / "nats.conf").write_text(f"""
            server_name: n{number}
            listen: "127.0.0.1:{client}"
            jetstream {{ store_dir: "{folder / "store"}", max_mem: 64MB, max_file: 256MB }}
            mqtt {{ listen: "127.0.0.1:{self.mqtt}", stream_replicas: {nodes}, consumer_memory_storage: true }}
            {cluster}
            """)
        self.log = folder / "nats.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([PROGRAM, "-c", folder / "nats.conf"], stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


@contextmanager
def nats(folder: Path, nodes: int = 1):
    """Servers that answer to MQTT; they end with the context."""
    flat = free_ports(3 * nodes)
    ports = [flat[3 * number : 3 * number + 3] for number in range(nodes)]
    running = [Node(folder / f"n{number}", number, nodes, ports) for number in range(nodes)]
    try:
        for node in running:
            answers(node)
        yield running
    finally:
        for node in running:
            node.kill()


def answers(node: Node, seconds: float = 30.0) -> None:
    """Wait until a message that a node takes is delivered: JetStream has found its leaders then."""
    deadline, address = time.monotonic() + seconds, Address("127.0.0.1", node.mqtt)
    while time.monotonic() < deadline and node.process.poll() is None:
        with suppress(TransportError), Peer(address, f"ready{node.mqtt}") as peer:
            if peer.subscribe(["ready"]) == [True] and peer.publish("ready", b"yes") is not None:
                return
        time.sleep(0.1)
    raise AssertionError(node.log.read_text()[-2000:])


class Balancer:
    """One address for a cluster: a connection goes to the first node that takes it, and ends with it."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near:
            for port in self._ports:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as far:
                    back = threading.Thread(target=_pump, args=(far, near), daemon=True)
                    back.start()
                    _pump(near, far)
                    back.join()
                    return

    def close(self) -> None:
        self._listener.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := source.recv(65536):
            target.sendall(data)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
