"""The figures of a map: what is measured once (`MeasuredMap`), the one table of figures, and the record of training."""

from hnkit.figures.measured_map import DENSE_DIM, MeasuredMap, RowStatistics
from hnkit.figures.measurement import Measurement, measure
from hnkit.figures.table import FIGURES, Figure, mean_shift_share

__all__ = [
    "DENSE_DIM",
    "FIGURES",
    "Figure",
    "MeasuredMap",
    "Measurement",
    "RowStatistics",
    "mean_shift_share",
    "measure",
]
