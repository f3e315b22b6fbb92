"""How clients train, as their invitations say it."""

from broker_server.aggregation import registry
from broker_server.config import Federation
from edge_client.wire.messages import RECEIVED_LOSS, TrainPlan


def train_plan(settings: Federation) -> TrainPlan:
    """The plan of a task; what an algorithm asks of clients belongs here."""
    train = settings.train
    needs = registry.algorithm(settings.aggregation.algorithm).needs
    return TrainPlan(train.epochs, train.steps, train.batch_size, train.hypers, RECEIVED_LOSS in needs)
