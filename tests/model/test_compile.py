"""What must not cost time on a GPU: graph breaks, recompilations, and waits of the host for the device."""

import os

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from dnazen.layers.attention import Selection, alibi_slopes, packed_attention
from dnazen.models import DNAZenForMaskedLM
from tests.ops.synchronisations import ForbidSynchronisation

# One token budget; other lengths, numbers of sequences, G-grams and edges in every batch.
BATCHES = [
    ([20, 30, 14], [3, 2, 4]),
    ([10, 40, 14], [1, 0, 5]),
    ([32, 32], [5, 6]),
    ([20, 5, 5, 34], [1, 1, 1, 1]),
    ([63], [2]),
    ([8] * 7, [0, 0, 3, 0, 0, 0, 9]),
]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(
    ("impl", "is_checkpointing"), [("auto", False), ("auto", True), pytest.param("triton", False, marks=pytest.mark.slow)]
)
def test_compiled_layers_equal_eager_ones_and_compile_once(
    impl, is_checkpointing, config, make_batch, fresh_dynamo
):
    """`fullgraph` makes any graph break an error. Attention is sdpa's; on a GPU it is as little part of the graphs."""
    if impl == "triton":
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")
        config.impl = "triton"
    device = "cuda" if torch.cuda.is_available() and impl == "triton" else "cpu"
    plain = DNAZenForMaskedLM(config).to(device)
    compiled = DNAZenForMaskedLM(config).to(device)
    compiled.load_state_dict(plain.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_layers(backend=counter)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    if is_checkpointing:
        compiled.gradient_checkpointing_enable({"use_reentrant": False})
    compiled.train()
    counts = []
    for seed, (lengths, ngram_counts) in enumerate(BATCHES):
        batch = make_batch(lengths, ngram_counts, seed=seed)
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
        torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0, "nothing was compiled"
    assert counts == [counts[0]] * len(BATCHES)


def test_no_step_waits_for_the_device(config, make_batch, device, monkeypatch):
    """On a CPU by the operators called, with a stand-in for PyTorch's flex_attention, which has no backward there and no
    rule for watching it: what the tiles are built from is real. Only on a GPU is the kernel itself watched."""
    config.impl, config._attn_implementation = "triton", "flex_attention"
    model = DNAZenForMaskedLM(config).to(device)
    if device.type == "cpu":
        stand_in = lambda query, key, value, score_mod, block_mask: query + key + value  # noqa: E731
        monkeypatch.setattr("dnazen.layers.attention.flex.flex_attention", stand_in)
        monkeypatch.setattr(model.bert, "select_attention", lambda *_: Selection("flex_attention", {}))
    batch = make_batch([20, 30, 14], [3, 0, 4])
    batch["masked_positions"] = (batch["labels"] != -100).nonzero().squeeze(1)
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    num_items = torch.tensor(40, device=device)

    def step():
        model(**batch, num_items_in_batch=num_items).loss.backward()

    step()  # compiles
    with ForbidSynchronisation(device):
        step()
    del batch["masked_positions"]
    with pytest.raises((AssertionError, RuntimeError), match="waits for the device|synchroniz"):
        with ForbidSynchronisation(device):
            step()


def test_flex_attention_compiles_once_for_both_encoders(fresh_dynamo, monkeypatch):
    """Whatever the number of rows and of sequences. Traced on a CPU; how PyTorch lowers it for a GPU is not seen here."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr("dnazen.layers.attention.flex.flex_attention", compiled)
    for lengths in ([200, 60, 300], [128, 128], [300, 20, 1, 0, 40], [500, 500], [130], [1] * 700):
        total = sum(lengths) + 5
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        states = torch.randn(total, 3, 12, 8).unbind(1)
        for slopes in (alibi_slopes(12), None):
            contexts = [
                packed_attention(name, cu_seqlens, max(lengths), total, slopes)(*states)[0]
                for name in ("flex_attention", "eager")
            ]
            torch.testing.assert_close(*contexts, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
