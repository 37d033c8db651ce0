"""What a simulated federation is made of, and what its selection is judged by."""

from __future__ import annotations

from dataclasses import dataclass

from fedkit.settings import setting

SPEC = "FedMarl, Zhang et al. 2022"


@dataclass(frozen=True)
class SimulationSettings:
    """A federation of emulated devices that trains small networks on a virtual clock."""

    clients: int = setting(20, "how many devices", minimum=1, maximum=10_000)
    rounds: int = setting(30, "how many rounds a federation runs", unit="rounds", minimum=1)
    epochs: int = setting(
        5, "epochs of local training a round, the probe included", unit="epochs", minimum=1
    )
    profiles: str = setting(
        "pi4,jetson-nano,phone-mid,laptop",
        "the devices' kinds, names or TOML files, comma-separated, cycled over clients",
    )
    dataset: str = setting("digits", "the data set: see `fedkit list datasets`")
    partition: str = setting(
        "dominant:0.8", "how the data are dealt out: see `fedkit list partitions`", source=SPEC
    )
    samples: int = setting(
        6000, "samples of the training set that are dealt out at most", unit="samples", minimum=10
    )
    hidden: int = setting(32, "hidden units of the networks that are trained", minimum=1)
    learning_rate: float = setting(0.1, "rate of the clients' SGD", above=0)
    batch_size: int = setting(16, "samples a step", unit="samples", minimum=1)
    sample_ms: float = setting(
        10.0,
        "what the machine that a profile's slowdown refers to takes to train on a sample once (as a "
        "ResNet-18 on one core)",
        unit="ms",
        above=0,
        maximum=1e6,
    )
    upload_kb: float = setting(
        45_000.0,
        "size of what is sent either way (as of a ResNet-18)",
        unit="kB",
        above=0,
        maximum=1e9,
    )
    upload_spread: float = setting(
        0.0,
        "how far what the clients send lies apart in size (standard deviation of the logarithm)",
        minimum=0,
        maximum=3,
    )
    seed: int = setting(1, "every random number comes from this one", minimum=0)


@dataclass(frozen=True)
class ObjectiveSettings:
    """w1 * accuracy - w2 * latency - w3 * bytes, over all rounds.

    Accuracy is worth its utility; latency and bytes count in rounds of everybody: 1 is what a round costs
    in which nobody is dropped. So the weights mean the same for any network and any device.
    """

    w1: float = setting(1.0, "weight of accuracy", minimum=0, source="unverified")
    w2: float = setting(
        0.2, "weight of a round's processing latency", minimum=0, source="unverified"
    )
    w3: float = setting(0.1, "weight of the bytes that come up", minimum=0, source="unverified")
    utility: str = setting(
        "points",
        "what accuracy is worth: its percentage points, or the tanh of FedMarl's users, which is flat "
        "above 25 %",
        choices=("points", "tanh"),
    )
