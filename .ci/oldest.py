"""Prints the oldest version of every package that talos-fast and its users' extras need, for pip."""

import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
DEVELOPERS = ("bench", "test")

extras = [content for extra, content in PROJECT["optional-dependencies"].items() if extra not in DEVELOPERS]
for requirement in sum(extras, PROJECT["dependencies"]):
    if not requirement.startswith("talos-fast["):
        name, oldest = requirement.split(">=")  # fails where there is no bound: nobody knows then what works
        print(f"{name}=={oldest}")
