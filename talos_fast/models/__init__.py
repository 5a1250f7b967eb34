"""Pre-trained models: load one, build the frozen head of a task, batch its examples."""

from talos_fast.models.base import Backbone, Classifier
from talos_fast.models.heads import ChoiceHead, CosineHead
from talos_fast.models.images import ImagePreprocess
from talos_fast.models.registry import load

__all__ = ["Backbone", "ChoiceHead", "Classifier", "CosineHead", "ImagePreprocess", "load"]
