"""Build of the C++ extension `gpo_fast._C`. No torch header is included, so one build serves every torch.

`GPO_FAST_SANITIZE=address,undefined` builds it instrumented, for `make sanitize`.
"""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile("NPY_NUM_BUILD_JOBS").install()

compile_flags = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
link_flags = []
if sanitizers := os.environ.get("GPO_FAST_SANITIZE"):
    compile_flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", f"-fsanitize={sanitizers}"]
    link_flags = [f"-fsanitize={sanitizers}"]

extension = Pybind11Extension(
    "gpo_fast._C",
    sorted(glob("csrc/**/*.cpp", recursive=True)),
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    cxx_std=17,
    extra_compile_args=compile_flags,
    extra_link_args=link_flags,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
    # `kernels/` is installed as gpo_fast.kernels: the bare name belongs to another package. `benchmarks/` is
    # gpo_fast.bench, what `gpo-fast bench` runs; gpo_fast.benchmarks loads evaluation sets.
    packages=[*find_packages(include=["gpo_fast", "gpo_fast.*"]), "gpo_fast.kernels", "gpo_fast.bench"],
    package_dir={"gpo_fast": "gpo_fast", "gpo_fast.kernels": "kernels", "gpo_fast.bench": "benchmarks"},
)
