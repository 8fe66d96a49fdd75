"""Builds the Cython part; everything else is said in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        [
            Extension(f"fusedisk.{name}", [f"fusedisk/{name}.pyx"], extra_compile_args=["-O2"])
            for name in (
                *("activity", "changemap", "direct", "capture", "mapped", "cached", "disk"),
                *(
                    "turns",
                    "resting",
                    "parked",
                    "slowing",
                    "gateword",
                    "device",
                    "relay",
                    "datapath",
                    "zeros",
                ),
            )
        ],
        language_level=3,
    )
)
