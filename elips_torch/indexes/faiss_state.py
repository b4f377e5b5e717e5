"""The state of an index of faiss as a module: bytes in checkpoints, copies, moves."""

from collections.abc import Callable, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from elips_torch.core.errors import DeviceError, ElipsError
from elips_torch.engines.faiss import opaque
from elips_torch.engines.faiss.builds import FaissBuild, load_installed
from elips_torch.engines.faiss.consistency import check_consistent
from elips_torch.engines.faiss.fast_scan import mend_fast_scan
from elips_torch.engines.faiss.gpu_options import GpuOptions, read_options
from elips_torch.engines.faiss.row_kinds import BITS, kind_of
from elips_torch.engines.faiss.row_search import RowSearch
from elips_torch.engines.faiss.search import cuda_device
from elips_torch.engines.faiss.search_parameters import parameter_holders
from elips_torch.engines.faiss.transfer import to_cpu, to_gpu
from elips_torch.indexes.base import Index
from elips_torch.indexes.storage import durable

_BYTES = "faiss"


class FaissState(Index):
    """What `FaissIndex` keeps: an index of faiss, and the place of each row in it."""

    row_tensors: ClassVar[tuple[str, ...]] = ("places", "ids")

    places: Tensor
    _build: FaissBuild
    _faiss: Any
    _of_bits: bool
    _gpus: tuple[int, ...] = ()
    _gpu_options: GpuOptions | None = None

    def _hold(self, index: Any) -> None:
        register, build = self.__dict__, load_installed()
        # What comes back from a GPU has forgotten where its rows are.
        opaque.prepare_to_reconstruct(build, index)
        mend_fast_scan(build, index)
        register["_build"] = build
        register["_faiss"] = index
        register["_of_bits"] = kind_of(build, index) is BITS
        register["_holders"] = parameter_holders(build, index)
        register["_search_rows"] = None

    @property
    def faiss_index(self) -> Any:
        """The index of faiss, which numbers rows from 0: it knows neither ids nor which rows are hidden.

        `to_faiss` and `from_faiss` of this index, not of that one, take both along.
        """
        return self._faiss

    def _rows_changed(self) -> None:
        self._search_rows: RowSearch | None = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.index_in_state_dict:
            destination[prefix + _BYTES] = opaque.to_bytes(self._build, self._faiss)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + _BYTES
        rest = {name: value for name, value in state_dict.items() if name != key}
        own = {prefix + name for name in (*self.row_tensors, "next_id")}
        if key not in state_dict:
            if own & rest.keys() or self.index_in_state_dict:
                missing_keys.append(key)
            rest = {name: value for name, value in rest.items() if name not in own}
            incoming = None
        else:
            incoming = self._read_state(prefix, state_dict[key], error_msgs)
            if incoming is None:
                return
        self.__dict__["_incoming"] = incoming
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            del self.__dict__["_incoming"]

    def _read_state(self, prefix: str, content: Tensor, error_msgs: list[str]) -> Any:
        """Return the index that a checkpoint holds; None, with a message, where it does not fit."""
        if content.dtype != torch.uint8 or content.ndim != 1:
            got = f"{content.dtype} of shape {tuple(content.shape)}"
            error_msgs.append(f"{prefix}{_BYTES}: got {got}, expected bytes (M,)")
            return None
        try:
            index = opaque.from_bytes(self._build, content)
            opaque.check_index(self._build, index)
            check_consistent(self._build, index)
            metric = opaque.metric_of_index(self._build, index)
        except ElipsError as error:
            error_msgs.append(f"{prefix}{_BYTES}: {error}")
            return None
        of_bits = kind_of(self._build, index) is BITS
        if of_bits != self._of_bits:
            got, expected = ("bits", "floats") if of_bits else ("floats", "bits")
            error_msgs.append(f"{prefix}{_BYTES}: got an index of {got}, expected one of {expected}")
            return None
        own = "ip" if self.metric == "cosine" else self.metric
        if (int(index.d), metric.name) != (self.dim, own):
            error_msgs.append(
                f"{prefix}{_BYTES}: got dim {index.d} and metric {metric.name!r}, "
                f"expected dim {self.dim} and {own!r}"
            )
            return None
        return index

    def _faults(self, rows: dict[str, Tensor], next_id: Tensor, assign: bool) -> list[str]:
        faults = super()._faults(rows, next_id, assign)
        places, total = rows["places"], int(self._incoming.ntotal)  # type: ignore[arg-type, union-attr]
        if faults or not len(places):
            return faults
        if int(places.min()) < 0 or int(places.max()) >= total or len(places.unique()) < len(places):
            faults.append(f"places: got no {len(places)} different rows of the {total} of faiss's index")
        return faults

    def _load_rows(self, rows: dict[str, Tensor], *, assign: bool) -> None:
        index = self._incoming
        super()._load_rows(rows, assign=assign)
        self._hold(self._on_device(index, self.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        try:
            with durable():
                device = fn(torch.empty(0, dtype=torch.int64, device=self.device)).device
        except (RuntimeError, AssertionError, ImportError) as error:
            raise DeviceError(f"a FaissIndex cannot move there: {error}") from error
        if device != self.device:
            index = self._on_device(to_cpu(self._build, self._faiss), device)
            super()._apply(fn, recurse)
            self._hold(index)
            return self
        return super()._apply(fn, recurse)

    def to_gpus(self, devices: Sequence[int] = (0,), **options: Any) -> Self:
        """Move to GPUs, as faiss lets callers choose; later moves to a GPU keep the options.

        On several GPUs faiss takes queries from the CPU and gives results there: those on a GPU are copied.

        Args:
            devices: numbers of the GPUs. Several repeat the index, or share it with ``shard=True``.
            **options: ``use_float16``, ``use_float16_coarse``, ``precomputed_tables``,
                ``interleaved_layout``, ``indices_options``, ``reserve_vectors``, ``temp_memory_bytes``,
                ``pinned_memory_bytes``, ``memory_space``, ``allow_cpu_coarse``, ``use_cuvs``, ``shard``.

        Returns:
            This index.

        Raises:
            ElipsError: no such GPU or option, or faiss has no such index on a GPU; this index is as it was.
        """
        chosen = read_options(**options)
        made = to_gpu(self._build, to_cpu(self._build, self._faiss), devices, chosen)
        device = cuda_device(devices[0])
        super()._apply(lambda tensor: tensor.to(device))
        self.__dict__.update(_gpus=tuple(devices), _gpu_options=chosen)
        self._hold(made)
        return self

    def _on_device(self, index: Any, device: torch.device) -> Any:
        if device.type == "cpu":
            return index
        if device.type != "cuda":
            raise DeviceError(f"a FaissIndex lies on a CPU or a CUDA GPU, not on {device}")
        number = device.index or 0
        devices = self._gpus if self._gpus[:1] == (number,) else (number,)
        return to_gpu(self._build, index, devices, self._gpu_options)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_build", "_holders", "_search_rows"):
            state.pop(name, None)
        content = opaque.to_bytes(self._build, self._faiss)
        # Shared memory would be gone before a process that is being spawned asks for it.
        state["_faiss"] = content if get_spawning_popen() is None else content.numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        content = torch.as_tensor(state.pop("_faiss"))
        super().__setstate__(state)
        self.__dict__["_build"] = build = load_installed()
        self._hold(self._on_device(opaque.from_bytes(build, content), self.device))
