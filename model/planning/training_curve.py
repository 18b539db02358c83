"""The training's step times: what steps cost on this machine, to judge heads by.

Knows neither heads nor training.
"""

from __future__ import annotations

from model.base.llama import LlamaBase
from model.base.llama_model import LlamaModel
from model.planning.measured_steps import SEQ_IDS, time_steps
from model.storage.facts import key_here, recall, remember
from model.trees.costs import SIZES, CostCurve
from model.trees.slices import finish

KIND = "training_curves"  # of what is remembered
CONTEXT = 64  # tokens in the cache
BUDGET_S = 0.5


def training_curve(
    model: LlamaModel,
    fingerprint: str,
    max_nodes: int,
    n_threads: int,
    *,
    flash_attn: bool | None,
    kv_type: str,
) -> CostCurve:
    """Return the remembered times of steps over a short context, or measure them.

    Measured in 3 rounds, for BUDGET_S or longer. Remembered, so that a run which is resumed before
    its first validation still comes to the same tree.
    """
    # Remembered?
    key = key_here(fingerprint, max_nodes, n_threads, flash_attn, kv_type)
    kept = CostCurve.from_json(recall(KIND).get(key))
    if kept is not None:
        return kept

    # Measure.
    room = CONTEXT + 2 * SIZES[-1]
    with LlamaBase(
        model,
        n_ctx=room,
        n_threads=n_threads,
        n_seq_max=SEQ_IDS,
        embeddings=True,
        flash_attn=flash_attn,
        kv_type=kv_type,
    ) as base:
        curve = finish(time_steps(base, [CONTEXT], max_nodes, BUDGET_S))
    remember(KIND, key, curve.to_json())
    return curve
