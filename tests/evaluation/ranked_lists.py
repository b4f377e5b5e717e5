"""Retrieved and relevant ids for tests, and what trec_eval and plain Python say of them."""

import math

import pytrec_eval
import torch

NAMES = {
    "recall": "recall",
    "hit_rate": "success",
    "precision": "P",
    "ndcg": "ndcg_cut",
    "map": "map_cut",
}


def random_lists(seed, q=40, n=15, k=9, r=6):
    """Return unique retrieved ids, some -1 at the end; relevant ids padded by -1, a row without; degrees."""
    generator = torch.Generator().manual_seed(seed)
    retrieved = torch.rand(q, n, generator=generator).argsort(1)[:, :k]
    retrieved[torch.arange(k) >= torch.randint(0, k + 1, (q, 1), generator=generator)] = -1
    relevant = torch.rand(q, n, generator=generator).argsort(1)[:, :r]
    relevant[torch.rand(q, r, generator=generator) < 0.5] = -1
    relevant[0] = -1
    relevance = torch.randint(0, 4, (q, r), generator=generator)
    return retrieved, relevant, relevance


def by_trec_eval(retrieved, relevant, relevance, ks):
    """Return the mean of every metric over the queries with a relevant id, as trec_eval defines it.

    Scores fall below zero, as those of distances do: trec_eval only looks at their order.
    """
    judged = {}
    for i, (ids, degrees) in enumerate(zip(relevant.tolist(), relevance.tolist(), strict=True)):
        pairs = {str(each): degree for each, degree in zip(ids, degrees, strict=True) if each >= 0}
        if any(degree > 0 for degree in pairs.values()):
            judged[str(i)] = pairs
    measures = {f"{name}_{','.join(map(str, ks))}" for name in NAMES.values()}
    values = _means(judged, retrieved, measures | {"Rprec"})
    result = {f"{mine}@{k}": values[f"{theirs}_{k}"] for mine, theirs in NAMES.items() for k in ks}
    for k in ks:
        # trec_eval cuts no reciprocal rank: cut the list.
        result[f"mrr@{k}"] = _means(judged, retrieved[:, :k], {"recip_rank"})["recip_rank"]
    result["r_precision"] = values["Rprec"]
    return result


def _means(judged, retrieved, measures):
    runs = {
        query: {str(each): -float(i) for i, each in enumerate(retrieved[int(query)].tolist()) if each >= 0}
        for query in judged
    }
    found = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(runs)
    names = set().union(*found.values())
    # A query for which nothing was retrieved is left out of what comes back, and counts as 0.
    return {name: sum(each[name] for each in found.values()) / len(judged) for name in names}


def in_plain_python(retrieved, relevant, ks):
    """Return every metric of one query whose ids are lists and may repeat; None without a relevant id."""
    wanted = set(relevant) - {-1}
    if not wanted:
        return None
    hits = [each in wanted and each not in retrieved[:i] for i, each in enumerate(retrieved)]
    result = {"r_precision": sum(hits[: len(wanted)]) / len(wanted)}
    for k in ks:
        top = hits[:k]
        places = [place for place, hit in enumerate(top) if hit]
        ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
        result[f"recall@{k}"] = len(places) / len(wanted)
        result[f"hit_rate@{k}"] = float(bool(places))
        result[f"precision@{k}"] = len(places) / k
        result[f"mrr@{k}"] = 1 / (places[0] + 1) if places else 0.0
        result[f"map@{k}"] = sum((i + 1) / (place + 1) for i, place in enumerate(places)) / len(wanted)
        result[f"ndcg@{k}"] = sum(1 / math.log2(place + 2) for place in places) / ideal
    return result
