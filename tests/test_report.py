"""The tables of a study: known figures in the columns of their names."""

import json
from dataclasses import replace

from talos_fast import report
from talos_fast.alpha_search import choose_alpha
from talos_fast.study import MethodResult, Plan, StudyResult

ROW = MethodResult(
    "talos", 1e-3, {}, single={"a": 0.8, "b": 0.6}, added={"a": 0.4, "b": 0.6},
    addition=choose_alpha([0.5], [(0.4, 0.6)], [None], (0.8, 0.6), None), target={"a": 0.1, "b": 0.3},
    control={"a": 0.5, "b": 0.7}, vector_bytes={"a": 1000, "b": 3000}, seconds=5.0,
)  # fmt: skip
RESULT = StudyResult(Plan({"talos": (1e-3,)}, steps=3), {"a": 0.2, "b": 0.4}, 0.9, [ROW])


def test_a_row_a_method():
    assert report.rows(RESULT) == [
        ("zero-shot", "", "30.0", "30.0", "", "", "30.0", "90.0", "", ""),
        ("talos", "0.001", "70.0", "50.0", "75.0", "0.5", "20.0", "60.0", "2.5", "2"),
    ]


def test_a_row_a_task():
    assert report.task_rows(RESULT) == [("a", "20.0", "80.0 / 40.0 / 10.0"), ("b", "40.0", "60.0 / 60.0 / 30.0")]


def test_a_row_is_the_same_from_a_file():
    for row in (ROW, replace(ROW, addition=None, negation={"a": ROW.addition})):
        assert MethodResult.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_what_is_added_is_a_share_of_what_each_task_has_alone():
    assert ROW.normalized() == {"a": 0.5, "b": 1.0}
    assert replace(ROW, single={"a": 0.0}, added={"a": 0.1}).normalized() == {"a": 0.0}
