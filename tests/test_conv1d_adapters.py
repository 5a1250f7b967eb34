"""L-LoRA where output features are columns: transformers' Conv1D, as in GPT-2."""

import torch
from transformers import GPT2Config, GPT2Model

from talos_fast import finetune
from talos_fast.methods.l_lora import lora_adapters, lora_changes


def test_queries_and_values_of_gpt2_get_low_rank_changes_and_keys_none():
    """What the changed projection gives, beside what it gave and scale · x Aᵀ Bᵀ added by hand."""
    model = GPT2Model(GPT2Config(vocab_size=8, n_positions=8, n_embd=12, n_layer=2, n_head=2)).double()
    adapters = lora_adapters(model, rank=3)
    names = [f"h.{layer}.attn.c_attn.weight" for layer in range(2)]
    assert [(adapter.name, adapter.rows) for adapter in adapters] == [
        (name, rows) for name in names for rows in (slice(0, 12), slice(24, 36))
    ]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.b)
    parameters, scale, x = dict(model.named_parameters()), 0.5, torch.randn(2, 5, 12).double()
    before = [model.h[layer].attn.c_attn(x) for layer in range(2)]
    changes = lora_changes(adapters, parameters, scale)
    assert set(changes) == set(names)
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name].add_(change.dense())
    for layer, old in enumerate(before):
        query, key, value = model.h[layer].attn.c_attn(x).chunk(3, dim=-1)
        old_query, old_key, old_value = old.chunk(3, dim=-1)
        for_query, for_value = (scale * x @ a.a.t() @ a.b.t() for a in adapters[2 * layer : 2 * layer + 2])
        assert torch.equal(key, old_key)
        torch.testing.assert_close(query, old_query + for_query)
        torch.testing.assert_close(value, old_value + for_value)


def test_gpt2_is_fine_tuned_by_them():
    """The trained vector is the change: of rank r in queries and values, nothing in keys, and it lowers the loss."""
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=8, n_positions=8, n_embd=12, n_layer=2, n_head=2))
    tokens, head = torch.randint(0, 8, (32, 6)), torch.randn(12, 2)
    batches = [(tokens, (tokens == 3).any(1).long())]

    def forward(of, batch):
        return of(input_ids=batch[0], use_cache=False).last_hidden_state.mean(1) @ head

    losses = []

    def loss(logits, labels):
        losses.append(torch.nn.functional.cross_entropy(logits, labels))
        return losses[-1]

    vector = finetune(
        model, batches, method="l-lora", rank=3, forward=forward, loss=loss, lr=3e-2, steps=12, progress=False
    )
    assert losses[-1] < losses[0] - 0.02
    assert set(vector) == {f"h.{layer}.attn.c_attn.weight" for layer in range(2)}
    for change in vector.to_dense().values():
        query, key, value = change.chunk(3, dim=1)
        assert not key.any() and all(1 <= torch.linalg.matrix_rank(part, rtol=1e-4) <= 3 for part in (query, value))
