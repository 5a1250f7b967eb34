"""Commands in two processes, as torchrun starts them: one mask, one vector, one voice."""

import logging
import os
import socket
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import typer
from two_ranks import needs_gloo

from talos_fast import Mask, TalosError, TaskVector
from talos_fast.cli import app
from talos_fast.cli.options import resumable
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


def test_a_group_that_cannot_be_made_is_said(monkeypatch):
    def failing() -> None:
        raise RuntimeError("timed out")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", failing)
    with pytest.raises(TalosError, match=r"the processes cannot meet \(timed out\)"):
        app(LINES[0].split(), standalone_mode=False)


def test_a_command_that_fails_leaves_the_group(monkeypatch):
    left = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: None)
    monkeypatch.setattr("talos_fast.cli.processes.leave", lambda: left.append(True))
    with pytest.raises(TalosError, match="nowhere"):
        app(["calibrate", "--model", "tiny", "--data", "nowhere"], standalone_mode=False)
    assert left == [True]


@pytest.mark.usefixtures("logged")  # which puts back how much is logged
@pytest.mark.parametrize("rank, level", [("0", logging.INFO), ("1", logging.ERROR)])
def test_the_first_process_logs(monkeypatch, rank, level):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", rank)):
        monkeypatch.setenv(name, value)
    with pytest.raises(TalosError, match="give either --preset"):
        app(["suite", "--model", "tiny"], standalone_mode=False)
    assert logging.getLogger("talos_fast").level == level


@pytest.mark.parametrize("gpus, expected", [(1, 0), (4, 1)])
@pytest.mark.parametrize("line, said", [(LINES[0], "cannot meet"), ("suite --model tiny", "give either --preset")])
def test_processes_may_be_more_than_gpus(monkeypatch, line, said, gpus, expected):
    taken = []
    for name, value in (("is_available", lambda: True), ("device_count", lambda: gpus), ("set_device", taken.append)):
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TalosError, match=said):
        app(line.split(), standalone_mode=False)
    assert taken == [expected]


@pytest.mark.parametrize("world, rank, first", [("2", "0", True), ("2", "1", False), ("1", "1", True)])
def test_interrupted_the_first_of_all_machines_says_so(monkeypatch, capfd, world, rank, first):
    for name, value in (("WORLD_SIZE", world), ("RANK", rank), ("LOCAL_RANK", "01"[first])):
        monkeypatch.setenv(name, value)
    with pytest.raises(typer.Exit) as ended, resumable(Path("there")):
        raise KeyboardInterrupt
    said = "interrupted; the same command goes on from there\n" if first else ""
    assert is_first() == first and ended.value.exit_code == 130 and capfd.readouterr() == ("", said)
