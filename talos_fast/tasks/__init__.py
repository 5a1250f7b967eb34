"""What a task is, and how to read one: from files, from Hugging Face data sets, or as part of the paper's suites."""

from talos_fast.tasks.base import Split, Task
from talos_fast.tasks.files import load
from talos_fast.tasks.hub import from_hub
from talos_fast.tasks.presets import PRESETS, Preset, get_preset

__all__ = ["PRESETS", "Preset", "Split", "Task", "from_hub", "get_preset", "load"]
