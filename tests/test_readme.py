"""The README shows what a program measured, and nothing else."""

import json
import re

from conftest import ROOT


def test_the_table_is_the_committed_result():
    readme, results = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
    table = (results / "demo.md").read_text()
    assert table in readme
    measured = json.loads((results / "demo.json").read_text())
    assert {"machine", "threads", "torch", "plan", "seconds"} <= measured.keys()
    for method in measured["methods"]:
        single = 100 * sum(method["single"].values()) / len(method["single"])
        assert f"| {method['method']} | {method['lr']:g} | {single:.1f} |" in table


def test_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / target).is_file(), target


def test_both_commands_are_shown():
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme and "make test" in readme
