"""Builds the Cython part; everything else is said in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        [Extension("fusedisk.changemap", ["fusedisk/changemap.pyx"], extra_compile_args=["-O2"])],
        language_level=3,
    )
)
