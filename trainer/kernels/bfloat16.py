"""The sparse torch step with the encoder's product in bfloat16: scores, and so selection and values, are rounded to it.

Master weights, decoder, gradients and sums stay float32 (mixed precision: Micikevicius et al. 2018, arXiv 1710.03740).
Faster than the certified product of the other kernels where candidates are dear to score again; its effect on quality is
in docs/lab-log.md. On a CPU without bfloat16 instructions it is slower than float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels import fused
from trainer.kernels.sparse import dead_squared_error as dead_squared_error
from trainer.kernels.sparse import loops_by
from trainer.kernels.sparse import normalize_rows_ as normalize_rows_
from trainer.kernels.sparse import project_rows_ as project_rows_


def _rounded_product(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Return x W_encᵀ + b_enc, multiplied in bfloat16, in the rows' dtype."""
    low = torch.bfloat16
    return F.linear(x.to(low), W_enc.to(low), b_enc.to(low)).to(x.dtype)


encode_topk, encode_over, encode_batchtopk, squared_error = fused.functions(loops_by(_rounded_product))
