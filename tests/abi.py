"""What a built library asks of torch, and whether that keeps the promise of one binary for all torch from 2.11.

    python tests/abi.py talos_fast/*.so

Exits with 1 when a library uses a C++ symbol of torch, links the CUDA runtime dynamically, or needs a
shim that torch got after the target version.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch

TARGET = (2, 11)


def shim_versions() -> dict[str, tuple[int, int]]:
    """Shim function -> the torch version that first had it, read from the guards of torch's own header."""
    header = Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h"
    since, versions = (0, 0), {}
    for line in header.read_text().splitlines():
        if guard := re.match(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_0", line):
            since = (int(guard[1]), int(guard[2]))
        elif line.startswith("#endif"):
            since = (0, 0)
        for name in re.findall(r"\b(torch_\w+)\(", line):
            versions.setdefault(name, since)
    return versions


def output(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def imported_symbols(library: Path) -> list[str]:
    """Names the library takes from others, C++ ones demangled."""
    lines = output("nm", "-D", "--undefined-only", str(library)).splitlines()
    return output("c++filt", text="\n".join(line.split()[-1].split("@")[0] for line in lines)).splitlines()


def breaches(library: Path) -> list[str]:
    """Everything in the library that breaks the promise, one line each."""
    versions, symbols = shim_versions(), imported_symbols(library)
    linked = re.findall(r"NEEDED.*\[(\S+)\]", output("readelf", "-d", str(library)))
    return [
        *(f"{library.name}: C++ symbol {s}" for s in symbols if re.match(r"(at|c10|torch)::", s)),
        *(f"{library.name}: {s} needs torch {versions[s]}" for s in symbols if versions.get(s, (0, 0)) > TARGET),
        *(f"{library.name}: links {name}" for name in linked if name.startswith("libcudart")),
    ]


if __name__ == "__main__":
    found = [line for path in sys.argv[1:] for line in breaches(Path(path))]
    print("\n".join(found) or f"stable: {' '.join(Path(path).name for path in sys.argv[1:])}")
    sys.exit(1 if found else 0)
