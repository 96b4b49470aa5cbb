"""Exact minimum-cost assignment on small matrices, so that evaluation does not need SciPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssync_pl.errors import ShapeError

__all__ = ["linear_assignment"]


def linear_assignment(cost: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Match rows to columns one to one at the least total cost.

    Shortest augmenting paths with dual prices, O(min(n, m)² · max(n, m)). Runs on the CPU: matrices of slots against
    objects are small. The algorithm is described in D. F. Crouse, "On implementing 2D rectangular assignment
    algorithms", IEEE Transactions on Aerospace and Electronic Systems, 2016.

    Args:
        cost: `(n, m)` finite numbers.

    Returns:
        Row and column indices, both of length min(n, m), rows ascending.

    Raises:
        ShapeError: if `cost` is not a matrix or holds values that are not finite.

    Example:
        >>> rows, columns = linear_assignment([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]])
        >>> rows.tolist(), columns.tolist()
        ([0, 1], [1, 0])
    """
    matrix = np.asarray(cost, dtype=np.float64)
    if matrix.ndim != 2:
        raise ShapeError(f"Expected argument `cost` to have shape (n, m), but got {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise ShapeError("Expected argument `cost` to be finite, but got NaN or infinity.")
    if matrix.shape[0] > matrix.shape[1]:
        columns, rows = linear_assignment(matrix.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    row_count, column_count = matrix.shape
    row_price, column_price = np.zeros(row_count), np.zeros(column_count)
    row_of = np.full(column_count, -1, dtype=np.int64)
    column_of = np.full(row_count, -1, dtype=np.int64)
    for start in range(row_count):
        distance = np.full(column_count, np.inf)
        parent = np.full(column_count, -1, dtype=np.int64)
        closed = np.zeros(column_count, dtype=bool)
        row, reached = start, 0.0
        while True:
            through = reached + matrix[row] - row_price[row] - column_price
            shorter = ~closed & (through < distance)
            distance[shorter] = through[shorter]
            parent[shorter] = row
            sink = int(np.where(closed, np.inf, distance).argmin())
            reached = float(distance[sink])
            closed[sink] = True
            if row_of[sink] < 0:
                break
            row = int(row_of[sink])
        slack = reached - distance[closed]
        column_price[closed] -= slack
        owners = row_of[closed]
        row_price[owners[owners >= 0]] += slack[owners >= 0]
        row_price[start] += reached
        column = sink
        while True:
            row = int(parent[column])
            row_of[column] = row
            column, column_of[row] = int(column_of[row]), column
            if row == start:
                break
    return np.arange(row_count, dtype=np.int64), column_of
