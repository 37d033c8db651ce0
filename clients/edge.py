"""The device's side of a federation: its shard, its models, its place among the clients."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from enum import Enum

import numpy as np
import torch
from flwr.app import ConfigRecord, Context
from numpy.typing import NDArray
from torch import Tensor, nn

from clients import memory
from clients.joining import federated_data
from fedkit.data.corruption import corrupted
from fedkit.data.samples import Samples
from fedkit.data.splits import ClientData, FederatedData
from fedkit.errors import UsageError
from fedkit.models.budget import check_budget
from fedkit.models.build import build_model, restored
from fedkit.models.device import compute_with, pick_device, repeatable
from fedkit.models.files import about_of
from fedkit.models.measure import batch_on
from fedkit.models.trial import try_one_batch
from fedkit.registry import split
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
        width: the share of their channels that its models have, where that was chosen for this device.
        fit: what that takes here, where it was measured.
        depth: how many stages its models have, where that was chosen for this device.
        parts: the architecture in each slot that holds another part of the network than ``model_name``.
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
    width: float | None = None
    fit: str = ""
    depth: int | None = None
    parts: dict[str, str] = field(default_factory=dict)
    _abouts: dict[str, ConfigRecord] = field(default_factory=dict)

    def architecture(self, slot: str) -> str:
        """The name of the network in ``slot``."""
        return self.parts.get(slot, self.model_name)

    def about(self, architecture: str) -> ConfigRecord:
        """What there is to say of a network of that name here, for whoever finds it in a state."""
        if architecture not in self._abouts:
            about = about_of(self.data, architecture, client=self.client)
            self._abouts[architecture] = ConfigRecord({"json": json.dumps(asdict(about))})
        return self._abouts[architecture]

    @property
    def own(self) -> nn.Module:
        """The client's own model."""
        return self.models[OWN]

    def remake(self, context: Context, slot: str) -> None:
        """Make the model in ``slot`` as a client that was started anew would."""
        weights, part = memory.recall_weights(context, slot), memory.recall_part(context, slot)
        if not weights:
            self._make(context, slot, self.model_name)
            return
        self.parts[slot] = part or self.model_name
        model = restored(self.parts[slot], self.data.shape, self.outputs, weights)
        self.models[slot] = model.to(self.device)

    def hold(self, context: Context, slot: str, architecture: str) -> None:
        """Let the network in ``slot`` be the one of that name.

        Where another one was, or none, it has this client's initial weights, and the running statistics
        that ``keep_statistics`` kept of it.
        """
        if slot not in self.models or self.architecture(slot) != architecture:
            self._make(context, slot, architecture)

    def _make(self, context: Context, slot: str, architecture: str) -> None:
        network = architecture, self.data.shape, self.outputs
        model = build_model(*network, self.settings.seed, self.client)
        own = memory.recall_statistics(context, slot, architecture)
        model.load_state_dict({**model.state_dict(), **own})
        self.models[slot], self.parts[slot] = model.to(self.device), architecture

    def keep_statistics(self, context: Context, slot: str) -> None:
        """Put the running statistics of the network in ``slot`` into the state that survives."""
        memory.keep_statistics(context, slot, self.architecture(slot), self.models[slot])

    def keep(self, context: Context, slot: str) -> None:
        """Put the model in ``slot``, and which network that is, into the state that survives."""
        memory.keep_model(context, slot, self.models[slot])
        part = self.architecture(slot)
        if part != self.model_name or memory.recall_part(context, slot):
            memory.keep_part(context, slot, part)

    def start_alone(self, context: Context) -> None:
        """Let the reference start (again) from where the own model is now, optimisers included."""
        if not self.settings.alone:
            return
        self.models[ALONE] = copy.deepcopy(self.own)
        self.parts[ALONE] = self.architecture(OWN)
        self.keep(context, ALONE)
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
    compute_with(settings.threads)
    repeatable()
    client = int(node["partition-id"])
    device = pick_device(str(node.get("device", "auto")))
    sources = DataSettings(
        str(node.get("data-root", "")), bool(node.get("allow-checksum-mismatch", False))
    )
    data = federated_data(context, settings, sources)
    broken = str(node.get("corrupt", ""))
    shard = corrupted(data.of_client(client), broken, settings.seed, client)
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
    # Left there by the client's app, if it has a way of fitting a network to this device.
    fit = getattr(context, "_fedkit_fit", whole)
    edge.model_name = fit(edge, context)
    _keep_to_budget(edge, context)
    for slot in (OWN, ALONE) if settings.alone else (OWN,):
        edge.remake(context, slot)
    # A simulation knows whom it has at work again: its network was tried, and code and data are the same.
    if not getattr(context, "_fedkit_tried", False):
        try_one_batch(edge.own, _two(edge), edge.outputs, edge.model_name)
    return edge


def _two(edge: Edge) -> Tensor:
    """What its network reads, of two samples (or one); a tiny shard may only have test data."""
    private = edge.private
    return (private.train if len(private.train) else private.test).inputs(slice(0, 2))


def whole(edge: Edge, context: Context) -> str:
    """The network that this device trains where there is nothing to choose: all of it.

    Raises:
        UsageError: this device was told to train some stages or channels only.
    """
    refuse_parts(edge, context)
    return edge.model_name


def refuse_parts(edge: Edge, context: Context, known: str = "") -> None:
    """``UsageError`` if this device was told to train a part of the network that is not ``known`` here.

    Or a network with several exits, which such a strategy knows no loss for.
    """
    kind, argument = split(edge.model_name)
    while kind == "width":
        kind, argument = split((argument or "").partition(":")[2])
    if kind == "exits":
        raise UsageError(
            f"{edge.model_name} has several exits, which only the strategy depthfl trains: run that on the "
            "network without exits:, or take the network up to one exit, as in exit:2:cnn."
        )
    for option, strategy in (("width", "heterofl or depthfl"), ("depth", "depthfl")):
        if option != known and context.node_config.get(option):
            raise UsageError(
                f"--{option} goes with the strategy {strategy}, and this federation runs "
                f"{edge.settings.strategy}: leave it out."
            )


def _keep_to_budget(edge: Edge, context: Context) -> None:
    """Refuse a network that this device has no memory to train, before it is made."""
    budget = memory_budget(context)
    if budget:
        check_budget(memory_needed(edge, context, edge.model_name), budget)


def memory_budget(context: Context) -> int:
    """Bytes that training may take on this device; 0: as many as it takes."""
    return int(context.node_config.get("memory-budget", 0))


def memory_needed(edge: Edge, context: Context, spec: str) -> int:
    """Bytes that this device needs to train the network ``spec``, its data included; nothing is made."""
    # Running a network without numbers loads half of torch: only who asks for it pays.
    from fedkit.models.cost import cost, prediction_memory, training_memory

    # A batch schedule may outgrow what this device has.
    most = max(len(edge.private.train), len(edge.public), 1)
    batch = min(memory.recall_batch_size(context), most)
    one = _two(edge)
    network = spec, edge.data.shape, edge.outputs
    needed = max(
        training_memory(*network, batch, one.dtype),
        prediction_memory(*network, batch_on(edge.device), one.dtype),
    )
    held = (edge.private.train, edge.private.val, edge.private.test, edge.public, edge.global_test)
    data = sum(part.data.numel() * part.data.element_size() for part in held)
    # The reference's weights lie beside; one of the two trains at a time.
    weights = cost(*network, tokens=one.dtype == torch.int64).bytes
    return needed + (weights if edge.settings.alone else 0) + data
