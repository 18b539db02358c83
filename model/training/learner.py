"""One optimiser step: batches in, weights changed.

AdamW, gradient clipping, a warm-up and cosine schedule.

Knows no files, no epochs and no validation.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.heads.medusa import MedusaHeads
from model.training.options import TrainOptions
from model.training.precision import use_bf16
from model.training.ranks import Ranks
from model.training.states.batches import Batch
from model.training.teaching import HeadsLoss

WARMUP = 0.05  # of all steps


def learning_rate(step: int, total: int, peak: float) -> float:
    """Return the rate of step (from 0) of total: linear warm-up, then half a cosine to zero."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


class Learner:
    """Heads and their optimiser. ranks: the processes that share each batch.

    teacher: the base model's LM head (R, D) for `--loss kd`.
    """

    def __init__(
        self, heads: MedusaHeads, options: TrainOptions, teacher: Tensor | None, ranks: Ranks
    ) -> None:
        self._options = options
        self._ranks = ranks
        self._heads = heads
        self._device = heads.weight.device
        self._autocast = use_bf16(self._device)
        self.parameters = {name: p for name, p in heads.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=options.learning_rate, weight_decay=options.weight_decay,
            fused=True,
        )  # fmt: skip
        self._loss: nn.Module = HeadsLoss(heads, options, teacher)
        if ranks.count > 1:
            self._loss = DistributedDataParallel(self._loss, broadcast_buffers=False)

    def step(self, batches: list[Batch], rate: float) -> float:
        """Add up the gradients of some batches and change the weights; return the loss.

        The loss may be no number; the weights are left as they were then.
        """
        for setting in self.optimizer.param_groups:
            setting["lr"] = rate
        total = 0.0
        for number, batch in enumerate(batches, 1):
            # Several processes share their gradients once, with the last batch.
            shares = number == len(batches)
            with self._without_sharing() if not shares else contextlib.nullcontext():
                total += self._backward(batch, len(batches))
        total = float(self._ranks.sum(torch.tensor(total, dtype=torch.float64)))
        if not math.isfinite(total):
            return total
        if self._options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _without_sharing(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._loss, DistributedDataParallel):
            return self._loss.no_sync()
        return contextlib.nullcontext()

    def _rows_of(self, batch: Batch) -> Tensor:
        """Return a batch's targets (N, K) as rows of the LM head."""
        return self._heads.rows_of(batch.targets.to(self._device))

    def _backward(self, batch: Batch, parts: int) -> float:
        """Add the gradients of this process's rows of one of `parts` batches; return their loss."""
        rank = self._ranks.rank
        count = self._ranks.count
        # The means are those of the whole batch, whichever rows are this process's.
        wanted = (self._rows_of(batch) >= 0).sum(0)
        rows = batch[len(batch) * rank // count : len(batch) * (rank + 1) // count]
        around = rows.around.to(self._device).float()
        places = rows.places.to(self._device)
        tokens = rows.tokens.to(self._device)
        targets = self._rows_of(rows)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            loss: Tensor = self._loss(around, places, tokens, targets, wanted) / parts
        (loss * count).backward()  # DistributedDataParallel makes the mean over processes of it
        return loss.item()
