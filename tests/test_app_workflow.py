"""Flower's own workflow, which older apps run, and secure aggregation on it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flower_apps import APPS, AppFederation, asking
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

from fedkit.apps.bundle import read_app
from fedkit.flower import take_identity


@pytest.fixture(autouse=True)
def identity():
    yield
    take_identity()


def test_an_older_app_runs_as_it_is(tmp_path):
    app, result = read_app(APPS / "numpyclient"), tmp_path / "result.json"
    summary = AppFederation(tmp_path, app, f'result="{result}" num-server-rounds=2').run(2)
    assert summary["messages"] == {"sent": 8, "answered": 8}
    found = json.loads(result.read_text())
    assert found["results"] == 2 and found["accuracy"] > 0.8


@pytest.mark.parametrize("kept", [3, 4])
def test_secure_aggregation_gives_the_mean(tmp_path, kept):
    """SecAgg+ in four stages a round, in which clients send each other shares of their keys."""
    plain = last_model(tmp_path / "plain", DefaultWorkflow(), [])
    secure = DefaultWorkflow(SecAggPlusWorkflow(num_shares=kept, reconstruction_threshold=2))
    masked = last_model(tmp_path / "masked", secure, [secaggplus_mod])
    assert plain.any()
    # Of 2**22 steps between -8 and 8, weighted.
    np.testing.assert_allclose(masked, plain, atol=1e-4)


def last_model(folder, workflow, mods):
    """Of two rounds of FedAvg with four clients of the older app."""
    app, found = read_app(APPS / "numpyclient"), []
    app.client_app()  # from here on its package can be imported
    from numpyclient.client_app import client_fn

    def main(grid, context):
        strategy = OlderFedAvg(
            min_available_clients=4,
            fraction_evaluate=0.0,
            initial_parameters=ndarrays_to_parameters([np.zeros((64, 10))]),
            on_fit_config_fn=lambda round: {"steps": 3},
            evaluate_fn=lambda round, arrays, config: found.append(arrays[0]),
        )
        workflow(grid, LegacyContext(context, ServerConfig(num_rounds=2), strategy=strategy))

    federation = AppFederation(folder, app, server_app=asking(main), min_clients=4)
    federation.run(4, ClientApp(client_fn, mods=mods))
    return found[-1]
