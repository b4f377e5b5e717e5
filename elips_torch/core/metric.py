"""The distance kinds: names, order, definition and gradient of each.

The definition is the law of the library: a score is `Metric.score` accumulated in float64 and
rounded once to float32. Values are those of faiss, so "l2" is squared and "lp" takes no root.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from elips_torch.core.errors import MetricError

# How a fast approximation of a tile of scores is computed: by one matrix product, by
# `torch.cdist`, or not at all (then the definition itself is evaluated).
Form = Literal["product", "minkowski", "elementwise"]
PairFunction = Callable[[Tensor, Tensor, float], Tensor]

# From this many terms on, torch splits a sum that stands alone among its threads.
_SPLIT_SUM = 32768


@dataclasses.dataclass(frozen=True)
class Metric:
    """One distance kind.

    Attributes:
        name: canonical name.
        aliases: other names that users type.
        higher_is_better: True where larger scores are nearer (inner product, cosine).
        form: how a fast approximation of a tile of scores can be computed.
        pair_score: the definition, on float64 tensors that broadcast, reducing the last axis.
        pair_gradient: the derivative of the definition by its first argument. Every metric is
            symmetric, so swapping the arguments gives the derivative by the second.
        domain: lowest and highest value that a feature may have.
        p: exponent of "lp"; unused by the others.
    """

    name: str
    aliases: tuple[str, ...]
    higher_is_better: bool
    form: Form
    pair_score: PairFunction = dataclasses.field(repr=False)
    pair_gradient: PairFunction = dataclasses.field(repr=False)
    domain: tuple[float, float] = (-math.inf, math.inf)
    p: float = 0.0

    @property
    def worst(self) -> float:
        """Score of a place that no row could fill."""
        return -math.inf if self.higher_is_better else math.inf

    def score(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """Return the definition for float64 ``(..., D)`` tensors that broadcast; drops ``D``."""
        if queries.shape[-1] < _SPLIT_SUM:
            return self.pair_score(queries, vectors, self.p)
        # The order of the terms must not depend on the pairs beside: no sum may stand alone.
        queries, vectors = torch.broadcast_tensors(queries, vectors)
        twice = (2, *queries.shape)
        return self.pair_score(queries.expand(twice), vectors.expand(twice), self.p)[0]

    def rounded_score(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """Return `score` rounded once to float32, which is what users see; zero has no sign."""
        return self.score(queries, vectors).float() + 0.0

    def gradient(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """Return d score / d queries for float64 ``(..., D)`` tensors that broadcast."""
        return self.pair_gradient(queries, vectors, self.p)


def _l2(q: Tensor, x: Tensor, p: float) -> Tensor:
    return (q - x).square_().sum(-1)


def _l2_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    return 2.0 * (q - x)


def _ip(q: Tensor, x: Tensor, p: float) -> Tensor:
    return (q * x).sum(-1)


def _ip_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    return x.expand(torch.broadcast_shapes(q.shape, x.shape))


def _norm(x: Tensor) -> Tensor:
    return (x * x).sum(-1).sqrt_()


def _cosine(q: Tensor, x: Tensor, p: float) -> Tensor:
    norms = _norm(q) * _norm(x)
    return torch.where(norms == 0, 0.0, (q * x).sum(-1) / norms)


def _cosine_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    q_norm, x_norm = _norm(q)[..., None], _norm(x)[..., None]
    q_unit, x_unit = q / q_norm, x / x_norm
    gradient = (x_unit - (q_unit * x_unit).sum(-1, keepdim=True) * q_unit) / q_norm
    return torch.where(q_norm * x_norm == 0, 0.0, gradient)


def _l1(q: Tensor, x: Tensor, p: float) -> Tensor:
    return (q - x).abs_().sum(-1)


def _l1_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    return (q - x).sign_()


def _linf(q: Tensor, x: Tensor, p: float) -> Tensor:
    return (q - x).abs_().amax(-1)


def _linf_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    # Features that tie for the largest difference share the gradient evenly, as `amax` does.
    difference = q - x
    size = difference.abs()
    largest = (size == size.amax(-1, keepdim=True)).to(q.dtype)
    return difference.sign_() * largest / largest.sum(-1, keepdim=True)


def _lp(q: Tensor, x: Tensor, p: float) -> Tensor:
    return (q - x).abs_().pow_(p).sum(-1)


def _lp_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    difference = q - x
    slope = p * difference.abs().pow_(p - 1.0) * difference.sign()
    return torch.where(difference == 0, 0.0, slope)


def _canberra(q: Tensor, x: Tensor, p: float) -> Tensor:
    size = q.abs() + x.abs()
    return torch.where(size == 0, 0.0, (q - x).abs_() / size).sum(-1)


def _canberra_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    difference, size = q - x, q.abs() + x.abs()
    slope = (difference.sign() - difference.abs() / size * q.sign()) / size
    return torch.where(size > 0, slope, 0.0)


def _braycurtis(q: Tensor, x: Tensor, p: float) -> Tensor:
    difference, total = (q - x).abs_().sum(-1), (q + x).abs_().sum(-1)
    return torch.where(difference == 0, 0.0, difference / total)


def _braycurtis_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    difference, total = q - x, q + x
    size = total.abs().sum(-1, keepdim=True)
    ratio = difference.abs().sum(-1, keepdim=True) / size
    return torch.where(size > 0, (difference.sign() - ratio * total.sign()) / size, 0.0)


def _jensenshannon(q: Tensor, x: Tensor, p: float) -> Tensor:
    middle = 0.5 * (q + x)
    terms = torch.xlogy(q, q / middle) + torch.xlogy(x, x / middle)
    return 0.5 * torch.where(middle == 0, 0.0, terms).sum(-1)


def _jensenshannon_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    return torch.where(q + x > 0, 0.5 * torch.log(2.0 * q / (q + x)), 0.0)


def _gower(q: Tensor, x: Tensor, p: float) -> Tensor:
    return _l1(q, x, p) / q.shape[-1]


def _gower_gradient(q: Tensor, x: Tensor, p: float) -> Tensor:
    return _l1_gradient(q, x, p) / q.shape[-1]


METRICS: tuple[Metric, ...] = (
    Metric("l2", ("euclidean", "sqeuclidean"), False, "product", _l2, _l2_gradient),
    Metric("ip", ("dot", "inner_product"), True, "product", _ip, _ip_gradient),
    Metric("cosine", ("cos",), True, "product", _cosine, _cosine_gradient),
    Metric("l1", ("manhattan", "cityblock"), False, "minkowski", _l1, _l1_gradient, p=1.0),
    Metric("linf", ("chebyshev",), False, "minkowski", _linf, _linf_gradient, p=math.inf),
    Metric("lp", ("minkowski",), False, "minkowski", _lp, _lp_gradient),
    Metric("canberra", (), False, "elementwise", _canberra, _canberra_gradient),
    Metric("braycurtis", ("bray_curtis",), False, "minkowski", _braycurtis, _braycurtis_gradient, p=1.0),
    Metric(
        "jensenshannon",
        ("jensen_shannon", "js"),
        False,
        "elementwise",
        _jensenshannon,
        _jensenshannon_gradient,
        domain=(0.0, math.inf),
    ),
    Metric("gower", (), False, "minkowski", _gower, _gower_gradient, domain=(0.0, 1.0), p=1.0),
)
_BY_NAME = {name: metric for metric in METRICS for name in (metric.name, *metric.aliases)}


def resolve_metric(metric: str, p: float | None = None) -> Metric:
    """Return the metric that a name or an alias stands for.

    Args:
        metric: a name or an alias, in any case.
        p: exponent of "lp", above 0; to be left out for every other metric.

    Raises:
        MetricError: unknown name, or ``p`` missing, out of range or given where none is taken.

    >>> resolve_metric("euclidean").name
    'l2'
    """
    found = _BY_NAME.get(metric.lower()) if isinstance(metric, str) else None
    if found is None:
        names = ", ".join(" or ".join(map(repr, (known.name, *known.aliases))) for known in METRICS)
        raise MetricError(f"metric is {metric!r}, expected one of {names}")
    if found.name != "lp":
        if p is not None:
            raise MetricError(f"p is {p}, but metric {found.name!r} takes no p; only 'lp' does")
        return found
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 < p < math.inf:
        raise MetricError(f"p is {p!r}, expected a number above 0 for metric 'lp', such as p=3")
    return dataclasses.replace(found, p=float(p))


def metric_of(name: str, p: float) -> Metric:
    """Return the metric whose name and p these are; operators take these two for a metric."""
    return resolve_metric(name, p if name == "lp" else None)
