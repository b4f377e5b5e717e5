import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from elips_torch import (
    ArgumentError,
    DtypeError,
    DuplicateIdError,
    FactoryError,
    FlatIndex,
    ImplementationError,
    IVFFlatIndex,
    ShapeError,
)
from elips_torch.lightning import RetrievalEvaluation

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The data is small on purpose.
    pytest.mark.filterwarnings("ignore:vectors has .* rows to fit"),
    # Lightning uses what newer torch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]


class Table(Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row):
        return {name: column[row] for name, column in self.columns.items()}


class Model(LightningModule):
    """Embeds by a fixed random map; a training step changes it a little."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.map.weight.copy_(torch.randn(4, 6, generator=generator))

    def training_step(self, batch, batch_idx):
        return self.map(next(iter(batch.values()))).square().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def retrieval_step(self, batch, dataloader_idx):
        assert not torch.is_grad_enabled()
        vectors = ("embeddings", "queries", "documents")
        return {name: self.map(x) if name in vectors else x for name, x in batch.items()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def labelled(n=101):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 12, (n,), generator=generator)
    labels[3], labels[4] = -1, 99
    centres = torch.randn(100, 6, generator=generator)
    return Table(embeddings=centres[labels] + torch.randn(n, 6, generator=generator), labels=labels)


def queries_and_documents(q=31, n=57):
    generator = torch.Generator().manual_seed(2)
    documents = torch.randn(n, 6, generator=generator)
    ids = torch.randperm(1000, generator=generator)[:n]
    rows = torch.randint(0, n, (q, 3), generator=generator)
    relevant = ids[rows]
    relevant[:, 1:][torch.rand(q, 2, generator=generator) < 0.5] = -1
    relevant[0] = -1
    queries = documents[rows[:, 0]] + torch.randn(q, 6, generator=generator)
    return Table(queries=queries, relevant=relevant), Table(documents=documents, ids=ids)


def trainer(tmp_path, *callbacks, **options):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "default_root_dir": tmp_path,
        "max_epochs": 2,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def without_time(values):
    return {name: value for name, value in values.items() if not name.endswith("seconds")}


def loaders(*tables):
    return [DataLoader(table, batch_size=8) for table in tables]


def nearest(vectors, database, exclude_self=False):
    cosine = nn.functional.normalize(vectors.double()) @ nn.functional.normalize(database.double()).T
    if exclude_self:
        cosine.fill_diagonal_(-2)
    return cosine.argsort(1, descending=True)


def expected_by_label(model, table, k):
    labels = table.columns["labels"]
    order = nearest(*(model.map(table.columns["embeddings"]).detach(),) * 2, exclude_self=True)
    hits, fractions = [], []
    for row, label in enumerate(labels.tolist()):
        same = int((labels == label).sum()) - 1
        if label >= 0 and same:
            found = int((labels[order[row, :k]] == label).sum())
            hits.append(found > 0)
            fractions.append(found / same)
    return sum(hits) / len(hits), sum(fractions) / len(fractions)


def test_labelled_samples_query_each_other(tmp_path):
    model, table, evaluation = Model(), labelled(), RetrievalEvaluation(k=(1, 5))
    run = trainer(tmp_path, evaluation)
    run.validate(model, loaders(table), verbose=False)
    for k in (1, 5):
        recall, label_recall = expected_by_label(model, table, k)
        assert run.callback_metrics[f"val/recall@{k}"].item() == pytest.approx(recall, abs=1e-6)
        assert run.callback_metrics[f"val/label_recall@{k}"].item() == pytest.approx(label_recall, abs=1e-6)
        assert evaluation.history[0][f"recall@{k}"] == run.callback_metrics[f"val/recall@{k}"].item()


def test_queries_and_documents(tmp_path):
    model, (queries, documents) = Model(), queries_and_documents()
    run = trainer(tmp_path, RetrievalEvaluation(k=5))
    run.validate(model, loaders(queries, documents), verbose=False)
    with torch.no_grad():
        vectors = model.map(queries.columns["queries"]), model.map(documents.columns["documents"])
    found = documents.columns["ids"][nearest(*vectors)[:, :5]]
    recalls = [
        len(set(row) & set(wanted) - {-1}) / len(set(wanted) - {-1})
        for row, wanted in zip(found.tolist(), queries.columns["relevant"].tolist(), strict=True)
        if set(wanted) != {-1}
    ]
    expected = sum(recalls) / len(recalls)
    assert 0 < expected < 1
    assert run.callback_metrics["val/recall@5"].item() == pytest.approx(expected, abs=1e-6)
    assert run.callback_metrics["val/hit_rate@5"].item() >= expected


def test_fit_skips_the_sanity_check_and_frees_the_embeddings(tmp_path):
    evaluation = RetrievalEvaluation(k=1)
    trainer(tmp_path, evaluation, num_sanity_val_steps=2).fit(
        Model(), loaders(labelled())[0], loaders(labelled())
    )
    assert [entry["epoch"] for entry in evaluation.history] == [0, 1]
    assert not evaluation._rows._parts


def test_model_checkpoint_can_monitor_recall_and_keeps_the_history(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/recall@10", mode="max")
    evaluation = RetrievalEvaluation()
    trainer(tmp_path, evaluation, checkpoint, num_sanity_val_steps=0).fit(
        Model(), loaders(labelled())[0], loaders(labelled())
    )
    best = max(entry["recall@10"] for entry in evaluation.history)
    assert checkpoint.best_model_score.item() == best
    resumed = RetrievalEvaluation()
    resumed.load_state_dict(evaluation.state_dict())
    assert resumed.history == evaluation.history


def test_the_index_and_the_step_are_the_users_choice(tmp_path):
    made = []

    def index(dim):
        made.append(FlatIndex(dim, metric="l2"))
        return made[-1]

    def step(module, batch, dataloader_idx):
        return {"embeddings": batch["embeddings"], "labels": batch["labels"]}

    table = labelled()
    trainer(tmp_path, RetrievalEvaluation(index=index, step=step)).validate(
        Model(), loaders(table), verbose=False
    )
    assert len(made) == 1
    assert torch.equal(made[0].vectors, table.columns["embeddings"])


def test_a_validation_step_may_return_the_embeddings(tmp_path):
    class OneStep(Model):
        retrieval_step = None

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return Model.retrieval_step(self, batch, dataloader_idx)

    evaluation = RetrievalEvaluation()
    run = trainer(tmp_path, evaluation)
    run.validate(OneStep(), loaders(labelled()), verbose=False)
    run.validate(Model(), loaders(labelled()), verbose=False)
    first, second = evaluation.history
    assert without_time(first) == without_time(second)


def test_an_index_filled_in_validation_can_be_trained_through(tmp_path):
    made = []

    def index(dim):
        made.append(FlatIndex(dim))
        return made[-1]

    trainer(tmp_path, RetrievalEvaluation(index=index)).validate(Model(), loaders(labelled()), verbose=False)
    queries = torch.randn(2, 4, requires_grad=True)
    made[0](queries).scores.sum().backward()
    assert queries.grad.abs().sum() > 0


def documents_of(batch):
    return {"documents": batch["embeddings"], "ids": batch["labels"].abs()}


@pytest.mark.parametrize(
    ("step", "error", "words"),
    [
        (lambda b: {"embeddings": b["embeddings"]}, ArgumentError, "without 'labels'"),
        (lambda b: {"loss": 1}, ArgumentError, "returned 'loss', expected"),
        (lambda b: 3, DtypeError, "returned a int"),
        (lambda b: None, ImplementationError, "no retrieval_step"),
        (lambda b: {**b, "labels": b["labels"][:2]}, ShapeError, r"labels has shape \(2,\)"),
        (lambda b: {**b, "labels": b["labels"].float()}, DtypeError, "labels is torch.float32"),
        (
            lambda b: {"queries": b["embeddings"], "labels": b["labels"], **documents_of(b)},
            ArgumentError,
            "documents need 'labels', got 'ids'",
        ),
        (lambda b: {"documents": b["embeddings"], "ids": torch.arange(len(b))}, ShapeError, "ids has shape"),
        (
            lambda b: {**b, "queries": b["embeddings"], "relevant": b["labels"]},
            ArgumentError,
            "labelled embeddings and queries",
        ),
        (
            lambda b: {
                "queries": b["embeddings"],
                "relevant": b["labels"],
                "documents": b["embeddings"],
                "ids": b["labels"].abs(),
            },
            DuplicateIdError,
            "more than once",
        ),
    ],
)
def test_a_wrong_step_is_refused(tmp_path, step, error, words):
    evaluation = RetrievalEvaluation(step=lambda module, batch, idx: step(batch))
    with pytest.raises(error, match=words):
        trainer(tmp_path, evaluation).validate(Model(), loaders(labelled()), verbose=False)


def only_queries():
    return (queries_and_documents()[0],)


def nothing_relevant():
    queries, documents = queries_and_documents()
    queries.columns["relevant"].fill_(-1)
    return queries, documents


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ((Table(embeddings=torch.randn(9, 6), labels=torch.arange(9)),), "no label occurs twice among 9"),
        (nothing_relevant(), "no query has a relevant document"),
        (only_queries(), "no retrieval step returned 'documents'"),
        (queries_and_documents()[1:], "no retrieval step returned 'queries'"),
        (
            (
                Table(queries=torch.randn(3, 6), labels=torch.arange(3)),
                Table(documents=torch.randn(2, 6), labels=torch.tensor([8, 9])),
            ),
            "no query has the label of any document",
        ),
    ],
    ids=["labels", "relevant", "documents", "queries", "gallery"],
)
def test_training_goes_on_where_there_is_nothing_to_find(tmp_path, tables, words):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/recall@10", mode="max")
    evaluation = RetrievalEvaluation()
    run = trainer(tmp_path, evaluation, checkpoint, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=words):
        run.fit(Model(), loaders(labelled())[0], loaders(*tables))
    assert [entry["epoch"] for entry in evaluation.history] == [0, 1]
    assert run.callback_metrics["val/recall@10"].isnan()
    assert checkpoint.best_model_path


@pytest.mark.parametrize("index", [None, "SQ8"])
@pytest.mark.parametrize(
    ("fine", "poor"),
    [
        ((labelled(),), (Table(embeddings=torch.randn(9, 6), labels=torch.arange(9)),)),
        (queries_and_documents(), nothing_relevant()),
        (
            (
                Table(queries=torch.randn(3, 6), labels=torch.arange(3)),
                Table(documents=torch.randn(5, 6), labels=torch.arange(5)),
            ),
            (Table(queries=torch.randn(3, 6), labels=torch.arange(3)),),
        ),
    ],
    ids=["labels", "relevant", "gallery"],
)
def test_nothing_to_find_logs_the_names_of_any_evaluation(tmp_path, index, fine, poor):
    evaluation = RetrievalEvaluation(index=index)
    run = trainer(tmp_path, evaluation)
    run.validate(Model(), loaders(*fine), verbose=False)
    with pytest.warns(UserWarning, match="retrieval is not evaluated, NaN is logged"):
        run.validate(Model(), loaders(*poor), verbose=False)
    found, missed = evaluation.history
    assert sorted(found) == sorted(missed)
    assert ("index_recall@10" in found) == (index is not None)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")
@pytest.mark.filterwarnings("ignore:`ModelCheckpoint.monitor='val/recall@10'.` could not find")
def test_training_goes_on_where_validation_has_no_batch(tmp_path):
    empty = Table(embeddings=torch.zeros(0, 6), labels=torch.zeros(0, dtype=torch.int64))
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/recall@10", mode="max")
    evaluation = RetrievalEvaluation()
    run = trainer(tmp_path, evaluation, checkpoint)
    with pytest.warns(UserWarning, match="the validation data yields no batch: .* under 'val/'"):
        run.fit(Model(), loaders(labelled())[0], loaders(empty))
    assert run.current_epoch == 2
    with pytest.warns(UserWarning, match="the validation data yields no batch"):
        run.validate(Model(), loaders(empty), verbose=False)
    assert evaluation.history == []


def test_validation_that_is_switched_off_needs_no_warning(tmp_path):
    run = trainer(tmp_path, RetrievalEvaluation(), limit_val_batches=0)
    run.fit(Model(), loaders(labelled())[0], loaders(labelled()))


def test_relevant_ids_of_no_document_are_said_once(tmp_path):
    queries, documents = queries_and_documents()
    queries.columns["relevant"][1:4, 0] = torch.tensor([5000, 5001, 5001])
    evaluation = RetrievalEvaluation()
    run = trainer(tmp_path, evaluation)
    with pytest.warns(UserWarning, match="2 ids are those of no document, such as 5000,") as caught:
        run.fit(Model(), loaders(labelled())[0], loaders(queries, documents))
    assert len([each for each in caught if "of no document" in str(each.message)]) == 1
    assert len(evaluation.history) == 2


def test_a_mistake_in_the_description_is_said_at_once():
    with pytest.raises(FactoryError, match="IVX4"):
        RetrievalEvaluation(index="IVX4,Flat")


class Columns(Mapping):
    """What a tensordict is: a mapping, and no dict."""

    def __init__(self, columns):
        self.columns = columns

    def __getitem__(self, name):
        return self.columns[name]

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return len(self.columns)


def test_a_step_may_return_any_mapping(tmp_path):
    plain = RetrievalEvaluation()
    mapped = RetrievalEvaluation(
        step=lambda module, batch: Columns(module.retrieval_step(batch, 0)), prefix="mapped/"
    )
    trainer(tmp_path, plain, mapped).validate(Model(), loaders(labelled()), verbose=False)
    assert without_time(plain.history[0]) == without_time(mapped.history[0])


def test_labelled_queries_search_labelled_documents(tmp_path):
    table = labelled(60)
    vectors, labels = table.columns["embeddings"], table.columns["labels"]
    queries = Table(queries=vectors[:20], labels=labels[:20])
    documents = Table(documents=vectors[20:], labels=labels[20:])
    model = Model()
    run = trainer(tmp_path, RetrievalEvaluation(k=3))
    run.validate(model, loaders(queries, documents), verbose=False)
    with torch.no_grad():
        found = labels[20:][nearest(model.map(vectors[:20]), model.map(vectors[20:]))[:, :3]]
    counted = [row for row in range(20) if labels[row] >= 0 and (labels[20:] == labels[row]).any()]
    hits = [int((found[row] == labels[row]).sum()) for row in counted]
    there = [int((labels[20:] == labels[row]).sum()) for row in counted]
    recall = sum(hit > 0 for hit in hits) / len(hits)
    label_recall = sum(hit / each for hit, each in zip(hits, there, strict=True)) / len(hits)
    assert run.callback_metrics["val/recall@3"].item() == pytest.approx(recall, abs=1e-6)
    assert run.callback_metrics["val/label_recall@3"].item() == pytest.approx(label_recall, abs=1e-6)


def test_a_retrieval_step_may_take_the_batch_alone(tmp_path):
    class Short(Model):
        def retrieval_step(self, batch):
            return Model.retrieval_step(self, batch, 0)

    evaluation = RetrievalEvaluation()
    for model in (Short(), Model()):
        trainer(tmp_path, evaluation).validate(model, loaders(labelled()), verbose=False)
    assert without_time(evaluation.history[0]) == without_time(evaluation.history[1])


@pytest.mark.parametrize(
    "index", [FlatIndex, "Flat", "IVF4,Flat", lambda dim: IVFFlatIndex(dim, 4, "cosine")]
)
def test_an_index_is_a_class_a_description_or_a_function(tmp_path, index):
    plain, named = RetrievalEvaluation(k=5), RetrievalEvaluation(k=5, index=index, prefix="named/")
    trainer(tmp_path, plain, named).validate(Model(), loaders(labelled()), verbose=False)
    # Eight lists are read by default, which are more than there are: exact too.
    assert without_time(named.history[0]) == without_time(plain.history[0])


def test_the_recall_of_the_index_itself_is_logged(tmp_path):
    made = []

    def index(dim):
        made.append(IVFFlatIndex(dim, 16, "l2", nprobe=1))
        return made[-1]

    evaluation = RetrievalEvaluation(k=(1, 5), index=index, recall_queries=10_000)
    run = trainer(tmp_path, evaluation)
    table = labelled()
    run.validate(Model(), loaders(table), verbose=False)
    assert run.callback_metrics["val/retrieval_seconds"].item() > 0
    vectors, rows = made[0].vectors, torch.arange(len(table))
    true = torch.cdist(vectors.double(), vectors.double()).fill_diagonal_(torch.inf).argsort(1)
    found = made[0].search(vectors, 5, exclude=rows[:, None]).ids
    for k in (1, 5):
        shared = (found[:, :k, None] == true[:, None, :k]).any(2)
        expected = shared.double().mean().item()
        assert 0 < expected < 1
        assert evaluation.history[0][f"index_recall@{k}"] == pytest.approx(expected, abs=1e-6)


def test_among_equal_vectors_any_neighbour_is_a_true_one(tmp_path):
    table = Table(embeddings=torch.ones(40, 6), labels=torch.arange(40) % 4)
    evaluation = RetrievalEvaluation(k=3, index="IVF2,SQ8")
    trainer(tmp_path, evaluation).validate(Model(), loaders(table), verbose=False)
    assert evaluation.history[0]["index_recall@3"] == 1.0


def test_only_the_named_metrics_are_measured(tmp_path):
    evaluation = RetrievalEvaluation(k=2, metrics=["label_recall"])
    trainer(tmp_path, evaluation).validate(Model(), loaders(labelled()), verbose=False)
    assert set(evaluation.history[0]) == {"epoch", "step", "label_recall@2", "retrieval_seconds"}
    everything = ("recall", "hit_rate", "precision", "ndcg", "map", "mrr", "r_precision", "label_recall")
    for tables in ((labelled(),), queries_and_documents()):
        evaluation = RetrievalEvaluation(k=(2, 4), metrics=everything)
        trainer(tmp_path, evaluation).validate(Model(), loaders(*tables), verbose=False)
        names = {name for name in evaluation.history[0] if not name.endswith("seconds")} - {"epoch", "step"}
        allowed = everything if len(tables) == 1 else everything[:-1]
        assert names == {
            each
            for name in allowed
            for each in ([name] if name == "r_precision" else [f"{name}@2", f"{name}@4"])
        }
        assert all(0 < evaluation.history[0][name] < 1 for name in names)
    with pytest.raises(ArgumentError, match="metrics is 'f1'"):
        RetrievalEvaluation(metrics="f1")


class Reporting(Callback):
    """Writes what each rank has logged, for the test to read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def on_validation_end(self, trainer, pl_module):
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        histories = [
            without_time(callback.history[-1])
            for callback in trainer.callbacks
            if isinstance(callback, RetrievalEvaluation)
        ]
        report = {"logged": without_time(logged), "histories": histories}
        Path(self.folder, f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(report))


class Held(RetrievalEvaluation):
    """Writes how many vectors the index of each rank held."""

    def __init__(self, folder, choice, prefix, **options):
        super().__init__(k=(1, 5), index=self.make, prefix=prefix, **options)
        self.folder, self.choice = str(folder), choice

    def make(self, dim):
        self.made = self.choice(dim)
        return self.made

    def on_validation_end(self, trainer, pl_module):
        name = f"{self.prefix.strip('/')}-{trainer.global_rank}"
        Path(self.folder, name).write_text(str(self.made.ntotal))


def make_lists(dim):
    return IVFFlatIndex(dim, 8, "cosine", nprobe=2)


TABLES = {
    "labels": (labelled(),),
    "documents": queries_and_documents(),
    "gallery": (
        Table(queries=labelled(21).columns["embeddings"], labels=torch.arange(21) % 5),
        Table(documents=labelled(33).columns["embeddings"], labels=torch.arange(33) % 7),
    ),
}


@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_two_processes_log_the_numbers_of_one(tmp_path, tables):
    # Odd sizes: Lightning's sampler repeats a sample, which must not count twice.
    for options in ({}, {"devices": 2, "strategy": "ddp_spawn"}):
        exact = RetrievalEvaluation(
            k=(1, 5), metrics=("recall", "label_recall", "ndcg", "map", "r_precision")
        )
        lists = RetrievalEvaluation(k=(1, 5), index=make_lists, prefix="lists/")
        run = trainer(tmp_path, exact, lists, Reporting(tmp_path), **options)
        run.validate(Model(), loaders(*tables), verbose=False)
    one, *ranks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert "val/recall@1" in one["logged"]
    assert "val/index_recall@1" not in one["logged"]
    assert 0 < one["logged"]["lists/index_recall@5"] < 1
    assert all(rank == one for rank in ranks)


def test_no_process_holds_more_than_it_must(tmp_path):
    two = trainer(
        tmp_path,
        Held(tmp_path, FlatIndex, "exact/"),
        Held(tmp_path, make_lists, "lists/"),
        Held(tmp_path, make_lists, "parts/", shard=True),
        Held(tmp_path, FlatIndex, "whole/", shard=False),
        Reporting(tmp_path),
        devices=2,
        strategy="ddp_spawn",
    )
    two.validate(Model(), loaders(labelled()), verbose=False)
    held = {
        name: [int((tmp_path / f"{name}-{rank}").read_text()) for rank in range(2)]
        for name in ("exact", "lists", "parts", "whole")
    }
    assert held == {"exact": [51, 50], "lists": [101, 0], "parts": [51, 50], "whole": [101, 0]}
    first, second = (json.loads((tmp_path / f"2-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert 0 < first["logged"]["parts/index_recall@5"] <= 1


def test_an_index_in_place_of_a_factory_is_refused():
    with pytest.raises(DtypeError, match="lambda dim"):
        RetrievalEvaluation(index=FlatIndex(4))


@pytest.mark.filterwarnings("ignore:.*validation_step.*")
def test_a_module_that_is_never_validated_is_refused(tmp_path):
    class Unvalidated(LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    trainer = Trainer(
        callbacks=[RetrievalEvaluation()],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=1,
    )
    with pytest.raises(ImplementationError, match="has no validation_step"):
        trainer.fit(Unvalidated(), DataLoader([torch.zeros(1)]))
