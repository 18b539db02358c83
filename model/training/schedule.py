"""Schedule: positions per step, learning rate and epochs, as they suit the amount of text.

What the options say is taken; what they leave open is chosen. Knows neither heads nor files.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.training.options import TrainOptions

STEPS = 1500  # of the optimiser, where there is enough text; small steps learn more (NOTES.md)
FEWEST_POSITIONS = 256  # per step
MOST_POSITIONS = 8192
MOST_EPOCHS = 8
FEWEST_EPOCHS = 2
ENOUGH_POSITIONS = 1_000_000  # from which on the fewest epochs do
LEARNING_RATE = 2e-3  # of REFERENCE positions per step; it grows with their square root
REFERENCE = 1024


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a run goes over its text. positions: per batch; epochs: passes over the text."""

    positions: int
    learning_rate: float
    epochs: int


def choose_schedule(options: TrainOptions, n_positions: int, max_length: int) -> Schedule:
    """Return what the options say, and choose what they leave open.

    n_positions: of the training text; max_length: tokens per sequence.
    """
    epochs = options.epochs
    if not epochs:
        epochs = round(ENOUGH_POSITIONS / max(1, n_positions))
        epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, epochs))
    positions = options.batch_size * max_length
    if not positions:
        positions = n_positions * epochs // (STEPS * options.gradient_accumulation_steps)
        positions = min(MOST_POSITIONS, max(FEWEST_POSITIONS, positions))
    rate = options.learning_rate
    if not rate:
        per_step = positions * options.gradient_accumulation_steps
        rate = float(f"{LEARNING_RATE * (per_step / REFERENCE) ** 0.5:.2g}")
    return Schedule(positions=positions, learning_rate=rate, epochs=epochs)
