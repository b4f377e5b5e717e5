"""Parameters of searches in any index of faiss: which there are, and faiss's object for one call."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, ParameterError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.opaque import inverted_file
from elips_torch.engines.faiss.row_kinds import BITS, downcast, kind_of

# Set on the index only: faiss has no object that carries it for one call.
ATTRIBUTES_ONLY = ("search_L", "nflip")
_QUANTIZER = "quantizer_"
# The version from which searches of bits take parameters.
_PARAMETERS_OF_BITS = (1, 14)
# The one from which fast scans of residuals follow the nprobe of a call.
_NPROBE_OF_CALLS = (1, 13)
# `IndexShardsIVF` is one of the shards.
_GROUPS = ("IndexReplicas", "IndexShards")


def parameter_holders(build: FaissBuild, index: Any) -> dict[str, tuple[Any, str]]:
    """Return the parameters that searches of an index have: by name, the object and attribute that hold it.

    Args:
        build: the faiss that made the index.
        index: any index.
    """
    faiss, index = build.module, downcast(build, index)
    members = members_of(build, index)
    if members:
        holders = [parameter_holders(build, member) for member in members]
        return {
            name: (_Together([each[name][0] for each in holders]), attribute)
            for name, (_, attribute) in holders[0].items()
        }
    if isinstance(index, faiss.IndexPreTransform | faiss.IndexBinaryFromFloat):
        return parameter_holders(build, index.index)
    if _has_lists_on_gpu(faiss, index):
        return {"nprobe": (index, "nprobe")}
    if isinstance(index, faiss.IndexRefine):
        return {"k_factor": (index, "k_factor"), **parameter_holders(build, index.base_index)}
    if isinstance(index, faiss.IndexIVF | faiss.IndexBinaryIVF):
        inner = parameter_holders(build, index.quantizer)
        return {"nprobe": (index, "nprobe"), **{_QUANTIZER + name: where for name, where in inner.items()}}
    if isinstance(index, faiss.IndexHNSW | faiss.IndexBinaryHNSW):
        return {"efSearch": (index.hnsw, "efSearch")}
    if isinstance(index, faiss.IndexNSG):
        return {"search_L": (index.nsg, "search_L")}
    if isinstance(index, faiss.IndexBinaryHash | faiss.IndexBinaryMultiHash):
        return {"nflip": (index, "nflip")}
    return {}


def search_parameters(build: FaissBuild, index: Any, values: dict[str, float], selector: Any = None) -> Any:
    """Return faiss's ``SearchParameters`` for one call; None where it would say nothing.

    Args:
        build: the faiss that made the index.
        index: any index.
        values: of parameters that `parameter_holders` names; the others are as the index has them.
        selector: an ``IDSelector``, kept alive by the result.

    Raises:
        ParameterError: several indexes side by side, bits over floats, any bits before faiss 1.14, a fast
            scan of additive codes, or one of residuals before 1.13, which take parameters for no single call.
    """
    if not values and selector is None:
        return None
    faiss, index = build.module, downcast(build, index)
    chosen = {} if selector is None else {"sel": selector}
    if values and not takes_parameters(build, index):
        name, value = next(iter(values.items()))
        where = "over several GPUs" if members_of(build, index) else f"of {type(index).__name__}"
        raise ParameterError(f"faiss takes {name} for no single call {where}; set index.{name} = {value}")
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(build, index.index, values, selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        rest = {name: value for name, value in values.items() if name != "k_factor"}
        inner = search_parameters(build, index.base_index, rest, selector)
        factor = values.get("k_factor", index.k_factor)
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF | faiss.IndexBinaryIVF):
        cut = len(_QUANTIZER)
        rest = {name[cut:]: value for name, value in values.items() if name.startswith(_QUANTIZER)}
        inner = search_parameters(build, index.quantizer, rest)
        if inner is not None:
            chosen["quantizer_params"] = inner
        nprobe = min(int(values.get("nprobe", index.nprobe)), int(index.nlist))
        return faiss.SearchParametersIVF(nprobe=nprobe, max_codes=index.max_codes, **chosen)
    if _has_lists_on_gpu(faiss, index):
        nprobe = min(int(values.get("nprobe", index.nprobe)), int(index.nlist))
        return faiss.SearchParametersIVF(nprobe=nprobe, **chosen)
    if isinstance(index, faiss.IndexHNSW | faiss.IndexBinaryHNSW):
        return faiss.SearchParametersHNSW(efSearch=int(values.get("efSearch", index.hnsw.efSearch)), **chosen)
    return faiss.SearchParameters(**chosen)


def takes_parameters(build: FaissBuild, index: Any) -> bool:
    """Return whether searches of an index itself, whatever is inside, take parameters for one call."""
    index = downcast(build, index)
    if isinstance(index, build.module.IndexBinaryFromFloat):
        return False
    if kind_of(build, index) is BITS:
        return _release(build) >= _PARAMETERS_OF_BITS
    refusing = getattr(build.module, "IndexIVFAdditiveQuantizerFastScan", None)
    if refusing is not None and isinstance(index, refusing):
        return False
    return not members_of(build, index) and not ignores_nprobe_of_calls(build, index)


def ignores_nprobe_of_calls(build: FaissBuild, index: Any) -> bool:
    """Return whether an index makes its tables for its own nprobe, and reads past their end for another."""
    if type(index).__name__ != "IndexIVFPQFastScan" or not index.by_residual:
        return False
    return _release(build) < _NPROBE_OF_CALLS


def _release(build: FaissBuild) -> tuple[int, ...]:
    return tuple(int(part) for part in build.version.split(".")[:2])


def may_widen(build: FaissBuild, index: Any) -> bool:
    """Return whether what `widened` returns can be given to searches of an index."""
    faiss, index = build.module, downcast(build, index)
    if isinstance(index, faiss.IndexPreTransform):
        return may_widen(build, index.index)
    if isinstance(index, faiss.IndexRefine):
        return may_widen(build, index.base_index)
    return takes_parameters(build, index)


# An int of C++.
_LARGEST_VALUE = 2**31 - 1


def check_value(name: str, value: float, holder: tuple[Any, str]) -> None:
    """Check the value of a search parameter, given what holds it.

    Raises:
        ArgumentError: it is out of range, or a fraction where faiss has whole numbers.
    """
    owner, attribute = holder
    # With more bits to flip than there are, faiss never returns.
    least, most = (0, int(owner.b)) if attribute == "nflip" else (1, _LARGEST_VALUE)
    if not least <= value <= most:
        limit = f"at least {least}" if value < least and most == _LARGEST_VALUE else f"{least} to {most}"
        raise ArgumentError(f"{name} is {value}, expected {limit}")
    if isinstance(getattr(owner, attribute), int) and value % 1 != 0:
        raise ArgumentError(f"{name} is {value}, expected a whole number")


def asks_a_graph(build: FaissBuild, index: Any) -> bool:
    """Return whether searches of an index go through a graph of the kind that `within_graph` is for."""
    return any(name.endswith("search_L") for name in parameter_holders(build, index))


def within_graph(
    build: FaissBuild, index: Any, k: int, values: dict[str, float]
) -> tuple[int, dict[str, float]]:
    """Return k and parameters with which an index does not ask a graph for more rows than it holds.

    NSG draws different rows until it has as many as it was asked for, and never returns where there are no
    more. A ``search_L`` above the number of rows is lowered to that for good.
    """
    holders = parameter_holders(build, index)
    for name, (graph, attribute) in holders.items():
        if not name.endswith("search_L"):
            continue
        n_rows = int(graph.ntotal)
        if n_rows and graph.search_L > n_rows:
            setattr(graph, attribute, n_rows)
        # A coarse quantizer is asked for no more lists than there are.
        if name == "search_L" and n_rows:
            k = min(k, n_rows)
            if "k_factor" in holders:
                holder, attribute = holders["k_factor"]
                factor = float(values.get("k_factor", getattr(holder, attribute)))
                values = {**values, "k_factor": min(factor, n_rows / k)}
    return k, values


def widened(
    build: FaissBuild, index: Any, values: dict[str, float], fetch: int, factor: int
) -> dict[str, float]:
    """Return parameters with which an index looks at more rows: ``fetch``, ``factor`` times as many lists.

    Those of a coarse quantizer stay as they are.
    """
    wider = dict(values)
    for name, (holder, attribute) in parameter_holders(build, index).items():
        now = values.get(name, getattr(holder, attribute))
        if name == "nprobe":
            wider[name] = min(int(now) * factor, int(holder.nlist))
        elif name == "efSearch":
            wider[name] = max(int(now), fetch)
    return wider


def members_of(build: FaissBuild, index: Any) -> list[Any]:
    """Return the indexes side by side in one over several GPUs; none of any other."""
    groups = tuple(getattr(build.module, name) for name in _GROUPS if hasattr(build.module, name))
    if not isinstance(index, groups):
        return []
    return [downcast(build, index.at(number)) for number in range(index.count())]


def _has_lists_on_gpu(faiss: Any, index: Any) -> bool:
    # No subclass of the inverted file on a CPU.
    return hasattr(faiss, "GpuIndexIVF") and isinstance(index, faiss.GpuIndexIVF)


class _Together:
    """Holders of one parameter that are set together and are all alike."""

    def __init__(self, holders: list[Any]) -> None:
        self.__dict__["_holders"] = holders

    def __getattr__(self, name: str) -> Any:
        return getattr(self._holders[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        for holder in self._holders:
            setattr(holder, name, value)


def may_take_selectors(build: FaissBuild, index: Any) -> bool:
    """Return whether a search with a selector can be tried: others say so, or end the process."""
    # These throw between threads, where nothing catches it.
    lists = inverted_file(build, index)
    kinds = (build.module.IndexIVFAdditiveQuantizer, build.module.IndexIVFSpectralHash)
    return lists is None or not isinstance(downcast(build, lists), kinds)


def bitmap_selector(build: FaissBuild, keep: Tensor) -> tuple[Any, Any]:
    """Return faiss's selector of rows where bool ``keep (N,)`` is True, and the memory it reads."""
    padded = torch.nn.functional.pad(keep.cpu(), (0, -len(keep) % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    bits = (padded * weights).sum(1, dtype=torch.uint8).numpy()
    return build.module.IDSelectorBitmap(len(bits), build.module.swig_ptr(bits)), bits
