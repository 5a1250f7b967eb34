"""Commands in several processes, as torchrun starts them: they work as one or share the work; the first one speaks."""

import logging
import os

import torch
import torch.distributed as dist
import typer

from talos_fast.errors import TalosError

AS_ONE = ("calibrate", "finetune")
SHARING = ("suite",)  # by the folder of results, which needs no group


def is_first() -> bool:
    """Whether no process with a lower rank was started with this one."""
    return _world() == 1 or _number("RANK", 0) == 0


def join(ctx: typer.Context) -> None:
    """Takes this process's GPU, and makes a group of the processes that a launcher has started, until they `leave`.

    Nothing for one process alone.

    Raises:
        TalosError: the command runs in one process only, or the launcher does not say how to meet.
    """
    if _world() == 1:
        return
    if (command := ctx.invoked_subcommand) not in AS_ONE + SHARING:
        raise TalosError(f"{command} runs in one process; several are for {', '.join(AS_ONE)} and {SHARING[0]}")
    if torch.cuda.is_available():
        # Some launchers show each process its own GPU only, and with --device cpu there may be fewer GPUs.
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    if not is_first():
        logging.getLogger("talos_fast").setLevel(logging.ERROR)
    if command in AS_ONE:
        _meet(ctx)


def _world() -> int:
    return max(1, _number("WORLD_SIZE", 1))


def _number(name: str, default: int) -> int:
    """What a launcher has set, if it has."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise TalosError(
            f"{name}={value}: not a number that a launcher sets; unset it, or start the processes by torchrun"
        )
    return int(value)


def _meet(ctx: typer.Context) -> None:
    try:
        dist.init_process_group()
    except (ValueError, RuntimeError) as error:
        raise TalosError(
            f"WORLD_SIZE is set, but the processes cannot meet ({error}); start them by torchrun"
        ) from error
    ctx.call_on_close(leave)


def leave() -> None:
    """Ends the group, at about the same time in all processes, as NCCL wants it: not when the last has evaluated."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
