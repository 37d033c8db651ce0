"""The ServerApp."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAdam,
    FedAvg,
    FedProx,
)

from quickstart.task import Net, load_data
from quickstart.task import test as test_fn

app = ServerApp()
MORE = {"FedAvg": {}, "FedProx": {"proximal_mu": 0.1}, "FedAdam": {"eta": 0.05}}
STRATEGIES = {"FedAvg": FedAvg, "FedProx": FedProx, "FedAdam": FedAdam}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train a model in some rounds, and write it down."""
    torch.manual_seed(1)
    config = context.run_config
    name = config["strategy"].removeprefix("Clipped")
    strategy = STRATEGIES[name](fraction_evaluate=config["fraction-evaluate"], **MORE[name])
    if name != config["strategy"]:
        strategy = DifferentialPrivacyClientSideFixedClipping(strategy, 0.0, 0.5, 2)
    arrays = ArrayRecord(Net().state_dict())
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=global_evaluate,
    )
    print("rounds per client:", result.train_metrics_clientapp)
    torch.save(result.arrays.to_torch_state_dict(), config["final-model"])


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Measure the global model on data of its own."""
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test_fn(model, load_data(0, 1, 64)[1])
    return MetricRecord({"accuracy": accuracy, "loss": loss})
