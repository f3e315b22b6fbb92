"""A federation on three NATS servers, one of which is killed in the middle of a round."""

import os

import pytest

from tests.nats import Balancer, nats, needs_nats
from tests.test_end_to_end import federation, invitation, recorded


@needs_nats
@pytest.mark.timeout(300)
def test_a_node_that_is_killed_in_the_middle_of_a_round_costs_nothing(tmp_path):
    with nats(tmp_path / "nats", nodes=3) as nodes:
        # The server and one client are on the node that dies, the others on the two that live.
        ports = [node.mqtt for node in nodes]
        balancers = [Balancer(ports[first:] + ports[:first]) for first in range(3)]
        with federation(tmp_path / "run", f'url = "mqtt://127.0.0.1:{balancers[0].port}"') as run:
            os.mkfifo(run.gate)
            server = run.serve()
            server.says("broker: ")
            run.port = balancers[1].port
            spy = run.spy()
            clients = []
            for name, balancer in zip(("c1", "c2", "c3"), balancers, strict=True):
                run.url = f"mqtt://127.0.0.1:{balancer.port}/toys"
                clients.append(run.join(name, held=name == "c3"))
            spy.hears(recorded("c1"), recorded("c2"), invitation("c3"))
            nodes[0].kill()
            server.says("trying again")
            run.open_gate()
            # A cluster of three that has lost one answers requests slowly, some not at all.
            assert server.ends(180) == 0, server.lines
            for client in clients:
                assert client.ends() == 0, client.lines
            with run.ledger() as ledger:
                assert [(one.round, one.clients, one.samples) for one in ledger.rounds()] == [(1, 3, 120), (2, 3, 120)]
                epoch = int(ledger.get("epoch") or 0)
                tasks = [number for number in range(1, 9) if ledger.recorded(epoch, number)]
                assert [sorted(ledger.recorded(epoch, number)) for number in tasks] == [["c1", "c2", "c3"]] * 2
                assert ledger.open_tasks() == []
        for balancer in balancers:
            balancer.close()
