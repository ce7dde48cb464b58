"""Training and compiling sparsified models."""

import math

import pytest
import torch
from torch import nn
from transformers import StaticCache, Trainer, TrainingArguments

import longstride as ls
from longstride.integrations.transformers import ATTENTION

PATTERNS = ["Local(4)", "per_head(Fixed(4, 1), Strided(3))"]


def results(model, tokens, **inputs):
    model.zero_grad()
    out = model(tokens, **inputs, use_cache=False).logits
    out.sin().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(make, tokens, reentrant, name):
    dropouts = {"embd_pdrop": 0.0, "resid_pdrop": 0.0} if name == "gpt2" else {}
    model = ls.sparsify(make(name, **dropouts), PATTERNS).train()
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    wanted = results(model, tokens, attention_mask=mask)
    options = {"use_reentrant": reentrant}
    # transformers 5.23 has renamed it.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(options)
    torch.testing.assert_close(results(model, tokens, attention_mask=mask), wanted)


class LowRank(nn.Module):
    """A frozen linear map and a trained update of low rank beside it, as LoRA has it."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, dtype=linear.weight.dtype) / 8)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=linear.weight.dtype))

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


def test_low_rank_adapters(make, tokens):
    model = ls.sparsify(make(), PATTERNS).requires_grad_(False)
    before = model(tokens).logits
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name)))
    assert torch.equal(model(tokens).logits, before)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(model(tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert len(trained) == 16
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_the_trainer_trains_saves_and_resumes_it(make, tmp_path):
    # A text that repeats every 5 tokens: who reads back that far can learn it.
    ids = (torch.arange(20) % 5 + 3).tolist()
    rows = [{"input_ids": ids[shift:] + ids[:shift], "labels": ids[shift:] + ids[:shift]} for shift in range(5)]
    model = ls.sparsify(make(dtype=torch.float32), ["Local(2)", "Local(2) | Strided(5)"])
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=5,
        max_steps=30,
        save_steps=20,
        learning_rate=0.01,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    start = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < min(start, math.log(5)) / 2
    again = type(model).from_pretrained(tmp_path / "checkpoint-20")
    assert again.config.longstride == {"patterns": ["Local(2)", "Local(2) | Strided(5)"]}
    assert again.config._attn_implementation == ATTENTION
    # Trainer turns caches off in the configurations that it saves, and generate() uses one all the same.
    lengths = []
    again.model.embed_tokens.register_forward_hook(lambda _module, args, _out: lengths.append(args[0].shape[1]))
    again.generate(torch.tensor([ids]), max_new_tokens=4)
    assert lengths == [20, 1, 1, 1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_trainer_checkpoints_gradients(make, tmp_path, reentrant):
    ids = (torch.arange(20) % 5 + 3).tolist()
    # transformers 5.23 has renamed it.
    name = "activation_checkpointing"
    name = name if name in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    losses, calls = [], []
    for recomputed in (False, True):
        model = ls.sparsify(make(dtype=torch.float32), PATTERNS)
        model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(len(losses)))
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            save_strategy="no",
            learning_rate=0.01,
            **{name: recomputed, f"{name}_kwargs": {"use_reentrant": reentrant}},
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8)
        losses.append(trainer.train().training_loss)
    assert [calls.count(0), calls.count(1)] == [3, 6]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_without_a_break(make, tokens, padded):
    model = ls.sparsify(make(num_hidden_layers=1) if padded else make(), PATTERNS[-1:] if padded else PATTERNS)
    inputs = {}
    if padded:
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][0, :6] = 0
    wanted = results(model, tokens, **inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, tokens, **inputs), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("fresh_compiler")
def test_packing_in_a_compiled_model(make, tokens):
    model = ls.sparsify(make(num_hidden_layers=1), PATTERNS[-1])
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    offsets = {"cu_seq_lens_q": torch.tensor([0, 8, 20, 28, 40], dtype=torch.int32), "max_length_q": 12}
    wanted = model(tokens, position_ids=positions, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(tokens, position_ids=positions, **offsets, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="also pass cu_seq_lens_q and max_length_q"):
        compiled(tokens, position_ids=positions, use_cache=False)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_compiled_once_for_all_positions(make, tokens, padded):
    model = ls.sparsify(make(num_hidden_layers=1), PATTERNS[-1])
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0 if padded else 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions} if padded else {}
    whole = model(tokens, **given, use_cache=False).logits
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    cache = StaticCache(config=model.config, max_cache_len=32)
    outs = []
    with torch.no_grad():
        model(tokens[:, :9], past_key_values=cache, **{k: x[:, :9] for k, x in given.items()})
        step = torch.compile(model, backend=count, fullgraph=True)
        for t in range(9, 20):
            # As generate() does it, the mask is made outside of the graph that reads it.
            inputs = model.prepare_inputs_for_generation(
                tokens[:, : t + 1],
                past_key_values=cache,
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1],
                next_sequence_length=1,
            )
            outs.append(step(**inputs, use_cache=True).logits)
    real = mask[:, 9:].bool() if padded else slice(None)
    torch.testing.assert_close(torch.cat(outs, 1)[real], whole[:, 9:][real], rtol=1e-9, atol=1e-9)
    assert len(graphs) == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_table_shorter_than_the_cache_in_a_compiled_step(make, tokens):
    table = torch.ones(16, 16, dtype=torch.bool).tril()
    table[2:, 1] = False
    model = ls.sparsify(make(num_hidden_layers=1), ls.BlockSparse(table, 4) & ls.Causal())
    cache = StaticCache(config=model.config, max_cache_len=100)
    with torch.no_grad():
        model(tokens[:, :-1], past_key_values=cache)
        step = torch.compile(model, backend="eager", fullgraph=True)
        found = step(tokens[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(found, model(tokens, use_cache=False).logits[:, -1:], rtol=1e-9, atol=1e-9)
