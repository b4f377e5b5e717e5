"""The tensors of a module as they were, to go back to."""

from torch import nn

from elips_torch.indexes.storage import durable


class TensorsBefore:
    """Remembers the parameters and buffers of a module and what they held.

    Args:
        module: the module; small, because its tensors are copied.
    """

    def __init__(self, module: nn.Module) -> None:
        with durable():
            self._kept = [
                (holder, name, tensor, tensor.detach().clone())
                for part in module.modules()
                for holder in (part._parameters, part._buffers)
                for name, tensor in holder.items()
                if tensor is not None
            ]

    def put_back(self) -> None:
        """Undo whatever was written into the tensors or took their places since."""
        with durable():
            for holder, name, tensor, values in self._kept:
                tensor.data.copy_(values)
                holder[name] = tensor  # type: ignore[assignment]
