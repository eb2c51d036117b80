"""The plain step: dense products and torch autograd. Any device, any dtype; what the other kernels are measured against."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.code import SparseCode, of_k, where


def _pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    return torch.addmm(b_enc, x if b_dec is None else x - b_dec, W_enc.T)


def encode_topk(x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int) -> SparseCode:
    """Return the k largest pre-activations of each row, after ReLU: Gao et al. 2024 (arXiv 2406.04093), section 2.3.

    Example:
        >>> x, W, b = torch.tensor([[3.0, -1.0]]), torch.eye(2), torch.zeros(2)
        >>> encode_topk(x, W, b, None, k=1).dense(2)
        tensor([[3., 0.]])
    """
    values, indices = _pre_activations(x, W_enc, b_enc, b_dec).topk(k, dim=1, sorted=False)
    return of_k(indices, values.relu())


def encode_over(
    x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, threshold: Float[Tensor, " n_latents"]
) -> SparseCode:
    """Return each pre-activation that is over its latent's threshold, as it is: what JumpReLU and ReLU choose from.

    Example:
        >>> x, W, b = torch.tensor([[3.0, 2.0]]), torch.eye(2), torch.zeros(2)
        >>> encode_over(x, W, b, None, threshold=torch.tensor([4.0, 1.0])).dense(2)
        tensor([[0., 2.]])
    """
    pre = _pre_activations(x, W_enc, b_enc, b_dec)
    return where(pre, pre > threshold)


def encode_batchtopk(
    x: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, pairs: int, guess: float = 0.0
) -> SparseCode:
    """Return the `pairs` largest positive pre-activations of the whole batch: Bussmann et al. 2024 (arXiv 2412.06410).

    Args:
        x: rows.
        W_enc: (n_latents, d_in).
        b_enc: (n_latents,).
        b_dec: (d_in,), subtracted from the rows; None for nothing.
        pairs: k times the batch.
        guess: the threshold of the last batch; makes other kernels faster, changes nothing.

    Example:
        >>> x, W, b = torch.tensor([[3.0, 2.0], [1.0, 0.5]]), torch.eye(2), torch.zeros(2)
        >>> encode_batchtopk(x, W, b, None, pairs=3).dense(2)
        tensor([[3., 2.],
                [1., 0.]])
    """
    pre = _pre_activations(x, W_enc, b_enc, b_dec)
    positive = int((pre > 0).sum())
    chosen = pre.detach().flatten().topk(min(pairs, positive), sorted=False).indices
    mask = torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device).index_fill_(0, chosen, True)
    return where(pre, mask.view_as(pre))


def squared_error(
    target: Float[Tensor, "batch d_out"], code: SparseCode, W_dec: Tensor, b_dec: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_out"]]:
    """Return the summed squared error of the reconstruction code W_dec + b_dec, and target - reconstruction (detached).

    Example:
        >>> code = of_k(torch.tensor([[0]]), torch.tensor([[2.0]]))
        >>> error, residual = squared_error(torch.tensor([[3.0, 1.0]]), code, torch.eye(2), torch.zeros(2))
        >>> error.item(), residual
        (2.0, tensor([[1., 1.]]))
    """
    residual = target - torch.addmm(b_dec, code.dense(len(W_dec)), W_dec)
    return residual.square().sum(), residual.detach()


def dead_squared_error(
    x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], W_enc: Tensor, b_enc: Tensor, W_dec: Tensor,
    dead: Int[Tensor, " n_dead"], k: int,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the summed squared error with which each row's k largest latents of `dead` alone reconstruct the target.

    Args:
        x: rows, centred.
        target: what to reconstruct, without any bias.
        W_enc: (n_latents, d_in).
        b_enc: (n_latents,).
        W_dec: (n_latents, d_out).
        dead: which latents.
        k: at most so many of them a row.

    Source: AuxK, Gao et al. 2024 (arXiv 2406.04093), appendix A.2.
    """
    code = encode_topk(x, W_enc[dead], b_enc[dead], None, min(k, len(dead)))
    return (target - code.dense(len(dead)) @ W_dec[dead]).square().sum()


@torch.no_grad()
def project_rows_(gradient: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> float:
    """Remove from each row of the gradient its part along the unit row of the weights; return its Euclidean norm.

    Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Training"; Gao et al. 2024, appendix A.1: the
    normalisation of the rows would undo it anyway.

    Example:
        >>> gradient = torch.tensor([[3.0, 4.0]])
        >>> project_rows_(gradient, torch.tensor([[1.0, 0.0]])), gradient
        (4.0, tensor([[0., 4.]]))
    """
    along = torch.einsum("nd,nd->n", gradient, rows)
    gradient.addcmul_(along[:, None], rows, value=-1.0)
    return float(torch.linalg.vector_norm(gradient))


@torch.no_grad()
def normalize_rows_(rows: Float[Tensor, "n d"]) -> None:
    """Scale each row to Euclidean norm 1.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0]])
        >>> normalize_rows_(rows)
        >>> rows
        tensor([[0.6000, 0.8000]])
    """
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))
