"""Indexes of faiss and its files, brought here and taken back."""

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from elips_torch.core.errors import (
    ArgumentError,
    ConversionError,
    DamagedIndexError,
    DeviceError,
    DtypeError,
    IndexFileError,
    NonFiniteError,
)
from elips_torch.core.validation import check_flag, check_usable, read_device
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.construct import construct
from elips_torch.engines.faiss.describe import describe
from elips_torch.engines.faiss.descriptions import (
    Description,
    IDMapDescription,
    NormalizationDescription,
    PreTransformDescription,
)
from elips_torch.engines.faiss.gpu_options import read_options
from elips_torch.engines.faiss.gpu_resources import check_gpu
from elips_torch.engines.faiss.handover import hand_over
from elips_torch.engines.faiss.index_files import read_index, write_index
from elips_torch.engines.faiss.transfer import to_gpu
from elips_torch.indexes.base import Index
from elips_torch.indexes.described_indexes import DescriptionOptions, describe_bits, describe_index
from elips_torch.indexes.faiss_index import FaissIndex
from elips_torch.indexes.restored_indexes import restore_index
from elips_torch.indexes.wrappers import WrapperIndex

Device: TypeAlias = torch.device | str
_A_PLACE = "the CPU, a GPU such as 'cuda:0', or several GPUs"


def from_faiss(index: Any, device: torch.device | str = "cpu") -> Index:
    """Make an index of this library from one of faiss, value for value.

    Flat, PQ, SQ (8, 6 and 4 bits, fp16, bf16) and inverted files of the three come over, behind PCA, OPQ,
    rotations, ITQ, centring and normalisation, under id maps, and with refinement, one inside the other.
    Searches find the same ids where scores do not tie, and go on to further lists where those that faiss
    reads hold fewer than k vectors; scores are equal to float rounding. Inner products of vectors that faiss
    normalises ("L2norm,Flat", "L2norm,IVF...,Flat") become the metric "cosine". An inverted file keeps no
    order of its rows: they come by ascending id, which is the order of insertion unless own ids were given.

    ``IndexBinaryFlat``, also under an id map, becomes a `FlatIndex` of zeros and ones, whose squared
    distances are faiss's Hamming distances; `unpack_bits` makes its queries. Its vectors are float16, which
    takes 16 times the memory of the bits, and what screening takes beside them.

    Args:
        index: of faiss, on the CPU or on GPUs, or a `FaissIndex`, whose ids come along and whose removed rows
            do not; it may be dropped or changed after.
        device: where to put the database.

    Returns:
        A `FlatIndex`, `SQIndex`, `PQIndex`, `IVFFlatIndex`, `IVFSQIndex`, `IVFPQIndex`, `PreTransformIndex`
        or `RefineIndex`.

    Raises:
        DtypeError: no index of faiss.
        ConversionError: a kind of index, a metric or a setting that has no counterpart; the message names it.
            `FaissIndex` serves such an index as it is.
        NonFiniteError: vectors hold NaN or infinity.
        DeviceError: a GPU is asked for, and there is none.
        ImportError: faiss is not installed.

    >>> import torch
    >>> from elips_torch import FlatIndex
    >>> index = FlatIndex(2)
    >>> index.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([0, 1])
    >>> from_faiss(index.to_faiss()).reconstruct(1)
    tensor([3., 4.])
    """
    check_usable("device", device)
    if isinstance(index, FaissIndex):
        return _from_module(index, device)
    return restore_index(describe(load_installed(), index), device)


def _from_module(index: FaissIndex, device: Device) -> Index:
    """Convert the index of faiss inside a module, under the ids of that one."""
    description: Description = describe(load_installed(), index.faiss_index)
    ids, places = index.ids.cpu(), index.places.cpu()
    rows = torch.arange(int(index.faiss_index.ntotal), device="cpu")
    # Rows that are hidden there come under ids that nobody has, and are removed here.
    hidden = rows[~torch.isin(rows, ids)][: len(rows) - len(ids)]
    labels = rows.clone()
    labels[~torch.isin(rows, places)] = hidden
    labels[places] = ids
    if not torch.equal(labels, rows):
        description = IDMapDescription(description, labels)
    if index.metric == "cosine":
        description = PreTransformDescription((NormalizationDescription(index.dim),), description)
    made = restore_index(description, device)
    if len(hidden):
        made.remove(hidden.to(made.device))
    innermost = made
    while isinstance(innermost, WrapperIndex):
        innermost = innermost.index
    innermost._next_id = index._next_id
    return made


def to_faiss(
    index: Index,
    device: Device | Sequence[Device] | None = None,
    *,
    binary: bool = False,
    precomputed_tables: bool | None = None,
    **gpu_options: Any,
) -> Any:
    """Make an index of faiss; see `Index.to_faiss`."""
    check_flag("binary", binary)
    if precomputed_tables is not None:
        check_flag("precomputed_tables", precomputed_tables)
    build = load_installed()
    numbers = gpu_numbers(device)
    options = read_options(precomputed_tables=bool(precomputed_tables), **gpu_options)
    if gpu_options and not numbers:
        raise ArgumentError(f"{', '.join(gpu_options)}: options of indexes on GPUs, device is {device}")
    if binary and numbers:
        raise DeviceError(f"device is {device}, binary=True makes indexes on the CPU")
    for number in numbers:
        # Before memory is filled.
        check_gpu(build, number)
    if binary and not (isinstance(index, FaissIndex) and index._of_bits):
        return construct(build, describe_bits(index))
    if isinstance(index, FaissIndex):
        if precomputed_tables is not None and not numbers:
            raise ArgumentError("precomputed_tables: a FaissIndex on the CPU has them or not as it is")
        made = hand_over(
            build,
            index.faiss_index,
            index.places,
            index.ids,
            normalizes=index.metric == "cosine",
            # Faiss makes some families with options of a GPU, and nothing around them.
            keeps_family=options.needs_config,
        )
    else:
        made = construct(build, describe_index(index, index.ids, DescriptionOptions(precomputed_tables)))
    return to_gpu(build, made, numbers, options) if numbers else made


def gpu_numbers(device: Device | Sequence[Device] | None) -> list[int]:
    """Return the numbers that faiss has for GPUs, none for the CPU."""
    if isinstance(device, Sequence) and not isinstance(device, str | bytes):
        numbers = [gpu_numbers(each) for each in device]
        if not numbers or not all(numbers):
            raise DeviceError(f"device is {list(device)}, expected GPUs only")
        return [number for each in numbers for number in each]
    place = read_device("device", "cpu" if device is None else device, _A_PLACE)
    if place.type not in ("cpu", "cuda"):
        raise DeviceError(f"device is {place}, faiss has indexes on the CPU and on CUDA and ROCm GPUs")
    if place.type == "cpu":
        return []
    if place.index is not None:
        return [place.index]
    return [torch.cuda.current_device() if torch.cuda.is_available() else 0]


def read_faiss(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Index:
    """Read a file that faiss or `write_faiss` wrote, of floats or of bits; see `from_faiss`.

    `FaissIndex.read` reads those whose family has no counterpart here.

    Args:
        path: the file.
        device: where to put the database.

    Raises:
        FileNotFoundError: there is no such file.
        IndexFileError: a truncated, damaged or foreign file.
        ElipsError: as for `from_faiss`; the message names the file.
    """
    check_usable("device", device)
    build = load_installed()
    index = read_index(build, path, bits=True)
    try:
        return restore_index(describe(build, index), device)
    except DamagedIndexError as error:
        raise IndexFileError(f"{os.fspath(path)!r}: {error}") from error
    except (ConversionError, NonFiniteError) as error:
        raise type(error)(f"{os.fspath(path)!r}: {error}") from error
    except ArgumentError as error:
        # No class of this library has such settings.
        raise IndexFileError(f"{os.fspath(path)!r} is damaged: {error}") from error


def write_faiss(index: Index, path: str | os.PathLike[str], *, binary: bool = False) -> None:
    """Write an index to a file that ``faiss.read_index`` reads, which appears whole or not at all.

    Args:
        index: any index that `Index.to_faiss` takes.
        path: where to write; an existing file is replaced.
        binary: write an index of bits, which ``faiss.read_index_binary`` reads; see `Index.to_faiss`.

    Raises:
        ConversionError: the index has no counterpart in faiss, or ``binary`` is asked of vectors that are no
            bits.
        IndexFileError: faiss could not write the file.
        FileNotFoundError: there is no such folder.

    >>> import tempfile
    >>> import torch
    >>> from elips_torch import FlatIndex
    >>> index = FlatIndex(2, "ip")
    >>> index.add(torch.tensor([[0.0, 1.0], [3.0, 4.0]]), ids=[7, 5])
    tensor([7, 5])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_faiss(index, f"{folder}/two.faiss")
    ...     read_faiss(f"{folder}/two.faiss").ids
    tensor([7, 5])
    """
    if not isinstance(index, Index):
        raise DtypeError(f"index is of type {type(index).__name__}, expected an Index; faiss writes its own")
    write_index(load_installed(), index.to_faiss(binary=binary), path)
