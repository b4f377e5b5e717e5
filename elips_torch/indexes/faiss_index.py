"""Indexes of faiss that the library has no class for, as modules."""

import os
from typing import Any, Self

import torch
from torch import Tensor

from elips_torch.core.errors import (
    ArgumentError,
    ConversionError,
    DtypeError,
    DuplicateIdError,
    ImplementationError,
    IndexFileError,
    MetricError,
    NonFiniteError,
    NotEmptyError,
    NotFittedError,
    ParameterError,
)
from elips_torch.core.metric import resolve_metric
from elips_torch.core.tiling import DEFAULT_WORKSPACE_BYTES
from elips_torch.core.validation import (
    check_count,
    check_unique,
    check_usable,
    check_values,
    check_vectors,
    check_workspace,
)
from elips_torch.engines.faiss import opaque, tuning
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.consistency import check_consistent
from elips_torch.engines.faiss.index_files import read_index
from elips_torch.engines.faiss.looks import are_finite, check_finite_rows
from elips_torch.engines.faiss.row_search import RowSearch
from elips_torch.engines.faiss.search import gpus_inside
from elips_torch.engines.faiss.search_parameters import ATTRIBUTES_ONLY, check_value, may_take_selectors
from elips_torch.engines.faiss.transfer import to_cpu
from elips_torch.engines.faiss.tuning import OperatingPoint
from elips_torch.indexes.faiss_vectors import FaissVectors
from elips_torch.indexes.storage import durable
from elips_torch.indexes.untraced import untraced
from elips_torch.kernels.selection import Selection

_ALL = (-torch.inf, torch.inf)


class FaissIndex(FaissVectors):
    """An index of faiss of any family, with the verbs of every index: HNSW, LSH, RaBitQ, NSG, ...

    faiss searches, and its scores and its order are returned. What it cannot do is done around it: ids are
    the users' own, masks and exclusions go by faiss's selectors where the family takes them and by asking
    for more rows where it does not, and rows that `remove` or `upsert` give up are hidden, since most
    families cannot take them out: their memory comes back at `reset`. Of an ``IndexBinaryIVF`` or
    ``IndexIVFPQFastScan`` in memory, which take no selector, a copy without them takes the place. Where
    queries require gradients, scores are those of the vectors that the index reconstructs, if it does;
    faiss's own may differ.

    Search parameters are those of the family, as attributes and as keywords of `search`: ``nprobe``,
    ``efSearch``, ``k_factor``, and ``quantizer_...`` for those of a coarse quantizer; ``search_L`` of NSG
    and ``nflip`` of hashes of bits as attributes only.

    An index of bits (``IndexBinaryIVF``, ``IndexBinaryHNSW``, ``IndexBinaryHash``, ...) takes vectors and
    queries of zeros and ones, or packed ones ``(N, D / 8)`` uint8 as faiss and `pack_bits` order them, and
    gives vectors of zeros and ones. Its metric is "l2", whose scores are the Hamming distances.

    Args:
        faiss_index: any index, used as it is and not copied, but where it keeps labels of its own in
            inverted lists. Those labels, or those of an id map, become the ids.
        metric: "cosine" for an index of inner products normalises vectors and queries; default: as in
            the index.
        k: number of neighbours that `search` returns by default.
        index_in_state_dict: whether checkpoints hold the index.
        check_finite: whether vectors and queries are checked for NaN and infinity; of vectors that are in
            faiss_index already, those that lie in one place as they are (flat ones, also behind a graph).
        workspace_bytes: limit on temporary memory of searches with masks or exclusions. Default 256 MiB.

    Attributes:
        faiss_index: the index, whose row numbers `places` lists; what is written to it is not noticed.
        places: ``(ntotal,)`` int64, the row of faiss's index that is each of this.
        ids: ``(ntotal,)`` int64, the label of each row.

    Raises:
        ElipsError: no index of faiss, a metric that the library or the index does not have, or vectors that
            are not finite.
        ImportError: faiss is not installed.

    >>> import torch
    >>> index = FaissIndex.from_factory(4, "HNSW8", efSearch=32)
    >>> vectors = torch.eye(4)
    >>> index.add(vectors, ids=[40, 30, 20, 10])
    tensor([40, 30, 20, 10])
    >>> index.search(vectors[0], k=1)
    SearchResult(scores=tensor([0.]), ids=tensor([40]))
    """

    def __init__(
        self,
        faiss_index: Any,
        *,
        metric: str | None = None,
        k: int = 10,
        index_in_state_dict: bool = True,
        check_finite: bool = True,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    ) -> None:
        build = load_installed()
        opaque.check_index(build, faiss_index)
        faiss_index = to_cpu(build, faiss_index)
        kind = opaque.metric_of_index(build, faiss_index)
        if metric is not None:
            wanted = resolve_metric(metric, kind.p if kind.name == "lp" else None)
            if wanted.name not in (kind.name, "cosine" if kind.name == "ip" else kind.name):
                raise MetricError(f"metric is {wanted.name!r}, faiss_index has {kind.name!r}")
            kind = wanted
        super().__init__(
            int(faiss_index.d),
            kind.name,
            k=k,
            p=kind.p if kind.name == "lp" else None,
            index_in_state_dict=index_in_state_dict,
            check_finite=check_finite,
            workspace_bytes=workspace_bytes,
        )
        if check_finite:
            check_finite_rows(build, faiss_index)
        index, labels = opaque.without_labels(build, faiss_index)
        if labels is None:
            labels = torch.arange(int(index.ntotal))
        elif len(labels):
            check_unique("the labels of faiss_index", labels)
            if int(labels.min()) < 0:
                raise ConversionError(f"faiss_index has the negative label {int(labels.min())}")
        self._hold(index)
        with durable():
            self.register_buffer("places", torch.empty(0, dtype=torch.int64))
        self._append_rows({"places": torch.arange(len(labels)), "ids": labels})
        self._id_map.rebuild(self.ids)
        self._next_id = int(labels.max()) + 1 if len(labels) else 0

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        metric: str | None = None,
        **options: Any,
    ) -> Self:
        """Read a file of faiss that holds an index of any family, as it is.

        Args:
            path: what ``faiss.write_index``, ``faiss.write_index_binary`` or `write_faiss` wrote; `load`
                reads what `save` wrote.
            device: where the index goes; faiss has some families on GPUs.
            metric: as for the class.
            **options: as for the class, and search parameters.

        Raises:
            FileNotFoundError: there is no such file.
            DeviceError: there is no such device.
            IndexFileError: a truncated, damaged or foreign file.
            NonFiniteError: vectors hold NaN or infinity.
            ElipsError: a wrong option, or as for the class.

        >>> import tempfile
        >>> from elips_torch import write_faiss
        >>> index = FaissIndex.from_factory(4, "HNSW8")
        >>> index.add(torch.eye(4), ids=[40, 30, 20, 10])
        tensor([40, 30, 20, 10])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_faiss(index, f"{folder}/graph.faiss")
        ...     FaissIndex.read(f"{folder}/graph.faiss", efSearch=64).ids
        tensor([40, 30, 20, 10])
        """
        check_usable("device", device)
        build = load_installed()
        index = read_index(build, path, bits=True)
        try:
            check_consistent(build, index)
            made = cls._configured(index, metric, options)
        except (ConversionError, DuplicateIdError) as error:
            raise IndexFileError(f"{os.fspath(path)!r}: {error}") from error
        except NonFiniteError as error:
            raise NonFiniteError(f"{os.fspath(path)!r}: {error}") from error
        return made.to(device)

    @classmethod
    def from_factory(
        cls, dim: int, description: str, metric: str = "l2", *, p: float | None = None, **options: Any
    ) -> Self:
        """Make an empty index from a description in faiss's grammar.

        Args:
            dim: D, size of a vector.
            description: such as "HNSW32" or "IVF1024,PQ16x4fs"; "BHNSW32" and "BIVF1024" are of bits.
            metric: name of the distance kind, or an alias.
            p: exponent of metric "lp".
            **options: as for the class, and search parameters.

        Raises:
            ElipsError: faiss knows no such index, or an argument has a wrong type or value.

        >>> FaissIndex.from_factory(16, "LSH").faiss_index.nbits
        16
        """
        kind = resolve_metric(metric, p)
        index = opaque.build_index(load_installed(), dim, description, kind)
        return cls._configured(index, kind.name, options)

    @classmethod
    def _configured(cls, index: Any, metric: str | None, options: dict[str, Any]) -> Self:
        """Return a module around an index, with settings and search parameters."""
        settings = {name: options.pop(name) for name in list(options) if name in cls._settings()}
        made = cls(index, metric=metric, **settings)
        made._check_parameters(options)
        for name, value in options.items():
            setattr(made, name, value)
        return made

    @staticmethod
    def _settings() -> tuple[str, ...]:
        return ("k", "index_in_state_dict", "check_finite", "workspace_bytes")

    def _current_search(self) -> RowSearch:
        found: RowSearch | None = self._search_rows
        if found is None:
            if not self.is_trained:
                raise NotFittedError(f"{type(self._faiss).__name__} cannot be searched before fit(vectors)")
            places, total = self.places, int(self._faiss.ntotal)
            rows = torch.arange(len(places), device=places.device)
            row_of = None
            if total != len(places) or not torch.equal(places, rows):
                row_of = torch.full((total,), -1, device=places.device)
                row_of[places] = rows
            selectors = may_take_selectors(self._build, self._faiss)
            found = RowSearch(self._build, self._faiss, self._metric, row_of, places, selectors=selectors)
            self._search_rows = found
        return found

    # Search parameters live in faiss's index.

    @property
    def search_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of what `search` takes as keywords for one call."""
        return (*(self._holders), "workspace_bytes")

    def __getattr__(self, name: str) -> Any:
        buffers = self.__dict__.get("_buffers")
        if buffers and name in buffers:
            # Each search asks for the ids.
            return buffers[name]
        holder = self.__dict__.get("_holders", {}).get(name)
        return super().__getattr__(name) if holder is None else getattr(*holder)

    def __setattr__(self, name: str, value: Any) -> None:
        holder = self.__dict__.get("_holders", {}).get(name)
        if holder is None:
            super().__setattr__(name, value)
            return
        self._check_parameters({name: value})
        owner, attribute = holder
        setattr(owner, attribute, type(getattr(owner, attribute))(value))

    def _check_parameters(self, parameters: dict[str, Any]) -> None:
        super()._check_parameters(parameters)
        for name, value in parameters.items():
            if name in self._holders:
                check_value(name, value, self._holders[name])

    @untraced
    def set_parameters(self, parameters: str) -> None:
        """Set search parameters as faiss's ``ParameterSpace`` does.

        Args:
            parameters: such as ``"nprobe=16,quantizer_efSearch=64"``.

        Raises:
            ParameterError: one that the index does not have, or no number.
            ArgumentError: a value out of range; no parameter is set.
        """
        tuning.set_parameters(self._build, self._faiss, parameters)

    def parameter_ranges(self) -> dict[str, list[float]]:
        """Return the values of each search parameter that `explore` tries."""
        return tuning.parameter_ranges(self._build, self._faiss)

    @untraced
    def explore(self, queries: Tensor, true_ids: Tensor, *, experiments: int = 100) -> list[OperatingPoint]:
        """Find what settings of search parameters give, by faiss's ``ParameterSpace``.

        A copy of the index is searched on a CPU; on GPUs it is this one, whose parameters are put back.

        Args:
            queries: ``(Q, D)``, as for `search`.
            true_ids: ``(Q, K)`` int64, the ids that should be found, such as `FlatIndex` finds.
            experiments: at most so many settings are tried; 0 tries all.

        Returns:
            Settings that no other beats in both recall and time, the quickest first; `set_parameters` takes
            their ``parameters``.

        Raises:
            ElipsError: an argument has a wrong type, shape, device or value, or the index holds bits.
        """
        tuning.parameter_space(self._build, self._faiss)
        check_vectors("queries", queries, dim=self.dim, device=self.device)
        check_count("experiments", experiments, least=0)
        if not isinstance(true_ids, Tensor) or true_ids.dtype != torch.int64:
            raise DtypeError(f"true_ids is {true_ids!r}, expected an int64 tensor")
        if true_ids.ndim != 2 or len(true_ids) != len(queries):
            raise ArgumentError(f"true_ids has shape {tuple(true_ids.shape)}, expected ({len(queries)}, K)")
        rows = self._rows_of(true_ids)
        truth = torch.where(rows < 0, -1, self.places[rows.clamp_min(0)])
        rows = self._as_faiss(queries.detach())
        if self.device.type == "cpu" and not gpus_inside(self._faiss):
            copied = opaque.copied(self._build, self._faiss)
            return tuning.explore(self._build, copied, rows, truth, experiments)
        before = {name: getattr(*where) for name, where in self._holders.items()}
        try:
            return tuning.explore(self._build, self._faiss, rows, truth, experiments)
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @property
    def nlist(self) -> int | None:
        """Number of inverted lists, None where there are none."""
        lists = opaque.inverted_file(self._build, self._faiss)
        return None if lists is None else int(lists.nlist)

    # Rows.

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return bool(self._faiss.is_trained)

    @untraced
    def fit(self, vectors: Tensor) -> Self:
        """Train faiss's index on ``(N, D)`` vectors like those to come.

        Returns:
            The index itself.

        Raises:
            NotEmptyError: the index holds vectors.
            ElipsError: vectors that do not fit, or that faiss refuses to train on.
        """
        if self._faiss.ntotal:
            raise NotEmptyError(
                f"fit was called on an index that holds {self.ntotal} vectors; call reset() first"
            )
        opaque.train(self._build, self._faiss, self._as_faiss(self._check_new(vectors)))
        opaque.prepare_to_reconstruct(self._build, self._faiss)
        return self

    @untraced
    def reset(self) -> None:
        """Remove every vector, and give the memory of those removed before back; see `Index.reset`."""
        self._hold(opaque.emptied(self._build, self._faiss))
        super().reset()

    # Searches.

    def _search(
        self,
        queries: Tensor,
        k: int,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        values, workspace = self._search_settings(queries, implementation, parameters)
        rows = self._as_faiss(queries, "queries")
        return self._current_search().search(rows, k, selection, values, workspace)

    def _range_search(
        self,
        queries: Tensor,
        radius: Tensor,
        selection: Selection,
        implementation: str,
        parameters: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, _ = self._search_settings(queries, implementation, parameters)
        rows, ranks = self._as_faiss(queries, "queries"), self._current_id_map().ranks(self.ids)
        return self._current_search().range_search(rows, radius, selection, values, ranks)

    def _search_settings(
        self, queries: Tensor, implementation: str, parameters: dict[str, Any]
    ) -> tuple[dict[str, Any], int]:
        if implementation not in ("auto", "faiss"):
            raise ImplementationError(f"implementation is {implementation!r}, a FaissIndex has 'faiss' only")
        if self.check_finite and queries.dtype != torch.uint8:
            self._check_finite(queries)
        if not parameters:
            return parameters, check_workspace(self.workspace_bytes)
        workspace = check_workspace(self._parameter(parameters, "workspace_bytes"))
        values = {name: value for name, value in parameters.items() if name != "workspace_bytes"}
        for name in values:
            if name in ATTRIBUTES_ONLY:
                raise ParameterError(
                    f"faiss takes {name} for no single call; set index.{name} = {values[name]}"
                )
        return values, workspace

    def _check_finite(self, queries: Tensor) -> None:
        plain = queries.dtype == torch.float32 and queries.device.type == "cpu" and queries.is_contiguous()
        if not (plain and self._metric.domain == _ALL and are_finite(self._build, queries)):
            check_values("queries", queries, self._metric)

    # State.

    def memory_bytes(self) -> int:
        """Return the bytes of faiss's index as it would be written, and of ids."""
        return super().memory_bytes() + opaque.count_bytes(self._build, self._faiss)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        settings = "".join(f", {name}={getattr(*where):g}" for name, where in self._holders.items())
        hidden = int(self._faiss.ntotal) - self.ntotal
        trained = "" if self.is_trained else ", not fitted"
        return (
            f"{type(self._faiss).__name__}, {super().extra_repr()}{settings}"
            f"{f', hidden={hidden}' if hidden else ''}{trained}"
        )

    def config(self) -> dict[str, Any]:
        """Return the settings beside what faiss's index says of itself, for JSON."""
        return {
            "dim": self.dim,
            "metric": self.metric,
            "p": self.p,
            "bits": self._of_bits,
            **{name: getattr(self, name) for name in self._settings()},
        }

    @classmethod
    def _from_config(cls, config: dict[str, Any], device: torch.device | str | None) -> Self:
        settings = {name: config[name] for name in cls._settings()}
        # A stand-in; the state brings the index itself.
        description = "BFlat" if config.get("bits") else "Flat"
        made = cls.from_factory(config["dim"], description, config["metric"], p=config["p"], **settings)
        return made if device is None else made.to(device)
