"""What a task is, and how to read one: from files, from Hugging Face data sets, or as part of the paper's suites."""

from talos_fast.tasks.base import Split, Task
from talos_fast.tasks.files import from_files
from talos_fast.tasks.hub import from_hub
from talos_fast.tasks.presets import PRESETS, Preset, get_preset
from talos_fast.tasks.registry import load

__all__ = ["PRESETS", "Preset", "Split", "Task", "from_files", "from_hub", "get_preset", "load"]
