"""What a task is, and how to read one from files."""

from talos_fast.tasks.base import Split, Task
from talos_fast.tasks.files import load

__all__ = ["Split", "Task", "load"]
