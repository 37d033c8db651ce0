"""The ServerApp, by a server_fn."""

import json
from pathlib import Path

import numpy as np
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


class Recording(FedAvg):
    """FedAvg that writes its last model down."""

    def __init__(self, result, **settings):
        super().__init__(**settings)
        self.result = result

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        told = {"round": server_round, "loss": loss, "results": len(results), **metrics}
        Path(self.result).write_text(json.dumps(told))
        return loss, metrics


def accuracy(metrics):
    """The mean over clients."""
    return {"accuracy": float(np.mean([m["accuracy"] for _, m in metrics]))}


def server_fn(context: Context):
    """The parts of the server."""
    config = context.run_config
    strategy = Recording(
        config["result"],
        initial_parameters=ndarrays_to_parameters([np.zeros((64, 10))]),
        on_fit_config_fn=lambda server_round: {"steps": 20},
        evaluate_metrics_aggregation_fn=accuracy,
    )
    timeout = config["round-timeout"] or None
    rounds = ServerConfig(num_rounds=config["num-server-rounds"], round_timeout=timeout)
    return ServerAppComponents(strategy=strategy, config=rounds)


app = ServerApp(server_fn=server_fn)
