"""A data set as a simulation's perceptrons read it."""

from __future__ import annotations

from dataclasses import dataclass

from fedkit.data.datasets import open_dataset
from fedkit.errors import UsageError
from fedkit.seeds import numpy_generator
from fedkit.settings import DataSettings
from strategies.selectors.perceptrons import Floats, Indices

# So many samples, at most, validate a round, and as many measure it.
MEASURED = 2000


@dataclass(frozen=True)
class Samples:
    """A data set as perceptrons read it.

    Attributes:
        inputs, labels: of the training set, n x features and n.
        val_inputs, val_labels: half of the test set, for decisions.
        test_inputs, test_labels: the other half, for what is reported.
        classes: how many.
    """

    inputs: Floats
    labels: Indices
    val_inputs: Floats
    val_labels: Indices
    test_inputs: Floats
    test_labels: Indices
    classes: int


def read_samples(spec: str, sources: DataSettings) -> Samples:
    """A data set for ``Simulation``.

    Raises:
        UsageError: no such data set, or one that perceptrons can't read or that has no test set.
        FedkitError: its files are missing or damaged.
    """
    dataset = open_dataset(spec, sources)
    if not len(dataset.train.mean) or len(dataset.test) < 2 or len(dataset.classes) < 2:
        raise UsageError(
            f"A simulation needs images or features, classes and a test set, which {spec} has not."
        )
    train, test = dataset.train.all(), dataset.test.all()
    pixels = [
        samples.inputs(slice(None)).reshape(len(samples), -1).numpy() for samples in (train, test)
    ]
    half = min(len(test) // 2, MEASURED)
    order = numpy_generator(0, "simulation's test set").permutation(len(test))
    val, rest = order[:half], order[half : 2 * half]
    answers = test.labels.numpy()
    return Samples(
        pixels[0],
        train.labels.numpy(),
        pixels[1][val],
        answers[val],
        pixels[1][rest],
        answers[rest],
        len(dataset.classes),
    )
