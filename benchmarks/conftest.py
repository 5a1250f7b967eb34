"""Benchmarks run only when asked for: ``pytest benchmarks/ --benchmark``."""

from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "results"
PRESETS = {
    "cpu": {"models": "ViT-B-32", "variants": "paper,eager", "rounds": 10},
    "gpu": {"models": "ViT-B-32,ViT-L-14,T5-Large", "variants": "paper,eager,compiled", "rounds": 15},
    "smoke": {"models": "smoke", "variants": "paper,eager", "rounds": 2},
}
"""What is measured unless another option says otherwise; smoke: tiny models, to see that everything runs."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks (minutes, and the machine to itself)")
    parser.addoption("--preset", choices=tuple(PRESETS), help="default: gpu where there is one, else cpu")
    parser.addoption("--models", help="which models, separated by commas")
    parser.addoption("--methods", help="table: which methods beside nonlinear, separated by commas; default: all")
    parser.addoption("--variants", help="table: paper, eager, compiled; separated by commas")
    parser.addoption("--batch", type=int, help="inputs a batch; default: the paper's on a GPU, a small one on a CPU")
    parser.addoption("--amp", choices=("auto", "bf16", "off"), default="auto", help="bf16 autocast; auto: on a GPU")
    parser.addoption("--device", choices=("cpu", "cuda"), help="step: where; default: cuda where there is one")
    parser.addoption("--rounds", type=int, help="measurements of each contender, interleaved")
    groups = "ours,peers,released,memory"
    parser.addoption("--groups", default=groups, help=f"calibration: which comparisons, of {groups}")
    parser.addoption("--only", default="", help="calibration: the ways whose name holds this, beside the plain one")
    parser.addoption("--results", type=Path, default=RESULTS, help="folder of the JSON files")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.preset is None:
        import torch

        option.preset = "gpu" if torch.cuda.is_available() else "cpu"
    for name, value in PRESETS[option.preset].items():
        if getattr(option, name) is None:
            setattr(option, name, value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if config.getoption("--benchmark"):
            item.add_marker(pytest.mark.timeout(0))  # the limit of tests; a table of large models takes its hour
        else:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with --benchmark"))
