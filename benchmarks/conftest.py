"""Benchmarks run only when asked for: ``pytest benchmarks/ --benchmark``."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks (minutes, and the machine to itself)")
    parser.addoption("--models", default="ViT-B-32", help="which models, separated by commas; smoke is a tiny one")
    parser.addoption("--rounds", type=int, default=10, help="measurements of each contender, interleaved")
    groups = "ours,peers,released,memory"
    parser.addoption("--groups", default=groups, help=f"calibration.py: which comparisons, of {groups}")
    parser.addoption("--batch", default="", help="calibration.py: samples a batch, instead of each group's own")
    parser.addoption("--only", default="", help="calibration.py: the ways whose name holds this, beside the plain one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--benchmark"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with --benchmark"))
