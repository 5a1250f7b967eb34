"""What ends a run in which a kernel leaves its memory; run by test_emulated_cuda.py, without torch's allocator."""

import ctypes
import faulthandler
import os
import resource
import signal
import subprocess
from collections.abc import Callable

import pytest
import torch
from libraries import CHECKS

pytestmark = pytest.mark.gpu


def signal_of(act: Callable[[], object]) -> int:
    """By which a process ends that does it; 0: by itself."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        act()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def byte_at(address: int) -> ctypes.c_ubyte:
    return ctypes.c_ubyte.from_address(address)


def test_behind_a_tensor_there_is_nothing():
    tensor = torch.zeros(28, device="cuda")
    torch.cuda.synchronize()
    end = tensor.data_ptr() + tensor.nbytes
    assert signal_of(lambda: byte_at(end - 1).value) == 0
    assert signal_of(lambda: byte_at(end).value) == signal.SIGSEGV


@pytest.mark.parametrize("place", [-1, 100])
def test_what_is_written_beside_a_block_is_found_when_it_is_given_back(place):
    """Where the block is no multiple of 16 bytes, or before it."""
    runtime, block = ctypes.CDLL(None), ctypes.c_void_p()
    assert runtime.cudaMalloc(ctypes.byref(block), ctypes.c_size_t(100)) == 0
    assert byte_at(block.value + place).value == 0xFF

    def write_and_free():
        byte_at(block.value + place).value = 1
        runtime.cudaFree(block)

    assert signal_of(write_and_free) == signal.SIGABRT
    assert runtime.cudaFree(block) == 0


@pytest.mark.parametrize("index, first, is_sound", [(3, 4, True), (4, 4, False), (3, 1, False)])
def test_kernels_are_built_to_end_with_what_a_gpu_faults_on(index, first, is_sound, tmp_path):
    """An entry behind an array, and a vector that does not begin at a multiple of its size."""
    source, program = tmp_path / "kernel.cpp", tmp_path / "kernel"
    source.write_text("""
        struct alignas(16) Vector { float at[4]; };
        static float own[4];
        alignas(16) static float table[8];
        int main(int, char** given) {
          const int index = *given[1] - '0', first = *given[2] - '0';
          volatile float sum = own[index];
          sum = sum + reinterpret_cast<Vector*>(table + first)->at[1];
        }
    """)
    subprocess.run(["g++", "-O2", "-w", *CHECKS, str(source), "-o", str(program)], check=True)
    traps = -signal.SIGILL, -signal.SIGTRAP  # on x86, on ARM
    assert subprocess.run([program, str(index), str(first)]).returncode in ((0,) if is_sound else traps)
