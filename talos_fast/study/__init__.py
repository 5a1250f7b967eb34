"""A whole table: every task learned by every method, added and negated."""

from talos_fast.study.plan import MethodResult, Plan, StudyResult
from talos_fast.study.study import Study

__all__ = ["MethodResult", "Plan", "Study", "StudyResult"]
