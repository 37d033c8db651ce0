"""Next-character prediction: rows of tokens in, one logit for each character out."""

from __future__ import annotations

from torch import Tensor, nn

from fedkit.models.arguments import sizes
from fedkit.models.reads import check_tokens, sequence_length

EMBEDDING = 8


def lstm(shape: tuple[int, ...], classes: int, argument: str | None = None) -> nn.Module:
    """LEAF's network for Shakespeare: 8 numbers a character, two LSTM layers of 256; lstm:64 is smaller.

    With 80 characters 819,920 parameters; TensorFlow's cells, as in LEAF and FedProx, have one bias where
    torch's have two (2,048 fewer). LEAF: Caldas et al. 2018.
    """
    sequence_length("lstm", shape)
    (hidden,) = sizes("lstm", argument, (256,), most=1)
    return _LSTM(classes, hidden)


class _LSTM(nn.Module):
    """Logits (n, C) from the last state, given tokens (int64, n x length)."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens("lstm", tokens)
        states, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(states[:, -1])
        return logits
