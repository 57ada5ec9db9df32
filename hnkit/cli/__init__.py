"""The command line of hnkit."""

from hnkit.cli.app import main

__all__ = ["main"]
