"""What Hydra heads compute, against one head and one token at a time.

Also what each may see, and the start from zero.
"""

import pytest
import torch
from torch.nn import functional as F

from model.heads.hydra import HydraHeads
from model.heads.medusa import HeadsConfig

K, D, V = 3, 16, 40


def make(lm_head: str = "tied", hidden: int = 0, trained: bool = True) -> HydraHeads:
    torch.manual_seed(0)
    config = HeadsConfig(
        k_heads=K,
        dim=D,
        vocab=V,
        head_layers=2,
        hidden_dim=hidden,
        lm_head=lm_head,  # type: ignore[arg-type]
        head_type="hydra",
    )
    heads = HydraHeads(config, torch.randn(V, D), 0.02 * torch.randn(V, D), 0.5, 4.0)
    with torch.no_grad():
        for parameter in heads.parameters() if trained else ():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return heads


@pytest.mark.parametrize("lm_head", ["tied", "own"])
@pytest.mark.parametrize("hidden", [0, 6])
def test_stacked_heads_equal_one_head_at_a_time(lm_head: str, hidden: int) -> None:
    heads = make(lm_head, hidden)
    states = torch.randn(2, 5, D)
    tokens = torch.randint(V, (2, 5, K))
    expected = []
    for k in range(K):
        read = torch.cat([heads.embeddings[tokens[..., j]] for j in range(k + 1)], -1)
        x = states + F.linear(read, heads.reader(k))
        for layer in range(2):
            inner = F.silu(F.linear(x, heads.weight[layer, k], heads.bias[layer, k]))
            x = x + (inner if heads.up is None else F.linear(inner, heads.up[layer, k]))
        expected.append(4.0 * torch.tanh(0.5 * x @ heads.lm_head_weight(k).T / 4.0))
    torch.testing.assert_close(heads.logits(states, tokens), torch.stack(expected))
    assert heads.hidden(states, tokens).shape == (K, 2, 5, D)
    assert 0.99 < float((heads.embeddings * heads.embedding_scale).square().mean()) < 1.01


@pytest.mark.parametrize("index", range(K))
def test_a_token_is_read_by_the_heads_behind_it_and_no_others(index: int) -> None:
    heads = make()
    states = torch.randn(4, D)
    tokens = torch.randint(1, V, (4, K))
    other = tokens.clone()
    other[:, index] -= 1
    differs = (heads.logits(states, tokens) != heads.logits(states, other)).flatten(1).any(1)
    assert differs.tolist() == [k >= index for k in range(K)]


@pytest.mark.parametrize("hidden", [0, 6])
def test_untrained_heads_repeat_the_base_and_every_parameter_can_move(hidden: int) -> None:
    heads = make(hidden=hidden, trained=False)
    states = torch.randn(4, D)
    tokens = torch.randint(V, (4, K))
    base = 4.0 * torch.tanh(0.5 * states @ heads.lm_head.T / 4.0)
    torch.testing.assert_close(heads.logits(states, tokens), base.expand(K, -1, -1))
    optimizer = torch.optim.SGD(heads.parameters(), 0.1)
    before = [parameter.detach().clone() for parameter in heads.parameters()]
    for _ in range(2):  # a bottleneck's first factor has a gradient only once the second has moved
        optimizer.zero_grad()
        heads.logits(states, tokens).logsumexp(-1).sum().backward()
        optimizer.step()
    for parameter, old in zip(heads.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
    moved = heads.embed.detach().flatten(1).any(1)
    assert moved.all(), "each head, for each token that it reads"


def test_what_belongs_to_the_base_is_frozen_and_not_saved() -> None:
    heads = make()
    assert {"lm_head", "embeddings"}.isdisjoint(heads.state_dict())
    assert not heads.lm_head.requires_grad and not heads.embeddings.requires_grad
    assert "embedding_scale" in heads.state_dict()
