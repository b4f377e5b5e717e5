"""Indexes in distributed training."""

from elips_torch.distributed.ddp import prepare_for_ddp

__all__ = ["prepare_for_ddp"]
