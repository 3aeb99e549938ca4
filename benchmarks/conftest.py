"""Options of the benchmarks."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full``: the sizes that take longer than ten minutes on two cores."""
    parser.addoption("--full", action="store_true", help="full sizes: 24 layers, every loss size")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether --full was given."""
    return request.config.getoption("--full")
