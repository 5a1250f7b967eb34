"""Benchmarks run only when asked for: ``pytest benchmarks/ --benchmark``."""

import argparse
import gc
import os
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "results"
PRESETS = {
    "cpu": {"models": ["ViT-B-32"], "variants": ["paper", "eager"], "rounds": 10, "results": RESULTS},
    "gpu": {
        "models": ["ViT-B-32", "ViT-B-32-timm", "ViT-L-14", "T5-Large"],
        "variants": ["paper", "eager", "compiled"],
        "rounds": 15,
        "results": RESULTS,
    },
    "smoke": {
        "models": ["smoke"],
        "variants": ["paper", "eager"],
        "rounds": 2,
        "results": RESULTS.parents[1] / "build" / "smoke",
    },
}
"""What is measured unless another option says otherwise; smoke: tiny models, to see that everything runs."""
CHOSEN = {"model": "models", "group": "groups"}
"""Parameter of a benchmark -> the option that says with which of its values it runs; None: with all."""


def names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",")]


def positive(given: str) -> int:
    if (number := int(given)) < 1:
        raise argparse.ArgumentTypeError(f"{given} is below 1")
    return number


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks (minutes, and the machine to itself)")
    parser.addoption("--preset", choices=tuple(PRESETS), help="default: gpu where there is one, else cpu")
    parser.addoption("--models", type=names, help="which models, separated by commas")
    parser.addoption("--methods", type=names, help="table: which beside nonlinear, separated by commas; default: all")
    parser.addoption("--variants", type=names, help="table: paper, eager, compiled; separated by commas")
    batch = "inputs a batch; default: the paper's on a GPU, a small one on a CPU. A step has none, backward's is fixed"
    parser.addoption("--batch", type=positive, help=batch)
    parser.addoption("--amp", choices=("auto", "bf16", "off"), default="auto", help="bf16 autocast; auto: on a GPU")
    parser.addoption("--device", choices=("cpu", "cuda"), help="step: where; default: cuda where there is one")
    parser.addoption("--rounds", type=positive, help="measurements of each contender, interleaved")
    groups = "calibration: which of ours, peers, released, memory, separated by commas; default: all"
    parser.addoption("--groups", type=names, help=groups)
    parser.addoption("--only", default="", help="calibration: the ways whose name holds this, beside the plain one")
    folder = "folder of the JSON files; default: benchmarks/results, of smoke build/smoke"
    parser.addoption("--results", type=Path, help=folder)


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not option.benchmark:
        return
    if option.preset in ("cpu", "smoke") and option.device != "cuda":  # a GPU that is there is not meant
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # in processes that it starts, too
    import torch
    from choice import choice

    has_gpu = torch.cuda.is_available()
    option.preset = option.preset or ("gpu" if has_gpu else "cpu")
    for flag, needed in (("--preset gpu", option.preset == "gpu"), ("--device cuda", option.device == "cuda")):
        if needed and not has_gpu:
            reason = "torch sees no CUDA device; leave it out, or run where there is one, with a torch built for CUDA"
            raise pytest.UsageError(f"{flag}: {reason}")
    for name, value in PRESETS[option.preset].items():
        if getattr(option, name) is None:
            setattr(option, name, value)
    if option.preset == "smoke":  # two threads wait for each other longer than such models compute
        os.environ["OMP_NUM_THREADS"] = "1"  # in processes that it starts
        torch.set_num_threads(1)
    choice(config)  # refuses names here, not in the middle of a run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.benchmark:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with --benchmark"))
        return
    for item in items:
        item.add_marker(pytest.mark.timeout(0))  # the limit of tests; a table of large models takes its hour
    for parameter, option in CHOSEN.items():
        skip_others(config, parameter, option, [item for item in items if parameter in parameters(item)])


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.benchmark:
        gc.freeze()  # memory is read after a collection, which need not go through all that torch and pytest made


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def skip_others(config: pytest.Config, parameter: str, option: str, items: list[pytest.Item]) -> None:
    """Skips benchmarks of values that were not chosen.

    Raises:
        pytest.UsageError: a value that was asked for is that of no benchmark; a preset may name some for other files.
    """
    chosen, preset = getattr(config.option, option), PRESETS[config.option.preset].get(option)
    if chosen is None or not items:
        return
    known = dict.fromkeys(str(parameters(item)[parameter]) for item in items)
    if chosen is not preset:
        from choice import refuse_unknown

        refuse_unknown(f"--{option}", chosen, known)
    for item in items:
        if parameters(item)[parameter] not in chosen:
            item.add_marker(pytest.mark.skip(reason=f"not among --{option} {','.join(chosen)}"))
