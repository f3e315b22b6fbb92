"""Rounds of a few clients with a mean for a server: the worker's side is real, and nothing is rounded on the way."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edge_client import events as e
from edge_client.bundle import Bundle, with_manifest
from edge_client.codec.model import Model, encode_model_delta, untrained
from edge_client.codec.update import decode_scalars, decode_update
from edge_client.codec.versions import RawState
from edge_client.data import ArraySource
from edge_client.manifest import update_layouts, with_personal
from edge_client.store import FileCopies, Store
from edge_client.trainer import Trainer, _epoch_seed
from edge_client.wire import messages as m
from edge_client.worker import Worker
from export.bundle import export_bundle
from tests.toy import toy_data

FEATURES, CLASSES = 6, 3
HYPERS = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, "mu": 0.0}


class Net(nn.Module):
    """A body, batch normalisation and a head."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.body(x))))


def exported(path, module=None, **options):
    """The bytes of a bundle of `Net`, with momentum and a proximal term."""
    torch.manual_seed(3)
    options = {"optimizer": "momentum", "proximal": True} | options
    export_bundle(module or Net(), path, name="net", inputs=[((FEATURES,), "float32")], **options)
    return path.read_bytes()


def personal(data, *patterns):
    """The bundle with these layers personal."""
    return with_manifest(data, lambda manifest: with_personal(manifest, patterns))


def plan(*, rounds_epochs=2, batch_size=8, hypers=HYPERS, own=None, **fields):
    """A plan whose clients also learn something for themselves."""
    return m.TrainPlan(rounds_epochs, 0, batch_size, hypers, personal=m.PersonalPlan(**fields, hypers=own or {}))


class Rounds:
    """A few clients in a folder, and the model that they share."""

    def __init__(self, folder, data, sources, shelf=None):
        self.bundle = Bundle.from_bytes(data)
        self.trainer = Trainer(self.bundle)
        self.model, self.version = untrained(self.bundle.layout, self.bundle.initial_buffers()), 0
        self.workers = []
        for number, source in enumerate(sources):
            store = Store(folder / str(number), durable=False)
            store.install(bytes.fromhex(self.bundle.digest), data)
            copies = FileCopies(folder / str(number))
            self.workers.append(Worker(f"client-{number}", source, source, store, copies, shelf))
        self.held = [(0, self.model)] * len(self.workers)

    def work(self, client, asked, kind="train"):
        """A task for one client."""
        held, copy = self.held[client]
        delta = None if held == self.version else encode_model_delta(copy, self.model)
        number = self.version + 1
        update = m.UpdatePlan("none", feedback="none")
        return e.Work(
            m.Invitation(
                1, number, number, kind, asked, update, 5, 60.0, held, self.version, self.model.digest(), None
            ),
            delta,
        )

    def ask(self, client, asked, kind="train"):
        """What one client sends: its update."""
        answer = self.workers[client].perform(self.work(client, asked, kind), self.trainer, lambda: False)
        assert isinstance(answer, e.Finished), answer
        self.held[client] = self.version, self.model
        return answer.update

    def train(self, asked):
        """One round of all clients, each counting the same."""
        layouts = update_layouts(self.bundle.manifest)
        came = [decode_update(self.ask(client, asked), layouts).vectors for client in range(len(self.workers))]
        for client, worker in enumerate(self.workers):
            worker.store.settle(1, self.version + 1, recorded=True)
            assert client == int(worker.client[-1])
        shared = self.model.parameters(self.bundle.initial()) + np.mean([one["delta"] for one in came], 0)
        buffers = np.mean([one["buffers"] for one in came], 0) if "buffers" in layouts else self.model.buffers
        self.model = Model(RawState(shared.astype(np.float32)), buffers.astype(np.float32))
        self.version += 1

    def evaluate(self, client, asked):
        """The scalars of a client that evaluates."""
        return decode_scalars(self.ask(client, asked, "evaluate"))

    def shared(self):
        """The parameters and buffers that travel, by name."""
        buffers = self.bundle.manifest.layout("buffer")
        return self.bundle.layout.views(self.model.parameters(self.bundle.initial())) | buffers.views(
            self.model.buffers.copy()
        )


class Reference:
    """The same in PyTorch, written from the papers: what is fixed has no gradient, and nothing knows of vectors."""

    def __init__(self, rounds, module=None):
        self.rounds = rounds
        self.module = module or Net()
        self.module.load_state_dict({n: torch.tensor(np.array(w)) for n, w in rounds.bundle.weights.items()})
        self.state = self.snapshot()

    def snapshot(self):
        return {name: value.clone() for name, value in self.module.state_dict().items()}

    def train(self, start, client, seed, *, trained=None, epochs=2, lam=0.0, anchor=None, pulled=("",), **changes):
        """Train from ``start`` on a client's data; ``trained`` are prefixes of what may change, ``pulled`` of what a
        term of strength ``lam`` pulls to ``anchor``."""
        hypers = HYPERS | changes
        module = self.module
        module.load_state_dict(start)
        module.train()
        named = [(n, p) for n, p in module.named_parameters() if trained is None or n.startswith(tuple(trained))]
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in dict(named))
        optimizer = torch.optim.SGD(
            [p for _, p in named], hypers["lr"], hypers["momentum"], weight_decay=hypers["weight_decay"]
        )
        for epoch in range(epochs):
            for rows in self.rounds.workers[client].train.batches(8, seed=_epoch_seed(seed, epoch)):
                optimizer.zero_grad()
                loss = F.cross_entropy(module(torch.tensor(rows["x"])), torch.tensor(rows["y"]))
                if lam:
                    loss = loss + lam / 2 * sum(
                        ((p - anchor[n]) ** 2).sum() for n, p in named if n.startswith(tuple(pulled))
                    )
                loss.backward()
                optimizer.step()
        return self.snapshot()

    def seed(self, client, asked):
        """Of the client's task in this round."""
        return self.rounds.workers[client]._seed(self.rounds.work(client, asked).invitation)


def sources(count, rows=20):
    """Data of several clients, each of other classes for the most part."""
    found = []
    for number in range(count):
        data = toy_data(rows, seed=number, features=FEATURES, classes=CLASSES)
        data["y"] = (data["y"] + number) % CLASSES
        found.append(ArraySource(data))
    return found
