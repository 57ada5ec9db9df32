"""Where the packages lie: `toy/` and `scaled/` are folders beside `hnkit/` and are imported as parts of it."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
README = (HERE / "README.md").read_text(encoding="utf-8")

FOLDERS = {"hnkit": "hnkit", "hnkit.toy": "toy", "hnkit.scaled": "scaled"}

setup(
    long_description=runpy.run_path(str(HERE / "docs" / "index_readme.py"))["for_an_index"](README),
    long_description_content_type="text/markdown",
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder)))
    ],
)
