"""Result files: what they say of the code, and how a run adds to them."""

import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from talos_fast.environment import environment
from talos_fast.errors import TalosError


def header(device: str) -> dict[str, Any]:
    """What the file of one run says of machine and code, as JSON."""
    return environment(torch.device(device)) | stamp()


def stamp() -> dict[str, str]:
    """When and of which code; for a row, where rows of several runs stand in one file."""
    return {"date": time.strftime("%Y-%m-%d"), "revision": revision()}


def revision() -> str:
    """The commit of this checkout, with a + if its code differs; without git $TALOS_REVISION, else "unknown"."""
    code = ":/", ":(top,exclude)benchmarks/results"  # a run rewrites what it measures
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TALOS_REVISION", "unknown")
    return commit + ("+" if changes else "")


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()


def merge_rows(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with the rows of ``path`` that it does not replace.

    A row holds its own baselines, so rows of several runs may stand in one file, if machine and shapes are the same.

    Raises:
        TalosError: they are not.
    """
    if not path.is_file():
        return content
    earlier = json.loads(path.read_text())
    refuse_another_setting(path, earlier, content)
    measured = {(row["method"], row["variant"]): row for row in earlier["rows"]}
    for row in content["rows"]:
        key = row["method"], row["variant"]
        # A run that could not measure something does not undo one that did.
        if "missing" not in row or "missing" in measured.get(key, row):
            measured[key] = row
    return earlier | content | {"rows": list(measured.values())}


def refuse_another_setting(path: Path, earlier: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Raises TalosError if what both say of machine and shapes differs: their rows must not stand side by side."""
    shared = sorted((earlier.keys() & content.keys()) - {"rows", "date", "revision"})
    differing = [key for key in shared if earlier[key] != content[key]]
    if differing:
        found = "; ".join(f"{key} {earlier[key]} there, {content[key]} here" for key in differing)
        raise TalosError(f"{path} holds rows of another setting ({found}): take another --results, or delete the file")


def refuse_nothing(rows: Iterable[Mapping[str, Any]]) -> None:
    """Raises TalosError if no row was measured, which must not read as passed."""
    reasons = dict.fromkeys(row.get("missing") for row in rows)
    if None not in reasons:
        raise TalosError(f"nothing was measured: {'; '.join(map(str, reasons))}")
