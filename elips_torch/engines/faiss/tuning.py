"""Tuning of indexes of faiss by faiss's own parameter space."""

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import DtypeError, ImplementationError, ParameterError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.row_kinds import BITS, kind_of
from elips_torch.engines.faiss.search import gpus_inside, index_gpu, placed
from elips_torch.engines.faiss.search_parameters import check_value, parameter_holders

# Faiss reads as much of a text as is a number.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Its name of what an index that refines has under another.
_REFINING = re.compile(r"k_factor_rf$")


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """What one setting of the parameters gives.

    Attributes:
        recall: share of the true neighbours that were found.
        seconds: how long all queries took.
        parameters: as ``set_parameters`` takes them.
    """

    recall: float
    seconds: float
    parameters: str


def set_parameters(build: FaissBuild, index: Any, parameters: str) -> None:
    """Set parameters from text such as ``"nprobe=16,quantizer_efSearch=64"``.

    Raises:
        ParameterError: one that the index does not have; those before it are set. Or no number.
        ArgumentError: a value out of range.
        DtypeError: no text.
    """
    if not isinstance(parameters, str):
        raise DtypeError(f"parameters is {parameters!r}, expected a str such as 'nprobe=16'")
    holders = parameter_holders(build, index)
    # As faiss takes them apart.
    for name, _, text in (each.partition("=") for each in re.split("[ ,]+", parameters)):
        holder = holders.get(_REFINING.sub("k_factor", name))
        # Of what else faiss sets, it says what it does not know.
        if holder is not None:
            check_value(name, _number(name, text), holder)
    try:
        parameter_space(build, index).set_index_parameters(index, parameters)
    except RuntimeError as error:
        known = ", ".join(parameter_ranges(build, index)) or "none"
        raise ParameterError(
            f"{type(index).__name__} does not take the parameters {parameters!r}, it has {known}"
        ) from error


def _number(name: str, text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ParameterError(f"{name} is {text!r}, expected a number")
    number = float(text)
    return int(number) if number.is_integer() else number


def parameter_ranges(build: FaissBuild, index: Any) -> dict[str, list[float]]:
    """Return the values of each parameter that faiss would try."""
    space = parameter_space(build, index)
    space.initialize(index)
    ranges = space.parameter_ranges
    # Each is a copy, whose values go with it.
    copies = [ranges.at(number) for number in range(ranges.size())]
    return {each.name: build.module.vector_to_array(each.values).tolist() for each in copies}


def explore(
    build: FaissBuild, index: Any, queries: Tensor, truth: Tensor, experiments: int
) -> list[OperatingPoint]:
    """Search with many settings and return those that no other beats in both recall and time.

    Args:
        build: the faiss that made the index.
        index: searched on as it is; its parameters change.
        queries: ``(Q, D)`` float32.
        truth: ``(Q, K)`` int64, the rows that should be found.
        experiments: at most so many settings; 0 tries all.

    Returns:
        The best settings, the quickest first.
    """
    space = parameter_space(build, index)
    space.initialize(index)
    space.verbose = 0
    space.n_experiments = experiments
    criterion = build.module.IntersectionCriterion(len(queries), truth.shape[1])
    criterion.set_groundtruth(None, truth.cpu().numpy())
    rows = queries.detach().to("cpu", torch.float32).contiguous().numpy()
    with placed(build, index):
        explored = space.explore(index, rows, criterion)
    # The points live as long as what was explored.
    best = explored.optimal_pts
    points = [best.at(number) for number in range(best.size())]
    # The point of no search comes first.
    return [OperatingPoint(float(p.perf), float(p.t), str(p.key)) for p in points if p.cno >= 0]


def parameter_space(build: FaissBuild, index: Any) -> Any:
    """Return faiss's parameter space for where the index lies.

    Raises:
        ImplementationError: an index of bits, for which faiss has none.
    """
    if kind_of(build, index) is BITS:
        name = type(index).__name__
        raise ImplementationError(f"faiss's ParameterSpace takes no {name}; set parameters as attributes")
    on_gpus = index_gpu(index) is not None or gpus_inside(index)
    return build.module.GpuParameterSpace() if on_gpus else build.module.ParameterSpace()
