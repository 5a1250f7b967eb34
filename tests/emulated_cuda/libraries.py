"""Compiles, without a toolkit, the emulated CUDA runtime, torch's operators on it, and our own CUDA sources."""

import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "emulated_cuda"
RUNTIME = FOLDER / "libcuda.so.1"  # by this name torch asks for the driver
OPERATORS = FOLDER / "emulated_operators.so"
KERNELS = FOLDER / "libkernels.so"

# What a GPU faults on or silently gets wrong ends the run: arrays left, vectors not aligned, integers that overflow.
CHECKS = (
    "-fsanitize=bounds,alignment,shift,integer-divide-by-zero,signed-integer-overflow",
    "-fsanitize-undefined-trap-on-error",
)

_LAUNCH = re.compile(r"([\w:]+(?:<[^<>]*>)?)<<<(.*?)>>>\(", re.DOTALL)


def rewritten(source: Path) -> Path:
    """A CUDA source as C++: ``kernel<<<grid, ...>>>(`` becomes ``emulated::launch(kernel, grid, ...)(``."""
    text = _LAUNCH.sub(r"emulated::launch([](auto... a) { \1(a...); }, \2)(", source.read_text())
    text = text.replace("extern __shared__", "extern")  # __shared__ means static
    path = FOLDER / source.with_suffix(".cpp").name
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(f'#line 1 "{source}"\n{text}')
    return beside.rename(path)


def headers() -> list[str]:
    """Those of CUDA come with torch's and Triton's wheels."""
    wheels = Path(torch.__file__).parents[1]
    cuda = [
        *(wheels / "nvidia").glob("cu*/include"),
        Path(triton.__file__).parent / "backends/nvidia/include",
    ]
    # What stands in for the toolkit's headers comes before them.
    folders = (HERE, ROOT / "csrc", *include_paths(), sysconfig.get_path("include"), *cuda)
    return [f"-I{folder}" for folder in folders]


def compile_to(library: Path, sources: list[Path], *options: str) -> None:
    """Where something is newer than the library."""
    code = [file for folder in (HERE, HERE.parent, ROOT / "csrc") for file in folder.glob("*.[ch]*")]
    known = [*code, Path(__file__), Path(torch.__file__)]
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in known):
        return
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-fPIC", "-shared", "-w", "-DUSE_CUDA", *headers()]
    beside = library.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, *map(str, sources), *options, "-o", str(beside)], check=True)
    beside.rename(library)


def build() -> None:
    """All three libraries, two at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    ours = [rewritten(ROOT / "csrc" / f"{name}_cuda.cu") for name in ("accumulate", "radix")]
    of_torch = Path(torch.__file__).parent / "lib"
    linked = [f"-L{of_torch}", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda", "-ltorch_python"]
    jobs = [
        (RUNTIME, [HERE / "streams.cpp", HERE / "device.cpp"], "-Wl,-soname,libcuda.so.1"),
        (OPERATORS, [HERE / "operators.cpp"], "-DTORCH_EXTENSION_NAME=emulated_operators", *linked),
        (KERNELS, ours, *CHECKS, *linked),
    ]
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(compile_to, *job) for job in jobs]:
            job.result()
