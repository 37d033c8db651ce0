"""Predictions and their quality, the same at the server and on a device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkit.data.samples import Samples

PREDICT_BATCH = 512


@torch.inference_mode()
def predict(model: nn.Module, samples: Samples) -> Tensor:
    """Logits (float32, n x C) in evaluation mode, on the samples' device."""
    model.eval()
    parts = range(0, len(samples), PREDICT_BATCH)
    return torch.cat([model(samples.inputs(slice(at, at + PREDICT_BATCH))) for at in parts])


@torch.inference_mode()
def measure(model: nn.Module, samples: Samples) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy of a model on some samples (at least one)."""
    logits = predict(model, samples)
    accuracy = (logits.argmax(dim=1) == samples.labels).double().mean()
    return float(accuracy), float(functional.cross_entropy(logits, samples.labels))
