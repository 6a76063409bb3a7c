"""What must not cost time on a GPU: graph breaks, recompilations, and waits of the host for the device."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dnazen.layers import linear
from dnazen.layers.attention import Selection, alibi_slopes, flex, packed_attention, select
from dnazen.layers.compilation import RECOMPILE_LIMIT, compile_dynamic
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM, DNAZenForSequenceClassification
from tests.helpers.synchronisations import ForbidSynchronisation

# One token budget; other lengths, numbers of sequences, G-grams and edges in every batch.
BATCHES = [
    ([20, 30, 14], [3, 2, 4]),
    ([10, 40, 14], [1, 0, 5]),
    ([32, 32], [5, 6]),
    ([20, 5, 5, 34], [1, 1, 1, 1]),
    ([63], [2]),
    ([8] * 7, [0, 0, 3, 0, 0, 0, 9]),
]
# The same with a quarter of the tokens, for kernels may be interpreted, row by row. In the first 2 are masked, for a
# size of 1 is compiled for itself.
SMALL_BATCHES = [
    ([6, 7, 4], [3, 2, 4]),
    ([4, 9, 4], [1, 0, 5]),
    ([9, 8], [5, 6]),
    ([5, 3, 3, 6], [1, 1, 1, 1]),
    ([16], [2]),
    ([3] * 5, [0, 0, 3, 0, 9]),
]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(("impl", "is_checkpointing"), [("auto", False), ("auto", True), ("triton", False)])
def test_compiled_layers_equal_eager_ones_and_compile_once(
    impl, is_checkpointing, config, make_batch, fresh_dynamo, monkeypatch
):
    """`fullgraph` makes any graph break an error. Attention is sdpa's; on a GPU it is as little part of the graphs.
    Drop-out is on, and draws the same in both; where kernels are interpreted, the eager one runs plain PyTorch.
    """
    config.hidden_dropout_prob = 0.1
    monkeypatch.setattr(linear, "MIN_ELEMENTS", 0)  # what a GPU's batches would do
    if impl == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")
    device = "cuda" if torch.cuda.is_available() and impl == "triton" else "cpu"
    plain, compiled = (
        DNAZenForMaskedLM(DNAZenConfig.from_dict({**config.to_dict(), "impl": name})).to(device)
        for name in ("auto", impl)
    )
    compiled.load_state_dict(plain.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_layers(backend=counter)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    if is_checkpointing:
        compiled.gradient_checkpointing_enable({"use_reentrant": False})
    compiled.train()
    batches, counts = SMALL_BATCHES if impl == "triton" else BATCHES, []
    for seed, (lengths, ngram_counts) in enumerate(batches):
        batch = make_batch(lengths, ngram_counts, seed=seed)
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            torch.manual_seed(seed)
            loss = model(**batch).loss
            loss.backward()
            results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
        torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0, "nothing was compiled"
    assert counts == [counts[0]] * len(batches)


@pytest.mark.slow
def test_no_step_waits_for_the_device(config, make_batch, device, monkeypatch):
    """On a CPU by the operators called, with a stand-in for PyTorch's flex_attention, which has no backward there and
    no
    rule for watching it: what the tiles are built from is real. Only on a GPU is the kernel itself watched."""
    config.impl, config._attn_implementation, config.hidden_dropout_prob = "triton", "flex_attention", 0.1
    config.hidden_size = 16 * config.num_attention_heads  # on a GPU FlexAttention takes no smaller heads
    model = DNAZenForMaskedLM(config).to(device)
    if device.type == "cpu":
        stand_in = lambda query, key, value, score_mod, block_mask: query + key + value  # noqa: E731
        monkeypatch.setattr("dnazen.layers.attention.flex.flex_attention", stand_in)
        monkeypatch.setattr(model.bert, "select_attention", lambda *_: Selection("flex_attention", {}))
    batch = make_batch([6, 7, 4], [3, 0, 4])
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


@pytest.mark.slow
def test_more_versions_than_by_default_in_any_thread_and_no_limit_changed(fresh_dynamo):
    """Checkpointed layers run again in autograd's threads, which do not see what another thread has configured."""
    counter = CompileCounterWithBackend("eager")
    double = compile_dynamic(lambda x: x + x, backend=counter)
    default = torch._dynamo.config.recompile_limit
    dimensions = range(1, default + 4)  # each number of them is a version

    def run() -> list[float]:
        return [double(torch.ones([2] * number)).sum().item() for number in dimensions]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() == [2 * 2**number for number in dimensions]
    assert counter.frame_count == len(dimensions) and torch._dynamo.config.recompile_limit == default


@pytest.fixture
def compiled_flex(fresh_dynamo, monkeypatch) -> CompileCounterWithBackend:
    """FlexAttention as compiled for a GPU, but traced alone, on the CPU; counts its versions.

    PyTorch refuses its backward on a CPU, for which it has no kernel, but can trace it. How PyTorch lowers it for a GPU
    is not seen here.
    """
    counter = CompileCounterWithBackend("aot_eager")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=counter))
        compiled = flex._compiled_flex_attention.__wrapped__()
    monkeypatch.setattr(flex, "flex_attention", compiled)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    return counter


@pytest.mark.slow
def test_flex_attention_compiles_once_for_both_encoders(compiled_flex):
    """Whatever the number of rows and of sequences."""
    for lengths in ([200, 60, 300], [128, 128], [300, 20, 1, 0, 40], [500, 500], [130], [1] * 700):
        total = sum(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        states = torch.randn(total, 3, 12, 8).unbind(1)
        for slopes in (alibi_slopes(12), None):
            contexts = [
                packed_attention(name, cu_seqlens, max(lengths), total, slopes)(*states)[0]
                for name in ("flex_attention", "eager")
            ]
            torch.testing.assert_close(*contexts, rtol=1e-5, atol=1e-5)
    assert compiled_flex.frame_count == 1


@pytest.mark.slow
def test_versions_of_flex_attention_are_few_and_all_there_after_a_round(compiled_flex):
    """Rows in one tile, in more, and one row; each way of recording gradients; the layouts of both encoders' states."""
    versions = []
    for _ in range(2):
        for mode, total, is_fused in itertools.product(
            (torch.enable_grad, torch.no_grad, torch.inference_mode), (300, 90, 1, 0, 200, 50), (True, False)
        ):
            with mode():
                cu_seqlens = torch.tensor([0, total // 3, total], dtype=torch.int32)
                if is_fused:
                    states = torch.randn(total, 3 * 4 * 8, requires_grad=True).unflatten(-1, (3, 4, 8)).unbind(-3)
                else:
                    states = [torch.randn(total, 4 * 8, requires_grad=True).unflatten(-1, (4, 8)) for _ in range(3)]
                slopes = alibi_slopes(4) if is_fused else None
                found, expected = (
                    packed_attention(name, cu_seqlens, total, total, slopes)(*states)[0]
                    for name in ("flex_attention", "eager")
                )
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                if mode is torch.enable_grad:
                    grad = torch.randn_like(found)
                    gradients = (torch.autograd.grad(context, states, grad) for context in (found, expected))
                    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
        versions.append(compiled_flex.frame_count)
    # three modes, three classes of totals, two layouts: more than the 8 that torch allows by default
    assert versions == [18, 18]


@pytest.mark.slow
def test_fine_tuning_compiles_all_versions_in_its_first_rounds(compiled_flex, config, make_batch, monkeypatch):
    """The check at the start, then training and dev in turn, with no G-gram, one, a tile of them at most, and more."""
    layers = CompileCounterWithBackend("aot_eager")
    models = [DNAZenForSequenceClassification(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, name in zip(models, ("flex_attention", "eager")):
        monkeypatch.setattr(model.bert, "select_attention", lambda *_, name=name: Selection(name, {}))
    models[0].compile_layers(backend=layers)
    assert select._disagreement("flex_attention", torch.device("cpu"), torch.float32, 3, 8, training=True) is None
    versions = []
    for seed in range(3):
        for counts in ([0, 0, 0], [0, 1, 0], [3, 0, 4], [60, 1, 90], [30, 50, 40], [2, 0, 0]):
            for is_training, lengths in ((True, [20, 200 + seed, 14]), (False, [90, 31, 12 + seed])):
                batch = make_batch(lengths, counts, seed=seed, mask_rate=None)
                logits = []
                for model in models:
                    with torch.enable_grad() if is_training else torch.inference_mode():
                        logits.append(model.train(is_training)(**batch).logits)
                    if is_training:
                        logits[-1].square().sum().backward()
                torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-5)
        versions.append((compiled_flex.frame_count, layers.frame_count))
    gradients = ({name: p.grad for name, p in model.named_parameters()} for model in models)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)  # sums over 18 batches
    assert versions[2] == versions[1]  # the first round need not have met a batch with a single edge
    # more than torch allows by default; those of the layers are of two functions
    assert 8 < versions[-1][0] < RECOMPILE_LIMIT and 16 < versions[-1][1] < RECOMPILE_LIMIT, versions
