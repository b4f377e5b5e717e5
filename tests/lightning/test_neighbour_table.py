import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from elips_torch import ArgumentError, DtypeError
from elips_torch.lightning import NeighbourTable, RetrievalEvaluation
from elips_torch.lightning.neighbour_picture import QUERY, RIGHT, WRONG, as_picture, grid, png

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
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
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return batch


class Recording(Logger):
    """Keeps what it is given, as a logger that needs an account would send it."""

    def __init__(self):
        super().__init__()
        self.tables, self.images = [], []

    name, version = "recording", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        pass


class WandbLogger(Recording):
    """Stands in for that of Weights & Biases, which is not installed."""

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.tables.append((key, columns, data, step))

    def log_image(self, key, images, step=None, **kwargs):
        self.images.append((key, images, step))


def labelled():
    """Twelve points on a circle; labels alternate, so that nearest neighbours are wrong."""
    angle = torch.arange(12) * (2 * torch.pi / 12)
    return Table(embeddings=torch.stack([angle.cos(), angle.sin()], 1), labels=torch.arange(12) % 2)


def queries_and_documents():
    documents = torch.eye(5)
    queries = Table(queries=documents[[4, 2]] + 0.1, relevant=torch.tensor([[104], [100]]))
    return queries, Table(documents=documents, ids=torch.arange(100, 105))


def validate(tmp_path, tables, loggers, *callbacks, **options):
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(
        callbacks=list(callbacks),
        logger=loggers,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **{**quiet, **options},
    )
    run.validate(Model(), [DataLoader(table, batch_size=3) for table in tables], verbose=False)


def records(folder):
    with (Path(folder) / "val_neighbours.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_csv_logger_gets_a_line_per_document(tmp_path):
    logger = CSVLogger(tmp_path)
    # The order of the callbacks does not matter.
    callbacks = NeighbourTable({104: "four", 103: "three"}, ["a", "b"], k=2), RetrievalEvaluation(k=3)
    validate(tmp_path, queries_and_documents(), logger, *callbacks)
    rows = records(logger.log_dir)
    assert [(row["query_text"], row["rank"], row["id"], row["text"]) for row in rows] == [
        ("a", "1", "104", "four"),
        ("a", "2", "100", "100"),
        ("b", "1", "102", "102"),
        ("b", "2", "100", "100"),
    ]
    assert [row["correct"] for row in rows] == ["True", "False", "False", "True"]
    assert not list(Path(logger.log_dir).glob("*.png"))


def test_later_validations_are_added(tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = NeighbourTable(n_queries=3, k=2), RetrievalEvaluation(k=2)
    for _ in range(2):
        validate(tmp_path, (labelled(),), logger, *callbacks)
    rows = records(logger.log_dir)
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]
    # Evenly spread over the twelve samples.
    assert [row["query"] for row in rows[:6]] == ["0", "0", "4", "4", "8", "8"]
    assert {row["id"] for row in rows[:2]} == {"1", "11"}


def events(folder):
    # Spawned processes import this file, and need not wait for TensorBoard.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_text(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    texts = {100: "a | b", 104: "line\nbreak", 101: "x" * 500}
    validate(tmp_path, queries_and_documents(), logger, RetrievalEvaluation(k=3), NeighbourTable(texts, k=3))
    logger.experiment.flush()
    (event,) = events(logger.log_dir).Tensors("val/neighbours/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    header, _, first, second = text.splitlines()
    assert header == "| query | 1 | 2 | 3 |"
    assert first.startswith("| 0 | **line break (")
    assert "a \\| b (" in first
    assert "**a \\| b (" in second
    assert len(text) < 1500


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pictures_become_one_picture(tmp_path):
    pictures = torch.rand(12, 8, 8, generator=torch.Generator().manual_seed(0))
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv")
    wandb = WandbLogger()
    callbacks = RetrievalEvaluation(k=2), NeighbourTable(pictures, n_queries=3, k=2)
    validate(tmp_path, (labelled(),), [board, table, wandb], *callbacks)
    board.experiment.flush()
    (event,) = events(board.log_dir).Images("val/neighbours")
    shown = np.array(Image.open(io.BytesIO(event.encoded_image_string)))
    (path,) = Path(table.log_dir).glob("*.png")
    written = np.array(Image.open(path))
    ((key, (sent,), step),) = wandb.images
    assert key == "val/neighbours_picture"
    assert step == 0
    assert np.array_equal(shown, written)
    assert np.array_equal(sent, written)
    height, width = written.shape[0] // 3, written.shape[1] // 3
    assert tuple(written[0, 0]) == QUERY
    # The nearest on the circle have the other label.
    assert tuple(written[0, width]) == WRONG
    assert written[3 : height - 7, 3 : width - 7].std() > 10


def test_weights_and_biases_gets_a_table(tmp_path):
    logger = WandbLogger()
    callbacks = RetrievalEvaluation(k=2, prefix="test/"), NeighbourTable("<{}>".format, k=1)
    validate(tmp_path, queries_and_documents(), logger, *callbacks)
    ((key, columns, data, step),) = logger.tables
    assert key == "test/neighbours"
    assert step == 0
    assert [row[columns.index("text")] for row in data] == ["<104>", "<102>"]
    assert not logger.images


def test_a_logger_without_tables_is_named_once(tmp_path):
    table, other = NeighbourTable(), Recording()
    with pytest.warns(UserWarning, match="Recording shows no tables"):
        validate(tmp_path, (labelled(),), other, RetrievalEvaluation(), table)
    # A warning would be an error.
    validate(tmp_path, (labelled(),), other, RetrievalEvaluation(), table)


def test_nothing_to_find_is_no_table(tmp_path):
    table = Table(embeddings=torch.randn(4, 2), labels=torch.arange(4))
    logger = WandbLogger()
    with pytest.warns(UserWarning, match="no label occurs twice"):
        validate(tmp_path, (table,), logger, RetrievalEvaluation(), NeighbourTable())
    assert not logger.tables


def test_two_processes_show_the_queries_of_one(tmp_path):
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_spawn"})):
        callbacks = RetrievalEvaluation(k=3), NeighbourTable(n_queries=5, k=3)
        validate(tmp_path, (labelled(),), CSVLogger(tmp_path, name=name), *callbacks, **options)
    one, two = (records(tmp_path / name / "version_0") for name in ("one", "two"))
    assert len(one) == 15
    assert json.dumps(one) == json.dumps(two)


@pytest.mark.parametrize(
    ("callbacks", "error", "words"),
    [
        (lambda: [NeighbourTable()], ArgumentError, "no RetrievalEvaluation"),
        (
            lambda: [NeighbourTable(k=11), RetrievalEvaluation()],
            ArgumentError,
            "k is 11, expected at most 10",
        ),
        (lambda: [NeighbourTable(documents=3)], DtypeError, "documents is a int"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, callbacks, error, words):
    with pytest.raises(error, match=words):
        validate(tmp_path, (labelled(),), False, *callbacks())


def test_pictures_come_in_many_forms(tmp_path):
    colours = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    array = colours.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "picture.png")
    for form in (colours, array, Image.fromarray(array), tmp_path / "picture.png"):
        assert torch.equal(as_picture(form), colours)
    assert torch.equal(as_picture(colours / 255), colours)
    grey = colours[:1].expand(3, -1, -1)
    assert torch.equal(as_picture(colours[0]), grey)
    assert torch.equal(as_picture(colours[:1].numpy()), grey)
    for form in (
        "text",
        3,
        torch.tensor(3),
        torch.zeros(4, 2, 2),
        tmp_path / "missing.png",
        tmp_path / "a.txt",
    ):
        assert as_picture(form) is None


def test_a_written_picture_is_read_as_it_was(tmp_path):
    picture = torch.randint(0, 256, (3, 9, 4), dtype=torch.uint8)
    read = Image.open(io.BytesIO(png(picture)))
    assert np.array_equal(np.array(read), picture.permute(1, 2, 0).numpy())


def test_pictures_of_different_sizes_share_a_grid():
    small, large = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 300, 200, dtype=torch.uint8)
    whole = grid([[(small, QUERY), (large, RIGHT)], [(small, QUERY), (None, WRONG)]])
    assert max(whole.shape[1:]) < 300
    assert tuple(whole[:, 0, whole.shape[2] // 2].tolist()) == RIGHT
