"""What a run keeps in its output folder: heads of each epoch, the best, and `latest` to go on with.

Knows nothing of how heads are trained.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.heads.files import heads_folder, save_heads, write_heads
from model.heads.medusa import MedusaHeads
from model.storage.disk_room import require_room
from model.training.checkpoints import RunProgress, load_run, save_run
from model.training.evaluation import RANKS, Evaluation
from model.training.learner import Learner
from model.training.options import FREE_TO_CHANGE, TrainOptions


class RunFolder:
    """The folder of one run. best: the heads whose tree has the longest acceptance length.

    facts: what `save_heads` keeps with the heads; identity: what must be equal to go on with a run
    later.
    """

    def __init__(
        self,
        path: Path,
        heads: MedusaHeads,
        learner: Learner,
        options: TrainOptions,
        facts: dict[str, Any],
        identity: dict[str, str],
    ) -> None:
        self.path = path
        self.best = path / "medusa_heads_best"
        self.latest = path / "medusa_heads_latest"
        self.identity = identity
        self._heads = heads
        self._learner = learner
        self._options = options
        self._facts = facts

    def require_room(self, epochs_left: int) -> None:
        """Raise OutputError where the disk can't hold what the run will write.

        Better now than after an epoch.
        """
        n_values = sum(p.numel() for p in self._learner.parameters.values())
        heads = 4 * n_values  # bytes, in f32
        latest = 4 * heads  # with the run's weights and the optimiser's two moments
        # `best` and `latest` twice: what is replaced stays until its successor is there.
        require_room(self.latest, heads * (epochs_left + 2) + 2 * latest)

    def save_epoch(
        self, progress: RunProgress, found: Evaluation, *, is_best: bool, keep: bool = True
    ) -> None:
        """Write the heads of an epoch that was validated; raises OutputError.

        keep: in a folder of their own, even if they are not the best.
        """
        facts = self._all_facts(progress, found)
        if keep:
            save_heads(self.path / f"medusa_heads_epoch_{progress.epoch}", self._heads, facts)
        if is_best:
            save_heads(self.best, self._heads, facts)

    def save_latest(self, progress: RunProgress, found: Evaluation | None = None) -> None:
        """Write heads and the state of the run together, whole.

        found: the validation of these very weights.
        """
        learner = self._learner
        with heads_folder(self.latest) as folder:
            write_heads(folder, self._heads, self._all_facts(progress, found))
            save_run(
                folder, learner.parameters, learner.optimizer, progress, self._options,
                self.identity,
            )  # fmt: skip

    def load(self, path: Path) -> RunProgress:
        """Take over the weights and the optimiser of a run that was stopped; return its progress.

        Raises UsageError where it is not this run.
        """
        learner = self._learner
        return load_run(path, learner.parameters, learner.optimizer, self._options, self.identity)

    def _all_facts(self, progress: RunProgress, found: Evaluation | None) -> dict[str, Any]:
        """Return what config.json says of the heads."""
        options = asdict(self._options)
        training = {
            **self._facts["training"],
            "steps": progress.step,
            "epochs_done": progress.epoch,
            # Without paths.
            "options": {name: v for name, v in options.items() if name not in FREE_TO_CHANGE},
        }
        if found:
            training["validation"] = found.figures()
        unknown = [[0.0] * RANKS] * self._heads.config.k_heads
        accuracies = progress.rank_accuracies or unknown
        return {**self._facts, "training": training, "rank_accuracies": accuracies}
