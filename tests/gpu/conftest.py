"""The device that each test here runs on."""

from __future__ import annotations

import pytest

from tests.gpu.devices import DEVICES


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)
