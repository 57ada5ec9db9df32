"""`hnkit compare`: the paper's tables and figures for a backend, and what it could not show, in one resumable run."""

from hnkit.scaled.compare.run import COMPARISON

__all__ = ["COMPARISON"]
