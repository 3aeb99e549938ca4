"""Options of the benchmarks, the settings of their process, and what their JSON says of the machine."""

import pytest

from bloomft.process import share_cores

share_cores()  # before torch is imported

from bloomft.process import setup_process  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full``: the sizes that take longer than ten minutes on two cores."""
    parser.addoption("--full", action="store_true", help="full sizes: 24 layers, every loss size")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``full`` unless it is asked for."""
    if config.getoption("--full"):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
    items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_benchmark_update_json(output_json: dict) -> None:
    """Keep the machine's type, not its name, and no samples: each case has its own environment and spread."""
    kept = ("machine", "system", "python_version")
    output_json["machine_info"] = {name: output_json["machine_info"][name] for name in kept}
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
    for one in output_json["benchmarks"]:
        one["stats"].pop("data", None)


@pytest.fixture(scope="session", autouse=True)
def process_settings() -> None:
    """Every rival of this process has the settings of training; separate processes set their own."""
    setup_process()


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether --full was given."""
    return request.config.getoption("--full")
