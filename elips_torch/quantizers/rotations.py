"""Matrices with orthonormal rows: at random, and closest to what is wanted."""

import torch
from torch import Tensor

from elips_torch.core.hardware import float32_product_is_exact


def closest_rotation(vectors: Tensor, targets: Tensor) -> Tensor:
    """Return R ``(O, I)`` with orthonormal rows that brings ``vectors @ R.T`` closest to the targets.

    Schönemann, A generalized solution of the orthogonal Procrustes problem, 1966.

    Args:
        vectors: ``(N, I)`` float32.
        targets: ``(N, O)`` float32, O at most I.

    Returns:
        ``(O, I)`` float64.
    """
    left, _, right = torch.linalg.svd(product(targets.T, vectors).double(), full_matrices=False)
    rotation: Tensor = left @ right
    return rotation


def orthonormal(n_rows: int, n_columns: int, seed: int) -> Tensor:
    """Return ``(n_rows, n_columns)`` float32 on the CPU, uniformly distributed among all such matrices.

    Its rows are orthonormal, or its columns where there are fewer.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (max(n_rows, n_columns), min(n_rows, n_columns))
    gaussian = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    columns, triangle = torch.linalg.qr(gaussian)
    # Without the signs some matrices would be more likely (Mezzadri, How to generate random matrices
    # from the classical compact groups, 2007).
    columns = columns * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    matrix: Tensor = (columns if n_rows >= n_columns else columns.T).float().contiguous()
    return matrix


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of float32 matrices at least in float32, whatever the settings of torch."""
    if float32_product_is_exact(left.device):
        return left @ right
    return (left.double() @ right.double()).float()
