"""Synthetic(alpha, beta) of FedProx: 30 devices whose data and whose truth differ as much as one likes.

Li et al., Federated Optimization in Heterogeneous Networks (MLSys 2020), section 5.1, after the
authors' ``generate_synthetic.py``. The papers call alpha and beta variances; that code, and so this one,
takes them for standard deviations (the same at 0 and 1, another thing at 0.5). By that law alpha moves no
label: what it adds is the same for all classes of a device. Devices differ by their own W_k and b_k anyway.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from fedkit.data.samples import DataSet, Form, Pool
from fedkit.errors import UsageError
from fedkit.seeds import numpy_generator
from fedkit.settings import DataSettings

DEVICES = 30
FEATURES = 60
CLASSES = 10
TRAIN = 0.8
LARGEST = 1000.0


def synthetic(argument: str | None, sources: DataSettings, form: Form | None = None) -> DataSet:
    """FedProx's synthetic:ALPHA,BETA (or :iid): 30 devices, 60 features, 10 classes; no download.

    Alpha is the spread of the devices' models, beta that of their data; both are standard deviations.
    Of each device's samples four fifths are training data. The authors' code is not seeded; here the
    set is the same for every run, whatever its seed. Nothing is normalised, as there.
    """
    iid = argument == "iid"
    alpha, beta = (0.0, 0.0) if iid else _deviations(argument)
    inputs, labels, owners = generate(alpha, beta, iid=iid)
    first = np.searchsorted(owners, owners)  # where each sample's device begins
    sizes = np.bincount(owners)[owners]
    in_train = np.arange(len(labels)) - first < np.floor(TRAIN * sizes)
    return DataSet(
        f"synthetic:{argument}",
        train=_pool(inputs, labels, owners, in_train),
        test=_pool(inputs, labels, owners, ~in_train),
        classes=tuple(str(number) for number in range(CLASSES)),
    )


def generate(
    alpha: float, beta: float, *, iid: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Inputs (n x 60), labels (n) and devices (n, ascending) of all samples.

    Device k has n_k = floor(lognormal(4, 2)) + 50 samples; u_k ~ N(0, alpha), the entries of W_k (60 x
    10) and b_k ~ N(u_k, 1); B_k ~ N(0, beta), the entries of v_k ~ N(B_k, 1); x ~ N(v_k, diag(j^-1.2));
    y = argmax(W_k^T x + b_k). ``iid``: one W and b for all, and v_k = 0.
    """
    draw = numpy_generator(0, "synthetic data set")
    sizes = draw.lognormal(4, 2, DEVICES).astype(np.int64) + 50
    owners = np.repeat(np.arange(DEVICES), sizes)
    model_means = draw.normal(0, alpha, (DEVICES, 1))
    data_means = draw.normal(0, beta, (DEVICES, 1))
    spread = np.arange(1, FEATURES + 1) ** -0.6  # the root of the variances j^-1.2
    centres = draw.normal(data_means, 1, (DEVICES, FEATURES))
    weights = draw.normal(model_means[:, :, None], 1, (DEVICES, FEATURES, CLASSES))
    offsets = draw.normal(model_means, 1, (DEVICES, CLASSES))
    if iid:
        centres[:], weights[:], offsets[:] = 0, weights[0], offsets[0]
    inputs = centres[owners] + spread * draw.standard_normal((len(owners), FEATURES))
    scores = [
        inputs[owners == device] @ weights[device] + offsets[device] for device in range(DEVICES)
    ]
    return inputs, np.concatenate(scores).argmax(axis=1), owners


def _deviations(argument: str | None) -> tuple[float, float]:
    try:
        alpha, beta = (float(number) for number in (argument or "").split(","))
    except ValueError:
        alpha = beta = math.nan
    if not (0 <= alpha <= LARGEST and 0 <= beta <= LARGEST):
        raise UsageError(
            "The synthetic data set takes two standard deviations, as in synthetic:1,1 (or "
            f"synthetic:iid), not {argument or 'nothing'!r}."
        )
    return alpha, beta


def _pool(
    inputs: NDArray[np.float64],
    labels: NDArray[np.int64],
    owners: NDArray[np.int64],
    chosen: NDArray[np.bool_],
) -> Pool:
    data = torch.from_numpy(inputs[chosen].astype(np.float32))
    return Pool(
        labels=torch.from_numpy(labels[chosen]),
        read=lambda indices: data[indices],
        shape=(FEATURES,),
        mean=torch.zeros(FEATURES),
        std=torch.ones(FEATURES),
        owners=torch.from_numpy(owners[chosen]),
    )
