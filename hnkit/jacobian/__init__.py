"""The Jacobian of a map: as an operator, as a dense matrix, of a compiled map; and whether a map is one at all."""

from hnkit.jacobian.compiled import compile_map, reusable_graphs
from hnkit.jacobian.contract import Acquaintances, check_for_loss, check_map
from hnkit.jacobian.dense import Mode, dense_jacobian, fill_dense_jacobian
from hnkit.jacobian.operator import (
    RowJacobian,
    check_batch,
    check_finite,
    evaluate,
    forward_product,
    is_constant_at,
    math_attention,
    recording,
    require_differentiable_again,
    rows_per_pass,
)

__all__ = [
    "Acquaintances",
    "Mode",
    "RowJacobian",
    "check_batch",
    "check_finite",
    "check_for_loss",
    "check_map",
    "compile_map",
    "dense_jacobian",
    "evaluate",
    "fill_dense_jacobian",
    "forward_product",
    "is_constant_at",
    "math_attention",
    "recording",
    "require_differentiable_again",
    "reusable_graphs",
    "rows_per_pass",
]
