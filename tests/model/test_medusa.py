"""What heads compute: stacked parameters against one head at a time, and the start from zero."""

import pytest
import torch
from torch.nn import functional as F

from model.heads.medusa import HeadsConfig, MedusaHeads

K, D, V = 3, 16, 40


def make(
    lm_head: str = "tied", layers: int = 2, hidden: int = 0, scale: float = 1.0, cap: float = 0.0
) -> MedusaHeads:
    torch.manual_seed(0)
    config = HeadsConfig(
        k_heads=K,
        dim=D,
        vocab=V,
        head_layers=layers,
        hidden_dim=hidden,
        lm_head=lm_head,  # type: ignore[arg-type]
    )
    heads = MedusaHeads(config, torch.randn(V, D), scale, cap)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return heads


@pytest.mark.parametrize("lm_head", ["tied", "own"])
@pytest.mark.parametrize("hidden", [0, 6])
def test_stacked_heads_equal_one_head_at_a_time(lm_head: str, hidden: int) -> None:
    heads = make(lm_head, hidden=hidden, scale=0.5, cap=4.0)
    states = torch.randn(2, 5, D)
    expected = []
    for k in range(K):
        x = states
        for layer in range(2):
            inner = F.silu(F.linear(x, heads.weight[layer, k], heads.bias[layer, k]))
            x = x + (inner if heads.up is None else F.linear(inner, heads.up[layer, k]))
        expected.append(4.0 * torch.tanh(0.5 * x @ heads.lm_head_weight(k).T / 4.0))
    torch.testing.assert_close(heads.logits(states), torch.stack(expected))
    assert heads.hidden(states).shape == (K, 2, 5, D)


@pytest.mark.parametrize("hidden", [0, 6])
def test_untrained_heads_repeat_the_base_and_every_parameter_can_move(hidden: int) -> None:
    torch.manual_seed(0)
    lm_head = torch.randn(V, D)
    states = torch.randn(4, D)
    config = HeadsConfig(k_heads=K, dim=D, vocab=V, hidden_dim=hidden)
    heads = MedusaHeads(config, lm_head)
    torch.testing.assert_close(heads.logits(states), (states @ lm_head.T).expand(K, -1, -1))
    optimizer = torch.optim.SGD(heads.parameters(), 0.1)
    before = [parameter.detach().clone() for parameter in heads.parameters()]
    for _ in range(2):  # a bottleneck's first factor has a gradient only once the second has moved
        optimizer.zero_grad()
        heads.logits(states).logsumexp(-1).sum().backward()
        optimizer.step()
    for parameter, old in zip(heads.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)


def test_tied_lm_head_is_frozen_and_not_saved_own_is_trained_per_head() -> None:
    tied = make("tied")
    own = make("own")
    assert "lm_head" not in tied.state_dict()
    assert not tied.lm_head.requires_grad
    assert own.lm_head.requires_grad
    assert own.state_dict()["lm_head"].shape == (K, V, D)


def test_full_hidden_dim_is_no_bottleneck() -> None:
    assert make(hidden=D).up is None
    assert make(hidden=0).up is None
    assert make(hidden=D // 2).up is not None
