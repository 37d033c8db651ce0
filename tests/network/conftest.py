"""Every test here skips, with the reason, where no network of namespaces can be made."""

from __future__ import annotations

import pytest

from network.namespaces import why_not


@pytest.fixture(scope="session", autouse=True)
def able():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
