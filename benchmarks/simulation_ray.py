"""The client of ``simulation.py`` as a plain Flower app; Ray's actors import it by name."""

from __future__ import annotations

import json
import os

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from simulation_peers import client_of, network

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Load the weights, take the steps, give them back."""
    torch.set_num_threads(1)
    work = json.loads(os.environ["SIMULATION_WORK"])
    folder = work.pop("folder")
    client = client_of(json.dumps(work), folder, int(context.node_config["partition-id"]))
    model = network(client.shape, client.outputs)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client.train(model, work["steps"], work["batch"])
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": client.samples}),
    }
    return Message(RecordDict(content), reply_to=message)
