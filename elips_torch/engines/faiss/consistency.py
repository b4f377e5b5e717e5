"""Whether an index of faiss and those inside it agree on their sizes, which faiss takes on trust."""

from collections.abc import Iterator
from typing import Any

from elips_torch.core.errors import DamagedIndexError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.row_kinds import BITS, LARGEST_HASH, downcast, kind_of

# What encodes vectors in an index of faiss, by the name of the member.
_QUANTIZERS = ("pq", "sq", "rabitq", "aq")
# Vectors that fast scans read together, at most.
_LARGEST_BLOCK = 2**16


def check_consistent(build: FaissBuild, index: Any) -> None:
    """Check that the parts of an index on the CPU fit together.

    Where they do not, searches read memory that is not theirs.

    Args:
        build: the faiss whose index it is.
        index: of floats or of bits.

    Raises:
        DamagedIndexError: two sizes contradict each other; the message names them.
    """
    index = downcast(build, index)
    sizes = _sizes_of_bits if kind_of(build, index) is BITS else _sizes
    for what, size, wanted in (("dim", index.d, max(1, index.d)), *sizes(build, index)):
        if size != wanted:
            raise DamagedIndexError(
                f"index is damaged: in its {type(index).__name__} {what} is {size}, expected {wanted}"
            )
    for _, inner in indexes_inside(build, index):
        check_consistent(build, inner)


def indexes_inside(build: FaissBuild, index: Any) -> list[tuple[str, Any]]:
    """Return the indexes that one index holds, by name."""
    faiss = build.module
    names: tuple[str, ...] = ()
    wrappers = (faiss.IndexPreTransform, faiss.IndexIDMap, faiss.IndexBinaryIDMap, faiss.IndexBinaryFromFloat)
    graphs = (faiss.IndexHNSW, faiss.IndexNSG, faiss.IndexBinaryHNSW)
    if isinstance(index, wrappers):
        names = ("index",)
    elif isinstance(index, faiss.IndexRefine):
        names = ("base_index", "refine_index")
    elif isinstance(index, (*graphs, faiss.IndexBinaryMultiHash)):
        names = ("storage",)
    elif isinstance(index, faiss.IndexIVF | faiss.IndexBinaryIVF):
        names = ("quantizer",)
    found = ((name, getattr(index, name)) for name in names)
    return [(name, downcast(build, inner)) for name, inner in found if inner is not None]


def _sizes(build: FaissBuild, index: Any) -> Iterator[tuple[str, int, int]]:
    """Yield what has a size, that, and what it must be."""
    faiss = build.module
    dim = index.d
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            transform = index.chain.at(number)
            yield f"the dim before transform {number}", transform.d_in, dim
            yield from _transform_sizes(faiss.downcast_VectorTransform(transform), f"transform {number}")
            dim = transform.d_out
    elif isinstance(index, faiss.IndexIDMap):
        yield "the number of ids", index.id_map.size(), index.ntotal
    elif isinstance(index, faiss.IndexHNSW):
        yield "the number of nodes", index.hnsw.levels.size(), index.ntotal
    elif isinstance(index, faiss.IndexFlatCodes):
        yield "the size of the codes", index.codes.size(), index.ntotal * index.code_size
    elif isinstance(index, faiss.IndexIVF) and index.invlists is not None:
        yield "the number of lists", index.invlists.nlist, index.nlist
        yield "the size of the lists", index.invlists.compute_ntotal(), index.ntotal
    if isinstance(index, faiss.IndexLSH):
        yield from _hash_sizes(index)
    for name in _QUANTIZERS:
        if hasattr(index, name):
            yield from _quantizer_sizes(build, index, name)
    yield from _sizes_inside(build, index)


def _transform_sizes(transform: Any, name: str) -> Iterator[tuple[str, int, int]]:
    """Yield the same of what turns vectors into others by a matrix."""
    if hasattr(transform, "A") and transform.is_trained:
        yield f"the size of the matrix of {name}", transform.A.size(), transform.d_in * transform.d_out
        if transform.have_bias:
            yield f"the size of the bias of {name}", transform.b.size(), transform.d_out


def _hash_sizes(index: Any) -> Iterator[tuple[str, int, int]]:
    """Yield the same of what keeps a bit of each feature, or of each direction."""
    most = index.nbits if index.rotate_data else index.d
    yield "the number of bits", index.nbits, max(1, min(index.nbits, most))
    yield "the size of a code", index.code_size, (index.nbits + 7) // 8
    if index.train_thresholds and index.is_trained:
        yield "the number of thresholds", index.thresholds.size(), index.nbits
    if index.rotate_data:
        yield "the dim before the rotation", index.rrot.d_in, index.d
        yield "the dim after the rotation", index.rrot.d_out, index.nbits
        yield from _transform_sizes(index.rrot, "the rotation")


def _sizes_of_bits(build: FaissBuild, index: Any) -> Iterator[tuple[str, int, int]]:
    """Yield the same of an index of bits."""
    faiss = build.module
    yield "the size of a code", 8 * index.code_size, index.d
    if isinstance(index, faiss.IndexBinaryFlat):
        yield "the size of the codes", index.xb.size(), index.ntotal * index.code_size
    elif isinstance(index, faiss.IndexBinaryIDMap):
        yield "the number of ids", index.id_map.size(), index.ntotal
    elif isinstance(index, faiss.IndexBinaryHNSW):
        yield "the number of nodes", index.hnsw.levels.size(), index.ntotal
    elif isinstance(index, faiss.IndexBinaryIVF) and index.invlists is not None:
        yield "the number of lists", index.invlists.nlist, index.nlist
        yield "the size of the lists", index.invlists.compute_ntotal(), index.ntotal
        yield "the code size of the lists", index.invlists.code_size, index.code_size
    elif isinstance(index, faiss.IndexBinaryHash):
        yield "the number of hashed bits", index.b, max(1, min(index.b, index.d, LARGEST_HASH))
        yield "the number of flipped bits", index.nflip, max(0, min(index.nflip, index.b))
    elif isinstance(index, faiss.IndexBinaryMultiHash):
        most = index.d // max(1, index.nhash)
        yield "the number of hashed bits", index.b, max(1, min(index.b, most))
        yield "the number of flipped bits", index.nflip, max(0, min(index.nflip, index.b))
    yield from _sizes_inside(build, index)


def _sizes_inside(build: FaissBuild, index: Any) -> Iterator[tuple[str, int, int]]:
    """Yield the sizes of the indexes inside, and what they must be."""
    dim = index.d
    if isinstance(index, build.module.IndexPreTransform) and index.chain.size():
        dim = index.chain.at(index.chain.size() - 1).d_out
    for name, inner in indexes_inside(build, index):
        yield f"the dim of the {name}", inner.d, dim
        if name == "quantizer":
            yield "the number of centroids", max(inner.ntotal, index.nlist), index.nlist
        else:
            yield f"the number of vectors of the {name}", inner.ntotal, index.ntotal


def _quantizer_sizes(build: FaissBuild, index: Any, name: str) -> Iterator[tuple[str, int, int]]:
    """Yield the same of what encodes vectors in an index."""
    coder = getattr(index, name)
    yield f"the dim of the {name}", coder.d, index.d
    # Coarse quantizers keep no codes.
    if hasattr(index, "code_size"):
        # Two layers have a code each.
        own_size = index.code_size_2 if isinstance(index, build.module.Index2Layer) else index.code_size
        yield f"the code size of the {name}", coder.code_size, own_size
    if name == "pq":
        yield "the dim of the parts", coder.dsub * coder.M, index.d
        if index.is_trained:
            yield "the size of the centroids", coder.centroids.size(), coder.d * coder.ksub
    if name == "sq":
        kinds = build.module.ScalarQuantizer
        known = [getattr(kinds, each) for each in dir(kinds) if each.startswith("QT_")]
        yield "the type of the scalars", coder.qtype, min(known, key=lambda kind: abs(kind - coder.qtype))
        by_feature = coder.qtype in (kinds.QT_8bit, kinds.QT_6bit, kinds.QT_4bit)
        uniform = coder.qtype in (kinds.QT_8bit_uniform, kinds.QT_4bit_uniform)
        if index.is_trained:
            trained = 2 * index.d if by_feature else 2 if uniform else 0
            yield "the size of what the scalars have learned", coder.trained.size(), trained
    if hasattr(index, "bbs"):
        # Codes are read in blocks, of vectors and of pairs of parts.
        yield "the size of a block", index.bbs, max(32, min(index.bbs, _LARGEST_BLOCK) // 32 * 32)
        yield "the number of parts", index.M2, (index.M + 1) // 2 * 2
        if hasattr(index, "codes"):
            wanted = -(-index.ntotal // index.bbs) * index.bbs if index.ntotal else 0
            yield "the number of vectors in blocks", index.ntotal2, wanted
            # Some have more beside the codes.
            least = index.ntotal2 * index.M2 // 2
            yield "the size of the blocks", min(index.codes.size(), least), least
