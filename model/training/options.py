"""Options of a training run: names, defaults, meanings, for command line and YAML alike.

Know nothing of how they are used.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from model.errors import UsageError, one_line


def _option(
    default: Any,
    meaning: str,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    return field(
        default=default, metadata={"help": meaning, "least": least, "below": below, "most": most}
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """All options of `train_medusa.py`; its `--help` is made of this table."""

    base_model_path: str = _option(
        "", "The base model: a GGUF file, or a short name as in MODEL_PATH."
    )
    head_type: Literal["medusa", "hydra"] = _option(
        "hydra", "hydra: heads read drafted tokens too; medusa: the state alone."
    )
    k_heads: int = _option(5, "Number of heads; head i drafts i+1 tokens ahead.", 1)
    head_layers: int = _option(1, "Residual blocks per head.", 1)
    hidden_dim: int = _option(
        0, "Width inside a block; 0: the model's own. Smaller makes a bottleneck.", 0
    )
    lm_head: Literal["tied", "own"] = _option(
        "tied", "tied: the model's LM head, frozen; own: a trained copy per head."
    )
    loss: Literal["ce", "kd"] = _option(
        "kd", "kd: learn the base model's distribution over the next token; ce: the text's tokens."
    )
    draft_vocab: int | None = _option(
        None,
        "Heads draft from so many of the text's most frequent tokens; 0: from all; "
        "default: from those that make up 99.9 % of it, 8,192 at the least.",
        0,
    )
    kd_temperature: float = _option(1.0, "Distributions are softened by it (--loss kd).", 0.01)
    kd_weight: float = _option(
        1.0, "Weight of that distribution against the text's tokens (--loss kd).", 0, most=1
    )
    dataset_name: str = _option(
        "", "Hugging Face data set, .txt, .jsonl, .json, .parquet or folder; none: the demo's."
    )
    dataset_split: str = _option("train", "Split of a Hugging Face data set, such as train[:10%].")
    max_length: int = _option(
        0, "Tokens per sequence; 0: 1,024, or the model's context where that is shorter.", 0
    )
    max_tokens: int = _option(0, "Use at most so many tokens of the data set; 0: all.", 0)
    batch_size: int = _option(
        0, "Sequences of max_length per step; 0: as many positions as suit the amount of text.", 0
    )
    learning_rate: float = _option(0.0, "Peak learning rate; 0: what suits the batch size.", 0)
    epochs: int = _option(0, "Passes over the training text; 0: as many as suit its amount.", 0)
    hours: float = _option(
        0.0,
        "Let the model write answers (to the data set's prompts, or its own), and train on them, "
        "for so long in all; 0: train on the data set as it is.",
        0,
    )
    patience: int = _option(
        0,
        "End after so many epochs without a longer acceptance length of the tuned tree; 0: never.",
        0,
    )
    weight_decay: float = _option(0.0, "AdamW's weight decay.", 0)
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; 0: not at all.", 0)
    gradient_accumulation_steps: int = _option(1, "Batches per step of the optimiser.", 1)
    output_dir: str = _option(
        "", "Where heads go; default: a folder for the model below medusa_heads_weights/."
    )
    resume_from: str = _option("", "Go on with the run in this folder; its options are taken over.")
    report_to: Literal["tensorboard", "wandb", "none"] = _option(
        "tensorboard",
        "Where curves go, beside metrics.jsonl; wandb must be installed "
        "(WANDB_MODE=offline: no upload).",
    )
    val_fraction: float = _option(0.05, "Share of the documents used for validation.", 0, 1)
    seed: int = _option(0, "Seed of the order and of the validation split.", 0)
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "Where heads are trained.")
    cache: Literal["on", "off"] = _option(
        "on", "on: keep the states on disk; off: extract them anew in each epoch."
    )
    cache_dir: str = _option(
        "", "Where states are kept; default: a folder for model and text below .cache/states/."
    )
    cache_dtype: Literal["fp16", "fp8"] = _option("fp16", "Number type of kept states.")


# When a run is resumed.
FREE_TO_CHANGE = {
    "output_dir",
    "resume_from",
    "device",
    "cache_dir",
    "base_model_path",
    "dataset_name",
    "hours",
    "patience",
    "report_to",
}


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file, in which on and off are booleans.

    Raises UsageError for what is no mapping, and for unknown keys.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: needs lines of the form 'option: value'")
    known = {item.name for item in fields(TrainOptions)}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise UsageError(
            f"--config {path}: unknown option {', '.join(unknown)}; "
            f"known: {', '.join(sorted(known))}"
        )
    words = {True: "on", False: "off"}
    return {
        key: words[value] if isinstance(value, bool) else value for key, value in values.items()
    }


def changed_options(old: dict[str, Any], new: TrainOptions) -> list[str]:
    """Name the options that differ from those a run was begun with and decide about its result.

    With both values."""
    # What they were before they could be chosen.
    old = {"head_type": "medusa", "loss": "ce", "draft_vocab": 0, **old}
    pairs = {
        item.name: (old.get(item.name, item.default), getattr(new, item.name))
        for item in fields(new)
    }
    return [
        f"{name} ({a}, now {b})"
        for name, (a, b) in pairs.items()
        if name not in FREE_TO_CHANGE and a != b
    ]
