"""A saved model for other programs: safetensors, a plain ``torch.save``, or ONNX."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedkit.durable import write_whole
from fedkit.errors import FedkitError, UsageError
from fedkit.models.exits import held_at, split_depth
from fedkit.models.files import About, SavedModel, network, of_known_network, save_model
from fedkit.models.levels import levels_of
from fedkit.models.narrow import at_width, whole_of, width_of
from fedkit.models.normalisation import statistics_of
from fedkit.registry import split

FORMATS = ("safetensors", "pt", "onnx")
# Exporter and runtime add up in another order than torch; float32 has some seven digits.
TOLERANCE = 1e-4


def export(saved: SavedModel, path: Path, format: str) -> None:
    """Write a model to ``path``.

    ``safetensors`` and ``pt`` hold the state dict; ``onnx`` the network, for batches of any size, with
    the input ``images`` or ``features`` (float32, normalised) or ``tokens`` (int64) and the output
    ``logits``. What was written as ONNX is
    read again and compared with torch before ``path`` is there.

    Raises:
        FedkitError: it can't be written, or (``onnx``) the network can't be built or put so, or the
            extra is missing.
    """
    if format == "safetensors":
        save_model(path, saved.arrays, saved.about)
    elif format == "pt":
        buffer = io.BytesIO()
        torch.save({n: torch.from_numpy(np.array(a)) for n, a in saved.arrays.items()}, buffer)
        write_whole(path, [buffer.getvalue()])
    else:
        write_whole(path, [_onnx(saved)])


def cut(saved: SavedModel, at: int) -> SavedModel:
    """Of a network with several exits the plain one that ends at exit ``at``.

    Raises:
        UsageError: it has no such exit.
        FedkitError: its file does not say what network it is.
    """
    about = of_known_network(saved)
    kind, argument = split(whole_of(about.architecture))
    if kind != "exits":
        raise UsageError(
            f"{saved.source} holds {about.architecture}, which has no exits to be cut at: leave --exit out."
        )
    _, spec = split_depth(kind, argument)
    held = held_at(at, saved.arrays)
    passed = ("stem.", "stages.", f"exits.{at}.")
    arrays = {name: saved.arrays[name] for name in held if name.startswith(passed)}
    if not any(name.startswith(passed[-1]) for name in arrays):
        raise UsageError(f"{about.architecture} in {saved.source} has no exit {at}.")
    plain = at_width(f"exit:{at}:{spec}", width_of(about.architecture))
    return replace(saved, arrays=arrays, about=replace(about, architecture=plain))


def narrowed(saved: SavedModel, width: float) -> SavedModel:
    """What ``width`` keeps of a network, as a network; one of that width as it is.

    Raises:
        UsageError: it can't be so narrow, or has statistics that are those of another width.
        FedkitError: its file does not say what network it is.
    """
    about = of_known_network(saved)
    has = width_of(about.architecture)
    if width == has:
        return saved
    spec = whole_of(about.architecture)
    if not 0 < width < has:
        raise UsageError(
            f"{saved.source} holds {about.architecture}, which can be cut to a width above 0 and up to "
            f"{has:g}, not to {width:g}."
        )
    levels = levels_of(spec, tuple(about.shape), about.outputs, has)
    if statistics := statistics_of(levels.slicing.network(has)):
        raise UsageError(
            f"{saved.source} has no statistics of the width {width:g} for batch normalisation (as "
            f"{min(statistics)}): take a level of a run with -o buffers=static, or a network without it."
        )
    arrays = levels.take(saved.arrays, width)
    return replace(saved, arrays=arrays, about=replace(about, architecture=at_width(spec, width)))


def _onnx(saved: SavedModel) -> bytes:
    about, model = of_known_network(saved), network(saved)
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError:
        raise FedkitError(
            "ONNX needs the packages onnx and onnxscript: `pip install 'fedkit[onnx]'`."
        ) from None
    name, inputs = _examples(about)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (inputs[:2],),
                input_names=[name],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:  # whatever torch's exporter meets in somebody's network
        raise FedkitError(
            f"torch can't put the network {about.architecture} as ONNX ({type(error).__name__}): "
            "take --format safetensors or pt; --debug shows why."
        ) from error
    entry = proto.metadata_props.add()
    entry.key, entry.value = "about", json.dumps(asdict(about))
    onnx.checker.check_model(proto)
    _compare(proto, model, about.architecture, {name: inputs})
    written: bytes = proto.SerializeToString()
    return written


def _examples(about: About) -> tuple[str, torch.Tensor]:
    """What the network's input is called, and three of noise."""
    generator = torch.Generator().manual_seed(0)
    if not about.mean:
        tokens = torch.randint(len(about.classes), (3, *about.shape), generator=generator)
        return "tokens", tokens
    name = "images" if len(about.shape) == 3 else "features"
    return name, torch.randn(3, *about.shape, generator=generator)


def _compare(
    proto: Any, model: nn.Module, architecture: str, named: dict[str, torch.Tensor]
) -> None:
    """``FedkitError`` unless ONNX's own reference runtime finds what torch finds."""
    from onnx.reference import ReferenceEvaluator

    with torch.inference_mode():
        wanted = model(*named.values()).numpy()
    inputs = {name: tensor.numpy() for name, tensor in named.items()}
    outputs: Any = ReferenceEvaluator(proto).run(["logits"], inputs)
    found = outputs[0]
    scale = max(1.0, float(np.abs(wanted).max()))
    if found.shape != wanted.shape or not np.allclose(
        found, wanted, rtol=0, atol=TOLERANCE * scale
    ):
        raise FedkitError(
            f"The network {architecture} answers otherwise as ONNX than in torch: take --format "
            "safetensors or pt."
        )
