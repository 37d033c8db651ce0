"""The device's side of a federation: its shard, its models, its place among the clients."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from flwr.app import Context
from numpy.typing import NDArray
from torch import Tensor, nn

from clients import memory
from clients.joining import federated_data
from fedkit.data.samples import Samples
from fedkit.data.splits import ClientData, FederatedData
from fedkit.models.budget import check_budget
from fedkit.models.build import build_model, restored
from fedkit.models.device import pick_device, repeatable
from fedkit.models.measure import batch_on
from fedkit.models.trial import try_one_batch
from fedkit.seeds import torch_generator
from fedkit.settings import DataSettings, FederationSettings, build

OWN, ALONE = "own", "alone"


class Work(Enum):
    """How much of an instruction's local work is to be done now (see ``clients.probing``)."""

    WHOLE, FIRST_EPOCH, REST = range(3)


@dataclass
class Edge:
    """What a client holds in memory between instructions.

    Attributes:
        settings: the federation's settings.
        client: the client's index, which is its shard.
        model_name: the architecture of its models.
        data: the data set as this federation cuts it.
        private: the client's own shard, on the device.
        public: the public set, on the device.
        global_test: the common test set, on the device.
        models: ``own``, and ``alone`` where a reference is wanted.
        outputs: number of logits.
        answered: digest of the subset answered last, and the class scores on it.
        resembling: which public samples resemble the private ones, once that was found out.
        work: how much of the instruction under way is to be done.
    """

    settings: FederationSettings
    client: int
    model_name: str
    device: torch.device
    data: FederatedData
    private: ClientData
    public: Samples
    global_test: Samples
    outputs: int
    models: dict[str, nn.Module] = field(default_factory=dict)
    answered: tuple[str, Tensor] = ("", torch.empty(0))
    resembling: NDArray[np.bool_] | None = None
    work: Work = Work.WHOLE

    @property
    def own(self) -> nn.Module:
        """The client's own model."""
        return self.models[OWN]

    def remake(self, context: Context, slot: str) -> None:
        """Make the model in ``slot`` as a client that was started anew would."""
        network = self.model_name, self.data.shape, self.outputs
        weights = memory.recall_weights(context, slot)
        if weights:
            model = restored(*network, weights)
        else:
            model = build_model(*network, self.settings.seed, self.client)
        self.models[slot] = model.to(self.device)

    def start_alone(self, context: Context) -> None:
        """Let the reference start (again) from where the own model is now, optimisers included."""
        if not self.settings.alone:
            return
        self.models[ALONE] = copy.deepcopy(self.own)
        memory.keep_model(context, ALONE, self.own)
        for name in list(context.state):
            if name.startswith(f"{OWN}-") and name.endswith("-optimiser"):
                context.state[ALONE + name.removeprefix(OWN)] = context.state[name]

    def generator(self, purpose: str, round: int) -> torch.Generator:
        """This client's generator for one purpose in one round."""
        return torch_generator(self.settings.seed, purpose, self.client, round)


def edge_of(context: Context) -> Edge:
    """The live edge of this context: built, or rebuilt from the context's state, on first use.

    Raises:
        PublicMissing: of all that it needs the public set alone is not here.
        FedkitError: data are missing, or the shard or the device does not exist.
    """
    live = getattr(context, "_fedkit_edge", None)
    if not isinstance(live, Edge):
        live = _build(context)
        # Kept on the context itself, so that it lives exactly as long.
        context._fedkit_edge = live  # type: ignore[attr-defined]
    return live


def _build(context: Context) -> Edge:
    settings = build(FederationSettings, context.run_config)
    node = context.node_config
    torch.set_num_threads(settings.threads)
    repeatable()
    client = int(node["partition-id"])
    device = pick_device(str(node.get("device", "auto")))
    sources = DataSettings(
        str(node.get("data-root", "")), bool(node.get("allow-checksum-mismatch", False))
    )
    data = federated_data(context, settings, sources)
    shard = data.shard(client)
    edge = Edge(
        settings=settings,
        client=client,
        model_name=str(node.get("model") or settings.model),
        device=device,
        data=data,
        private=ClientData(shard.train.to(device), shard.val.to(device), shard.test.to(device)),
        public=data.public.to(device),
        global_test=data.common_test.to(device),
        outputs=data.outputs,
    )
    slots = (OWN, ALONE) if settings.alone else (OWN,)
    _keep_to_budget(edge, context, len(slots))
    for slot in slots:
        edge.remake(context, slot)
    try_one_batch(edge.own, _two(edge), edge.outputs, edge.model_name)
    return edge


def _two(edge: Edge) -> Tensor:
    """What its network reads, of two samples (or one); a tiny shard may only have test data."""
    private = edge.private
    return (private.train if len(private.train) else private.test).inputs(slice(0, 2))


def _keep_to_budget(edge: Edge, context: Context, models: int) -> None:
    """Refuse a network that this device has no memory to train, before it is made."""
    budget = int(context.node_config.get("memory-budget", 0))
    if not budget:
        return
    # Running a network without numbers loads half of torch: only who asks for it pays.
    from fedkit.models.cost import cost, prediction_memory, training_memory

    batch = memory.recall_batch_size(context)
    one = _two(edge)
    network = edge.model_name, edge.data.shape, edge.outputs
    needed = max(
        training_memory(*network, batch, one.dtype),
        prediction_memory(*network, batch_on(edge.device), one.dtype),
    )
    held = (edge.private.train, edge.private.val, edge.private.test, edge.public, edge.global_test)
    data = sum(part.data.numel() * part.data.element_size() for part in held)
    # The reference's weights lie beside; one of the two trains at a time.
    beside = cost(*network, tokens=one.dtype == torch.int64).bytes * (models - 1)
    check_budget(needed + beside + data, budget)
