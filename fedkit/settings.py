"""Settings: one name, one default, one sentence of help for each, wherever it is written.

``num_shards`` here is ``--num-shards`` on the command line, ``num-shards`` in a TOML file, in
``-o num-shards=8`` and in Flower's run config. The dataclasses below are the only place where a
setting is declared; the command line, the files and the manual's tables are made from them.
A strategy's hyper-parameters are declared in the same way, beside the strategy.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fedkit.errors import UsageError
from fedkit.registry import allow, listed, suggest

Value = bool | int | float | str
T = TypeVar("T")
# What a message can carry.
LARGEST = 2**63 - 1


def setting(
    default: Value,
    help: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    source: str = "",
) -> Any:
    """Declare one setting of a dataclass: its default, what it means, and what it may be."""
    return field(
        default=default,
        metadata={
            "help": help,
            "unit": unit,
            "choices": choices,
            "minimum": minimum,
            "above": above,
            "maximum": maximum,
            "source": source,
        },
    )


@dataclass(frozen=True)
class FederationSettings:
    """What the whole federation agrees on: the server's word, taken by every client at join."""

    strategy: str = setting("ktpfl", "the algorithm: see `fedkit list strategies`")
    rounds: int = setting(20, "how many rounds to run", unit="rounds", minimum=1)
    min_clients: int = setting(
        2, "a round needs this many clients; the first one waits for them", minimum=1
    )
    dataset: str = setting("digits", "the data set: see `fedkit list datasets`")
    public: str = setting(
        "auto",
        "the public set, DATASET[:COUNT]; with the data set's own name a seeded part of its training "
        "data, which no client then holds; auto: digits:400, or 5000 samples of a larger set",
    )
    partition: str = setting(
        "dirichlet:0.5", "how private data are dealt out: see `fedkit list partitions`"
    )
    public_labels: bool = setting(
        False, "use the labels of the public set, where a strategy has a use for them"
    )
    augment: str = setting(
        "none",
        "what is done at random to images in private training: flip, crop[:PAD], rotate:DEGREES, "
        "comma-separated",
    )
    num_shards: int = setting(
        20,
        "into how many shards the private data are dealt; shards count from 0. Simulated clients may be "
        "more: they take the shards in turn, and each joins when it is first chosen",
        minimum=1,
    )
    seed: int = setting(1, "every random number of the run comes from this one", minimum=0)
    model: str = setting(
        "lenet", "the global model where a strategy has one, else the model of clients naming none"
    )
    val_fraction: float = setting(
        0.0, "share of a client's training data held out for validation", minimum=0, maximum=0.5
    )
    select: str = setting(
        "all",
        "who takes part in a round, as in uniform:0.1, tag:lab or power:10,3: see `fedkit list selectors`",
    )
    until: str = setting(
        "",
        "the run ends once the clients' mean accuracy on their validation data is there, as in "
        "val_accuracy=0.8 (needs val-fraction)",
        unit="val_accuracy=number",
    )
    patience: int = setting(
        0,
        "the run ends after so many rounds without a better mean accuracy on validation data (0: never; "
        "needs val-fraction)",
        unit="rounds",
        minimum=0,
    )
    max_seconds: float = setting(
        0.0,
        "the run ends with the round after which so much time has passed (0: no limit)",
        unit="seconds",
        minimum=0,
    )
    max_bytes: int = setting(
        0,
        "the run ends with the round after which so many tensor bytes have travelled for training, up "
        "and down (0: no limit)",
        unit="bytes",
        minimum=0,
    )
    target: str = setting(
        "",
        "record in the summary when a mean accuracy was first reached, as in mean_global_accuracy=0.8; "
        "stops nothing",
        unit="name=number",
    )
    codec: str = setting(
        "float32",
        "how logits travel: see `fedkit list codecs`; with several (topk:3,float32) each client gets "
        "the first that it knows",
    )
    alone: bool = setting(
        False, "train beside each client's model the same model without exchange, as a reference"
    )
    eval_every: int = setting(
        1, "measure every so many rounds; the last is always measured", unit="rounds", minimum=1
    )
    eval_samples: int = setting(
        0,
        "measure on so many samples of each set at most (0: all); the last round is whole",
        unit="samples",
        minimum=0,
    )
    round_timeout: float = setting(
        3600.0,
        "a round goes on without the clients that have not answered by then",
        unit="seconds",
        above=0,
        maximum=1e7,
    )
    quorum: float = setting(
        0.0,
        "share of the selected clients that must answer each exchange of a round; 0: any number will do",
        minimum=0,
        maximum=1,
    )
    below_quorum: str = setting(
        "repeat",
        "a round below the quorum is repeated (those who answered are not asked for it again) or "
        "skipped (its result is dropped)",
        choices=("repeat", "skip"),
    )
    rejoin_wait: float = setting(
        60.0,
        "with fewer than min-clients connected, the run ends after so long and can be resumed; a "
        "resumed run waits so long for the clients that it had",
        unit="seconds",
        minimum=0,
        maximum=1e7,
    )
    threads: int = setting(
        1, "torch threads of each process; part of the numbers, so never guessed", minimum=1
    )


@dataclass(frozen=True)
class DataSettings:
    """Where this machine keeps data sets; no business of the federation's."""

    data_root: str = setting(
        "", "folder of torchvision's data sets (default: $FEDKIT_DATA_ROOT)", unit="folder"
    )
    allow_checksum_mismatch: bool = setting(
        False, "use files whose checksum is not the published one, with a warning"
    )
    allow: str = setting(
        "",
        "what this machine may use where the server's settings or a saved model name it: code of "
        "your own (package.module:function), folder:PATH, csv:PATH; several with ; between",
        unit="names",
    )

    def __post_init__(self) -> None:
        allow(*listed(self.allow))


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens and writes, and what it keeps."""

    listen: str = setting("127.0.0.1:8090", "address to listen on; port 0 takes a free one")
    run_dir: str = setting(
        "", "folder for the results (default: runs/TIME-STRATEGY)", unit="folder"
    )
    keep_checkpoints: int = setting(
        3, "how many checkpoints are kept; there is one after every round", minimum=1
    )
    reconnect_grace: float = setting(
        15.0,
        "a client whose connection ended may come back for so long before the round goes on without it",
        unit="seconds",
        minimum=0,
        maximum=1e7,
    )
    send_public: bool = setting(
        True, "send the public set to a client that does not have it; it is kept there"
    )
    max_message: int = setting(
        2**32, "the largest message that is taken from a client", unit="bytes", minimum=1024
    )
    metrics_port: str = setting(
        "",
        "serve Prometheus metrics at this port of 127.0.0.1, or at HOST:PORT for others to reach "
        "(default: not at all)",
        unit="port",
    )


@dataclass(frozen=True)
class RunSettings:
    """What `fedkit run` adds: who the local clients are."""

    clients: int = setting(4, "how many client processes to start", minimum=1)
    models: str = setting(
        "lenet,cnn,resnet18,shufflenet", "the clients' models, comma-separated, cycled over clients"
    )
    device: str = setting(
        "auto", "where clients compute: auto, cpu, cuda, cuda:I or mps; auto takes a GPU if any"
    )
    emulate: str = setting(
        "",
        "the devices that clients behave like, comma-separated, cycled over clients: pi4, jetson-nano, "
        "phone-mid, laptop, or TOML files (default: this machine as it is)",
        unit="profiles",
    )
    widths: str = setting(
        "",
        "the share of the model's channels that each client trains (`fedkit client --width`), as in "
        "1,0.5,0.25 or auto, cycled over clients; with the strategies heterofl and depthfl (default: "
        "what heterofl deals out, else all)",
        unit="widths",
    )
    depths: str = setting(
        "",
        "how many stages of the model each client trains (`fedkit client --depth`), as in 1,2,4 or auto, "
        "cycled over clients; with the strategy depthfl (default: all stages)",
        unit="depths",
    )
    time_budgets: str = setting(
        "",
        "the clients' time budgets (`fedkit client --time-budget`), seconds, comma-separated, cycled over "
        "clients; 0: none (default: none)",
        unit="seconds,...",
    )
    corrupt: str = setting(
        "",
        "the clients' broken sensors (`fedkit client --corrupt`), as in none,none,noise:1.0, cycled over "
        "clients (default: none is broken)",
        unit="none|noise:SIGMA,...",
    )


def key(name: str) -> str:
    """A setting's name outside Python: ``num_shards`` is ``num-shards``."""
    return name.replace("_", "-")


def default_of(item: Field[Any]) -> Value:
    """The declared default of a setting."""
    assert item.default is not MISSING
    value: Value = item.default
    return value


def read_toml(path: str) -> dict[str, Value]:
    """The settings in a TOML file, by outside name.

    Raises:
        UsageError: no such file, no valid TOML, or a table or list where a value belongs.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no settings file {path}.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"The settings file {path} can't be read: {error}.") from error
    for name, value in values.items():
        if not isinstance(value, bool | int | float | str):
            raise UsageError(f"{name} in {path} must be a single value, not {value!r}.")
    return values


def read_overrides(pairs: Iterable[str]) -> dict[str, Value]:
    """``["num-shards=8"]`` from ``-o`` as settings by outside name (values still text)."""
    values: dict[str, Value] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"-o takes key=value, not {pair!r}.")
        values[name.strip()] = text.strip()
    return values


def merge(*layers: Mapping[str, Value]) -> dict[str, Value]:
    """Later layers win; ``num_shards`` and ``num-shards`` are one name."""
    merged: dict[str, Value] = {}
    for layer in layers:
        merged.update({key(name): value for name, value in layer.items()})
    return merged


def build(kind: type[T], values: Mapping[str, Value]) -> T:
    """An instance of a settings dataclass from those of ``values`` that are its own.

    Raises:
        UsageError: a value of the wrong kind or outside its range; the sentence names both.
    """
    hints = _types(kind)  # type: ignore[arg-type]
    declared = fields(kind)  # type: ignore[arg-type]
    return kind(
        **{
            item.name: _parse(item, hints[item.name], values[key(item.name)])
            for item in declared
            if key(item.name) in values
        }
    )


@lru_cache(maxsize=64)
def _types(kind: type) -> dict[str, Any]:
    # Python evaluates each annotation anew, and a simulation makes its clients' settings often.
    return get_type_hints(kind)


def refuse_unknown(
    values: Mapping[str, Value], kinds: Iterable[type], elsewhere: Mapping[str, str] = {}
) -> None:
    """Raise ``UsageError`` for a name that none of the settings dataclasses declares.

    ``elsewhere``: what to say of names that people may look for.
    """
    known = [key(item.name) for kind in kinds for item in fields(kind)]
    for name in values:
        if name in elsewhere:
            raise UsageError(f"{name} is not set here: {elsewhere[name]}.")
        if name not in known:
            raise UsageError(f"There is no setting {name!r}{suggest(name, known)}.")


def as_config(settings: Any) -> dict[str, Value]:
    """A settings instance as plain values by outside name, as TOML and Flower's run config hold."""
    return {key(item.name): getattr(settings, item.name) for item in fields(settings)}


def _parse(item: Field[Any], kind: type, value: Value) -> Value:
    name = key(item.name)
    parsed = _convert(name, kind, value)
    choices = item.metadata["choices"]
    if choices and parsed not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, not {parsed!r}.")
    if isinstance(parsed, int | float) and not isinstance(parsed, bool):
        _check_range(name, item, parsed)
    return parsed


def _convert(name: str, kind: type, value: Value) -> Value:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "on", "1"):
            return True
        if str(value).lower() in ("false", "no", "off", "0"):
            return False
        raise UsageError(f"{name} must be true or false, not {value!r}.")
    if kind is str:
        return str(value)
    try:
        if isinstance(value, bool):
            raise ValueError
        number = kind(value)
        if kind is int and isinstance(value, float) and number != value:
            raise ValueError
    except (ValueError, OverflowError):
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} must be {wanted}, not {value!r}.") from None
    result: Value = number
    return result


def _check_range(name: str, item: Field[Any], number: float) -> None:
    minimum, above, maximum = (item.metadata[word] for word in ("minimum", "above", "maximum"))
    if math.isnan(number):
        raise UsageError(f"{name} must be a number, not nan.")
    if minimum is not None and number < minimum:
        raise UsageError(f"{name} must be at least {minimum:g}, not {number:g}.")
    if above is not None and number <= above:
        raise UsageError(f"{name} must be above {above:g}, not {number:g}.")
    if maximum is not None and number > maximum:
        raise UsageError(f"{name} must be at most {maximum:g}, not {number:g}.")
    if isinstance(number, int) and number > LARGEST:
        raise UsageError(f"{name} must be at most {LARGEST}, not {number}.")
    if math.isinf(number):
        raise UsageError(f"{name} must be a finite number, not {number}.")
