"""The ClientApp."""

import time

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data
from quickstart.task import test as test_fn
from quickstart.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on this client's data, and count how often that was done."""
    config = msg.content["config"]
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    partition = context.node_config["partition-id"]
    loader, _ = load_data(
        partition,
        context.node_config["num-partitions"],
        context.run_config["batch-size"],
        seed=1000 * config["server-round"] + partition,
    )
    loss = train_fn(
        model,
        loader,
        context.run_config["local-epochs"],
        config["lr"],
        config.get("proximal-mu", 0.0),
    )
    if "trained" not in context.state:
        context.state["trained"] = ConfigRecord({"rounds": []})
    context.state["trained"]["rounds"] = [
        *context.state["trained"]["rounds"],
        config["server-round"],
    ]
    context.state["last"] = ArrayRecord(model.state_dict())
    time.sleep(context.run_config["pause"])
    metrics = {
        "train_loss": loss,
        "num-examples": len(loader.dataset),
        "times": len(context.state["trained"]["rounds"]),
    }
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Measure the model on this client's data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, loader = load_data(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        context.run_config["batch-size"],
    )
    loss, accuracy = test_fn(model, loader)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
