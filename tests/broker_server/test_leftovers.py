"""What a killed server leaves on a broker that lives on: its ledger knows all of it, and its next life clears it."""

import pytest

from edge_client.doctor.peer import Peer
from tests.edge_client.doctor.test_broker import PLAIN, mosquitto, needs_mosquitto
from tests.test_end_to_end import federation

OFFER = "fedge/toys/pub/offer"


def kept(address):
    """All topics that something is retained on."""
    with Peer(address, "look") as peer:
        peer.subscribe(["fedge/+/pub/#"])
        return {message.topic for message in peer.take(10_000, 0.5) if message.payload}


@needs_mosquitto
@pytest.mark.timeout(120)
def test_chunks_are_in_the_ledger_before_they_are_on_the_broker_and_are_cleared_after_kills(tmp_path):
    with (
        mosquitto(tmp_path / "broker", f"{PLAIN}max_queued_messages 100000\n") as address,
        federation(tmp_path / "run", f'url = "{address}"', rounds=4) as run,
    ):
        run.port = address.port
        run.url = f"{address}/toys"
        run.file.write_text(run.file.read_text().replace("spread = 0.0", "spread = 0.0\nchunk = 1024\ninline = 0"))
        with Peer(address, "count") as ear:
            ear.subscribe(["fedge/toys/pub/#"])
            ear.take(1, 0.0)
            clients, left = [], set()
            # After so many messages, of which a life starts with those that clear what the one before has left.
            for messages in (1, 4, 15, 20):
                server = run.serve()
                assert len(ear.take(messages, 20.0)) == messages, server.lines
                server.kill()
                found = kept(address)
                with run.ledger() as ledger:
                    assert found - {OFFER} <= set(ledger.retained())
                left |= found
                ear.wait(lambda: False, 0.2)
                ear.heard.clear()
                if not clients:
                    clients = [run.join("c1"), run.join("c2"), run.join("c3")]
        assert len(left) > 3
        server = run.serve()
        assert server.ends() == 0, server.lines
        for client in clients:
            assert client.ends() == 0, client.lines
        assert kept(address) == {OFFER}
        with run.ledger() as ledger:
            assert [(done.round, done.clients, done.samples) for done in ledger.rounds()] == [
                (number, 3, 120) for number in range(1, 5)
            ]
