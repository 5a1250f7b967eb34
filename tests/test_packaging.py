import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
from conftest import ROOT


@pytest.fixture
def setup_py(monkeypatch):
    for variable in ("CUDA_HOME", "CUDA_PATH", "TALOS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("talos_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.glob, "glob", lambda pattern: [])
    return module


def executable(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path):
    """A toolkit whose nvcc says what the real one says, at a place nobody would guess."""
    folder = tmp_path / "opt/cuda-13.0"
    says = f'case "$*" in *--dryrun*) echo "#\\$ TOP={folder}/bin/.." >&2;; *) echo "release 13.0, V13.0.1";; esac'
    executable(folder / "bin/nvcc", says)
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    return folder


def test_finds_the_toolkit_behind_a_wrapper_script(setup_py, toolkit, tmp_path, monkeypatch):
    wrapper = executable(tmp_path / "usr/bin/nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert setup_py.find_cuda_toolkit() == toolkit


def test_finds_the_toolkit_behind_a_link(setup_py, toolkit, tmp_path, monkeypatch):
    (tmp_path / "links").mkdir()
    (tmp_path / "links/nvcc").symlink_to(toolkit / "bin/nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'links'}:{os.environ['PATH']}")
    assert setup_py.find_cuda_toolkit() == toolkit


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_named_toolkit_comes_first(setup_py, toolkit, variable, monkeypatch):
    monkeypatch.setenv(variable, str(toolkit))
    assert setup_py.find_cuda_toolkit() == toolkit


def test_passes_over_a_folder_without_headers(setup_py, toolkit, monkeypatch):
    (toolkit / "include/cuda_runtime.h").unlink()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup_py.find_cuda_toolkit() != toolkit


def torch_for(cuda):
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda))


def test_builds_for_the_usual_gpus_unless_told_otherwise(setup_py, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "placeholder")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")  # the set before it restores what the code sets
    assert setup_py.cuda_toolkit_for(torch_for("13.2")) == toolkit
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0;10.0+PTX"


@pytest.mark.parametrize(("cuda", "text"), [("12.8", "cannot build for torch's CUDA 12.8"), (None, "without CUDA")])
def test_leaves_cuda_out_with_a_reason(setup_py, toolkit, monkeypatch, capsys, cuda, text):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup_py.cuda_toolkit_for(torch_for(cuda)) is None
    assert text in capsys.readouterr().err
    monkeypatch.setenv("TALOS_CUDA", "1")
    with pytest.raises(SystemExit, match="TALOS_CUDA=1, but"):
        setup_py.cuda_toolkit_for(torch_for(cuda))


def test_cuda_can_be_declined_silently(setup_py, monkeypatch, capsys):
    monkeypatch.setenv("TALOS_CUDA", "0")
    assert setup_py.cuda_toolkit_for(torch_for("13.2")) is None
    assert capsys.readouterr().err == ""


def test_kernels_init_is_a_docstring():
    body = ast.parse((ROOT / "kernels/__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0].value.value, str)


def run(*command, cwd):
    result = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_transformers_imports_beside_our_kernels_folder():
    pytest.importorskip("transformers")
    run("-c", "import kernels; from transformers import T5ForConditionalGeneration", cwd=ROOT)


def test_kernels_import_as_part_of_the_package(tmp_path):
    code = "import importlib.util, talos_fast.kernels; print(importlib.util.find_spec('kernels'))"
    assert "talos" not in run("-c", code, cwd=tmp_path)


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    # From a copy: setuptools would also take every file that an earlier build listed in the checkout.
    kept_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "*-output")
    copy = shutil.copytree(ROOT, tmp_path / "checkout", ignore=kept_out)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run("-c", build, cwd=copy)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = [*copy.glob("csrc/*"), *copy.glob("kernels/*.py"), *copy.glob("talos_fast/**/*.py")]
    assert {str(path.relative_to(copy)) for path in sources} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "talos_fast/py.typed"} <= names
