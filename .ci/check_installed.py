"""Imports every module of the installed talos-fast, and lists its files."""

import importlib
import os
import pkgutil
import sys
from importlib.metadata import files
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import talos_fast

environment = Path(sys.prefix).resolve()
modules = [m.name for m in pkgutil.walk_packages(talos_fast.__path__, "talos_fast.")]
for name in modules:
    module = importlib.import_module(name)
    if environment not in Path(str(module.__file__)).resolve().parents:
        sys.exit(f"{name} comes from {module.__file__}, not from the wheel")

for file in sorted(files("talos-fast") or [], key=str):
    if file.suffix != ".pyc":
        print(f"{file.size or 0:>10}  {file}")
if "talos_fast.kernels" not in modules:
    sys.exit("the wheel lacks talos_fast.kernels")
if not (Path(str(talos_fast.__file__)).parent / "py.typed").is_file():
    sys.exit("the wheel lacks py.typed")
print(f"imported {len(modules)} modules")
