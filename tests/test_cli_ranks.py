"""Commands in two processes, as torchrun starts them: one mask, one vector, one voice."""

import os
import socket
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from two_ranks import needs_gloo

from talos_fast import Mask, TalosError, TaskVector
from talos_fast.cli import app
from talos_fast.cli.processes import is_first

MODEL = "--model tiny --data demo:digits --batch-size 16"
LINES = (
    f"calibrate {MODEL} --samples 40 --rounds 2 --verbose --out mask.safetensors",
    f"finetune {MODEL} --mask mask.safetensors --steps 6 --lr 1e-3 --out vector",
)


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def run_all(rank: int, place: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    os.chdir(place)
    for line, port in zip(LINES, ports, strict=True):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with open(f"said{rank}", "a") as said, redirect_stdout(said), redirect_stderr(said):
            app(line.split(), standalone_mode=False)
        assert not torch.distributed.is_initialized()
    del os.environ["MASTER_ADDR"]
    with pytest.raises(TalosError, match="the processes cannot meet .*MASTER_ADDR"):
        app(LINES[0].split(), standalone_mode=False)


@needs_gloo
def test_two_processes_are_as_one(tmp_path, monkeypatch):
    (tmp_path / "two").mkdir()
    mp.spawn(run_all, (tmp_path / "two", free_ports(len(LINES))), nprocs=2)
    monkeypatch.chdir(tmp_path)
    for line in LINES:
        app(line.split(), standalone_mode=False)
    alone, together = (Mask.load(folder / "mask.safetensors") for folder in (tmp_path, tmp_path / "two"))
    assert alone.overlap(together)["total"] > 0.999 and alone.info["samples"] == together.info["samples"] == 40
    one, two = (TaskVector.from_pretrained(folder / "vector") for folder in (tmp_path, tmp_path / "two"))
    assert one.cosine(two) > 0.999 and (one.info["ranks"], two.info["ranks"]) == (1, 2)
    said = (tmp_path / "two" / "said0").read_text()
    assert "density 0.1" in said and "validation accuracy" in said
    assert (tmp_path / "two" / "said1").read_text() == ""


@pytest.mark.parametrize("line", ["merge --model tiny", "inspect mask.safetensors"])
def test_other_commands_refuse_to_run_twice(monkeypatch, line):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TalosError, match="runs in one process; several are for calibrate, finetune and suite"):
        app(line.split(), standalone_mode=False)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["two", "-1", "1.0"])
def test_what_no_launcher_sets_is_refused(monkeypatch, name, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with pytest.raises(TalosError, match=f"{name}={value}: not a number that a launcher sets"):
        app(["suite"], standalone_mode=False)


@pytest.mark.parametrize("rank, first", [("", True), ("00", True), ("1", False)])
def test_the_first_of_two(monkeypatch, rank, first):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert is_first() == first


@pytest.mark.parametrize("world", ["", "0", "1"])
def test_of_one_process_nothing_is_asked(monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(TalosError, match="no such file"):
        app(["inspect", "mask.safetensors"], standalone_mode=False)


def test_processes_may_be_more_than_gpus(monkeypatch):
    taken = []
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 1), ("set_device", taken.append)):
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TalosError, match="cannot meet"):
        app(LINES[0].split(), standalone_mode=False)
    assert taken == [0]
