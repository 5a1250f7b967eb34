"""Commands in several processes, as torchrun starts them: they work as one, and the first of them speaks."""

import logging
import os

import torch
import torch.distributed as dist
import typer

from talos_fast.errors import TalosError

COMMANDS = ("calibrate", "finetune")


def join(ctx: typer.Context) -> None:
    """Makes a group of the processes that a launcher has started, until they `leave`; nothing for one alone.

    Raises:
        TalosError: the command runs in one process only, or the launcher does not say how to meet.
    """
    world = os.environ.get("WORLD_SIZE") or "1"
    if not world.isdecimal():
        raise TalosError(f"WORLD_SIZE={world}: not a number of processes; unset it, or start them by torchrun")
    if int(world) <= 1:
        return
    if ctx.invoked_subcommand not in COMMANDS:
        raise TalosError(f"{ctx.invoked_subcommand} runs in one process; several are for {' and '.join(COMMANDS)}")
    if torch.cuda.is_available():
        # Some launchers show each process its own GPU only, and with --device cpu there may be fewer GPUs.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group()
    except (ValueError, RuntimeError) as error:
        raise TalosError(
            f"WORLD_SIZE is set, but the processes cannot meet ({error}); start them by torchrun"
        ) from error
    ctx.call_on_close(leave)
    if dist.get_rank() > 0:
        logging.getLogger("talos_fast").setLevel(logging.ERROR)


def leave() -> None:
    """Ends the group, at about the same time in all processes, as NCCL wants it: not when the last has evaluated."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
