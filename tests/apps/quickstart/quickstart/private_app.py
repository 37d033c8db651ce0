"""The same ClientApp with mods: updates are clipped and noised, and their size is logged."""

import threading

import numpy as np
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)

from quickstart.client_app import evaluate as evaluate_fn
from quickstart.client_app import train as train_fn

__all__ = ["app", "clipping_app"]

app = ClientApp(mods=[message_size_mod])
clipping_app = ClientApp()
# NumPy's generator, from which LocalDpMod draws, is shared by clients of one process.
drawing = threading.Lock()


def one_at_a_time(msg, context, call_next):
    """A mod of the app's own."""
    with drawing:
        return call_next(msg, context)


@app.train(mods=[one_at_a_time, arrays_size_mod, LocalDpMod(1.0, 1.0, 10.0, 1e-5)])
def train(msg, context):
    """Training, with noise that anybody can draw again."""
    np.random.seed(7 + context.node_config["partition-id"])
    return train_fn(msg, context)


app.evaluate()(evaluate_fn)
clipping_app.train(mods=[fixedclipping_mod])(train_fn)
clipping_app.evaluate()(evaluate_fn)
