"""A client of central training: its data are elsewhere already, it only measures."""

from __future__ import annotations

from clients.common import client_app
from clients.private import local_epochs

app = client_app(local_epochs)
