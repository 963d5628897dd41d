"""The process whose forks run the hostile cases."""

import pytest
from fork_server import ForkServer


@pytest.fixture(scope="session")
def fork_server():
    with ForkServer() as server:
        yield server
