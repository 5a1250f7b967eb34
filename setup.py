"""Builds talos_fast._C (schemas and CPU code) and, where nvcc is found, talos_fast._C_cuda.

Neither is needed to install: what cannot be built is said here, and talos_fast.ops then runs plain torch.
TALOS_CUDA=1 turns every such fallback into an error, TALOS_CUDA=0 leaves the CUDA library out.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

# The oldest torch that the libraries run on is 2.11, whichever torch they are built with.
FLAGS = ["-O3", "-std=c++17", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def fall_back(reason):
    """Says what is left out, or refuses to leave it out."""
    if os.environ.get("TALOS_CUDA") == "1":
        raise SystemExit(f"talos-fast: TALOS_CUDA=1, but {reason}")
    print(f"talos-fast: {reason}; installing without it, plain torch runs instead", file=sys.stderr)


def find_cuda_toolkit():
    """The toolkit's folder or None. nvcc on PATH may be a wrapper script far from it, so nvcc is asked."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        candidates += re.findall(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    folders = (Path(c).resolve() for c in candidates if c)
    return next((f for f in folders if (f / "bin/nvcc").is_file() and (f / "include/cuda_runtime.h").is_file()), None)


def cuda_toolkit_for(torch):
    """The toolkit to build _C_cuda with, or None with the reason said."""
    if os.environ.get("TALOS_CUDA") == "0":
        return None
    if torch.version.cuda is None:
        return fall_back("this torch is built without CUDA, so no CUDA library is built")
    if (toolkit := find_cuda_toolkit()) is None:
        return fall_back("no CUDA toolkit (nvcc) was found for the CUDA library; set CUDA_HOME to its folder")
    said = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = map(int, re.search(r"release (\d+)\.(\d+)", said).groups())
    if str(major) != torch.version.cuda.split(".")[0]:
        return fall_back(
            f"nvcc {major}.{minor} in {toolkit} cannot build for torch's CUDA {torch.version.cuda}; set CUDA_HOME to a "
            "toolkit of that major version, or pass --no-build-isolation to build with the torch you have"
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if (major, minor) >= (12, 8) else "8.0;9.0+PTX")
    return toolkit


def build_arguments():
    """Arguments of setup() for the libraries; none where there is no torch to build against."""
    try:
        import torch
    except ImportError as error:
        return fall_back(f"torch cannot be imported ({error}), so nothing is compiled") or {}
    if toolkit := cuda_toolkit_for(torch):
        os.environ["CUDA_HOME"] = str(toolkit)  # before the import below, which reads it
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Goes on without a library that does not compile; ``optional=True`` does not catch torch's errors."""

        def build_extensions(self):
            self.built = []
            try:
                super().build_extensions()
            except Exception as error:
                fall_back(f"the compiler cannot be used ({error})")
            self.extensions = self.built

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
                self.built.append(extension)
            except Exception as error:
                fall_back(f"{extension.name} does not compile ({error})")

    abi3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
    # FMA, which -std=c++17 turns off in GCC; and sqrt as a vector instruction.
    cxx = [*FLAGS, "-ffp-contract=fast", "-fno-math-errno"]
    sources = ["csrc/ops.cpp", "csrc/accumulate.cpp", "csrc/radix.cpp", "csrc/masked_adam.cpp", "csrc/compact.cpp"]
    modules = [CppExtension("talos_fast._C", sources, extra_compile_args=cxx, py_limited_api=abi3)]
    if toolkit:
        compile_args = {"cxx": cxx, "nvcc": [*FLAGS, "-DUSE_CUDA"]}
        cuda = CUDAExtension(
            "talos_fast._C_cuda",
            ["csrc/ops_cuda.cu", "csrc/accumulate_cuda.cu", "csrc/radix_cuda.cu"],
            extra_compile_args=compile_args,
            py_limited_api=abi3,
        )
        # Static: libcudart.so of one major version would not load beside a torch of another.
        cuda.libraries.remove("cudart")
        cuda.extra_link_args = ["-l:libcudart_static.a", "-lrt", "-ldl", "-lpthread"]
        modules.append(cuda)
    wheel = {"options": {"bdist_wheel": {"py_limited_api": "cp311"}}} if abi3 else {}
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}, **wheel}


if __name__ == "__main__":
    # Triton kernels live in the top-level folder kernels/ and are imported as talos_fast.kernels.
    packages = [*find_packages(include=["talos_fast", "talos_fast.*"]), "talos_fast.kernels"]
    setup(packages=packages, package_dir={"talos_fast.kernels": "kernels"}, **build_arguments())
