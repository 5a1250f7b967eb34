"""Task-localized sparse fine-tuning and task arithmetic: calibrate, finetune, merge, evaluate."""

from talos_fast.alpha_search import AlphaSearch
from talos_fast.calibrate import calibrate
from talos_fast.errors import TalosError
from talos_fast.evaluate import Accuracy, evaluate
from talos_fast.finetune import finetune
from talos_fast.interference import Interference, interference
from talos_fast.mask import Mask
from talos_fast.merge import merge, search_alpha
from talos_fast.optim import MaskedAdam, from_adamw, to_adamw
from talos_fast.profiling import Profile, profile
from talos_fast.task_vector import TaskVector
from talos_fast.version import __version__

__all__ = [
    "Accuracy",
    "AlphaSearch",
    "Interference",
    "Mask",
    "MaskedAdam",
    "Profile",
    "TalosError",
    "TaskVector",
    "__version__",
    "calibrate",
    "evaluate",
    "finetune",
    "from_adamw",
    "interference",
    "merge",
    "profile",
    "search_alpha",
    "to_adamw",
]
