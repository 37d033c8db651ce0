"""The network, the data, and what is done with both."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small network for 8x8 digits."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


@cache
def read_digits():
    """All of them, read once in each process."""
    return load_digits()


def load_data(partition_id, num_partitions, batch_size, seed=0):
    """Every so many-th sample, four fifths of them for training."""
    digits = read_digits()
    images = torch.tensor(digits.data[partition_id::num_partitions] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target[partition_id::num_partitions])
    cut = len(labels) * 4 // 5
    train = TensorDataset(images[:cut], labels[:cut])
    test = TensorDataset(images[cut:], labels[cut:])
    generator = torch.Generator().manual_seed(seed)
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True, generator=generator),
        DataLoader(test, batch_size=batch_size),
    )


def train(model, loader, epochs, lr, proximal_mu=0.0):
    """Local training; with ``proximal_mu`` FedProx's."""
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            for parameter, before in zip(model.parameters(), start, strict=True):
                loss = loss + proximal_mu / 2 * (parameter - before).square().sum()
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (len(loader) * epochs)


def test(model, loader):
    """Loss and accuracy."""
    model.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in loader:
            outputs = model(images)
            loss += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
            correct += (outputs.argmax(1) == labels).sum().item()
    count = len(loader.dataset)
    return loss / count, correct / count
