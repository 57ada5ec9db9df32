"""Where the packages lie: `toy/` and `scaled/` are folders beside `hnkit/` and are imported as parts of it."""

from setuptools import find_packages, setup

FOLDERS = {"hnkit": "hnkit", "hnkit.toy": "toy", "hnkit.scaled": "scaled"}

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder)))
    ],
)
