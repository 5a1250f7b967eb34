"""Result files: what they say of the code, and how a run adds to them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any


def revision() -> str:
    """The commit of this checkout, with a + if files differ from it; without git $TALOS_REVISION, else "unknown"."""
    try:
        commit, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TALOS_REVISION", "unknown")
    return commit + ("+" if changes else "")


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()


def merge_rows(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with the rows of ``path`` that it does not replace, if they are of the same machine and shapes.

    A row holds its own baselines, so rows of several runs may stand in one file.
    """
    if not path.is_file():
        return content
    earlier = json.loads(path.read_text())
    same = {key: value for key, value in content.items() if key not in ("rows", "date")}
    if {key: value for key, value in earlier.items() if key not in ("rows", "date")} != same:
        return content
    measured = {(row["method"], row["variant"]): row for row in earlier["rows"]}
    for row in content["rows"]:
        key = row["method"], row["variant"]
        # A run that could not measure something does not undo one that did.
        if "missing" not in row or "missing" in measured.get(key, row):
            measured[key] = row
    return content | {"rows": list(measured.values())}
