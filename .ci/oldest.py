"""Prints the oldest version of every package that pyproject.toml names, for pip: what its bounds promise to work."""

import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
EXTRAS = ("clip", "t5", "plots", "data", "demo")

extras = PROJECT["optional-dependencies"]
for requirement in (*PROJECT["dependencies"], *(one for extra in EXTRAS for one in extras[extra])):
    if not requirement.startswith("talos-fast["):
        name, oldest = requirement.split(">=")  # fails where there is no bound: nobody knows then what works
        print(f"{name}=={oldest}")
