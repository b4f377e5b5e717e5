"""Train an embedding model with retrieval inside the loop, and see its recall rise.

On the handwritten digits that ship with scikit-learn:

    python examples/train_retriever.py fit --config configs/digits.yaml

On embeddings of your own, a safetensors file with `queries`, `documents` and `relevant`:

    python examples/train_retriever.py fit --config configs/embeddings.yaml --data.path FILE.safetensors
"""

import logging
import os
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from matplotlib.ticker import MaxNLocator
from retrieval_data import RetrievalData
from retriever import Retriever

from elips_torch.lightning import RetrievalEvaluation


class RetrieverCLI(LightningCLI):
    """Adds the evaluation: once before training, then after every epoch, with a report at the end."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take the settings of the evaluation and of the checkpoint from the command line."""
        parser.add_lightning_class_args(RetrievalEvaluation, "evaluation")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.monitor": "val/recall@10", "checkpoint.mode": "max"})
        parser.link_arguments("data.dim", "model.dim", apply_on="instantiate")

    def before_fit(self) -> None:
        """Measure the untrained model."""
        print(self.datamodule)
        self.trainer.validate(self.model, self.datamodule, verbose=False)

    def after_fit(self) -> None:
        """Print recall before and after, and draw it."""
        evaluation = next(c for c in self.trainer.callbacks if isinstance(c, RetrievalEvaluation))
        if not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.log_dir or os.getcwd())
        picture = folder / "recall.png"
        draw_recall(evaluation, picture)
        monitored = self.trainer.checkpoint_callback.monitor.removeprefix(evaluation.prefix)
        print(f"\n{recall_table(evaluation, monitored)}\n")
        print(f"recall per epoch  {picture}")
        print(f"checkpoint        {self.trainer.checkpoint_callback.best_model_path}")


def recall_table(evaluation: RetrievalEvaluation, monitored: str) -> str:
    """Return recall before and after training, and after the epoch whose weights are kept, as text."""
    best = max(evaluation.history[1:], key=lambda entry: entry[monitored])
    header = "recall on held-out data" + "".join(f"{f'@{k}':>9}" for k in evaluation.k)
    lines = [header]
    rows = {
        "before": evaluation.history[0],
        "after": evaluation.history[-1],
        f"best, epoch {best['epoch'] + 1:.0f}, kept": best,
    }
    for name, entry in rows.items():
        lines.append(f"{name:<23}" + "".join(f"{entry[f'recall@{k}']:>9.4f}" for k in evaluation.k))
    return "\n".join(lines)


def draw_recall(evaluation: RetrievalEvaluation, path: Path) -> None:
    """Write a picture of recall after each epoch; 0 is before training."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for k in evaluation.k:
        values = [entry[f"recall@{k}"] for entry in evaluation.history]
        axes.plot(range(len(values)), values, marker="o", label=f"recall@{k}")
    axes.set(xlabel="epochs of training", ylabel="recall on held-out data")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: list[str] | None = None) -> None:
    """Run the command line, or the arguments given instead."""
    # The data is in memory: workers would cost time, whatever Lightning suggests.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning itself uses what newer torch deprecates.
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    RetrieverCLI(
        Retriever,
        RetrievalData,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults={
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "retriever"}},
            "max_epochs": 10,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 10,
            "deterministic": True,
        },
        args=args,
    )


if __name__ == "__main__":
    main()
