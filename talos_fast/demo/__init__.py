"""The embedded default: a tiny CLIP and small tasks that need no network."""

from talos_fast.demo.model import load_backbone
from talos_fast.demo.tasks import control_task, demo_tasks

__all__ = ["control_task", "demo_tasks", "load_backbone"]
