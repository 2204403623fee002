"""Build of the C++ extension `gpo_fast._C`. No torch header is included, so one build serves every torch."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile("NPY_NUM_BUILD_JOBS").install()

extension = Pybind11Extension(
    "gpo_fast._C",
    sorted(glob("csrc/**/*.cpp", recursive=True)),
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    cxx_std=17,
    extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
    # `kernels/` is installed as gpo_fast.kernels: the bare name belongs to another package.
    packages=[*find_packages(include=["gpo_fast", "gpo_fast.*"]), "gpo_fast.kernels"],
    package_dir={"gpo_fast": "gpo_fast", "gpo_fast.kernels": "kernels"},
)
