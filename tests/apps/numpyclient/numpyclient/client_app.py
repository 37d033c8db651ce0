"""The ClientApp, by a NumPyClient."""

import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context
from sklearn.datasets import load_digits


class Client(NumPyClient):
    """Softmax regression on a part of the digits."""

    def __init__(self, partition, partitions, l2):
        digits = load_digits()
        self.x = digits.data[partition::partitions] / 16
        self.y = digits.target[partition::partitions]
        self.l2 = l2

    def fit(self, parameters, config):
        weights = parameters[0].copy()
        for _ in range(config["steps"]):
            chances = self._predict(weights)
            chances[np.arange(len(self.y)), self.y] -= 1
            weights -= 0.5 * (self.x.T @ chances / len(self.y) + self.l2 * weights)
        return [weights], len(self.y), {}

    def evaluate(self, parameters, config):
        chances = self._predict(parameters[0])
        right = chances.argmax(1) == self.y
        loss = -np.log(chances[np.arange(len(self.y)), self.y]).mean()
        return float(loss), len(self.y), {"accuracy": float(right.mean())}

    def _predict(self, weights):
        scores = self.x @ weights
        chances = np.exp(scores - scores.max(1, keepdims=True))
        return chances / chances.sum(1, keepdims=True)


def client_fn(context: Context):
    """A client of this node."""
    partition = context.node_config["partition-id"]
    partitions = context.node_config["num-partitions"]
    return Client(partition, partitions, context.run_config["penalty.l2"]).to_client()


app = ClientApp(client_fn)
