"""What a training step leaves out or joins together, against the same step with nothing left out."""

import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dnazen.layers import linear
from dnazen.layers.attention import Selection, alibi_slopes, attend_packed, packed_attention
from dnazen.layers.linear import SharedInputLinear, project
from dnazen.models import DNAZenForMaskedLM

BATCHES = {
    "mixed": dict(lengths=[3, 17, 17, 9, 40], ngram_counts=[0, 4, 2, 0, 9]),
    "no G-gram": dict(lengths=[12, 3, 12], ngram_counts=[0, 0, 0]),
    "nothing masked": dict(lengths=[12, 7], ngram_counts=[3, 1], mask_rate=0.0),
}
# Sums of at most some 90 rows and 120 columns in another order, through 3 layers, on numbers up to 10.
FP64 = dict(rtol=1e-10, atol=1e-11)
FP32 = dict(rtol=1e-5, atol=2e-5)


def run(model: torch.nn.Module, batch: dict, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and every gradient."""
    model.zero_grad()
    loss = model(**batch, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **tolerance, msg=lambda text: f"{name}: {text}")


class Recorder(TorchDispatchMode):
    """Names of operations with the shapes of what they give, in order."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append((function.overloadpacket.__name__, tuple(result.shape)))
        return result

    def count(self, names: set[str], shape: tuple[int, ...]) -> int:
        return sum(name in names and found == shape for name, found in self.seen)


@pytest.fixture
def always_shared(monkeypatch):
    """The residual's gradient is summed in the matrix product, however small the batch."""
    monkeypatch.setattr(linear, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(linear, "_CPU_MULTIPLIES_BF16", True)  # where it cannot, it has a way of its own


# -- the last layer on the masked rows --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("is_checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
def test_last_layer_on_masked_rows_is_exact(batch, attention, is_checkpointing, config, make_batch):
    """In fp64, where rounding hides nothing, but for SDPA, which is wrong there with an fp32 bias. Whoever asks for
    hidden states has the last layer in full."""
    config._attn_implementation = attention
    model, batch = DNAZenForMaskedLM(config).train(), make_batch(**BATCHES[batch])
    model = model if attention == "sdpa" else model.double()
    expected = run(model, batch, output_hidden_states=True)
    if is_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = run(model, batch)
    assert_same(found, expected, **(FP32 if attention == "sdpa" else FP64))
    assert found[1].keys() == dict(model.named_parameters()).keys()


def test_rows_of_the_last_layer(config, make_batch):
    """Every product after its attention, forward and backward, is of the masked rows."""
    batch, model = make_batch([17, 9, 40], [4, 0, 9]), DNAZenForMaskedLM(config)
    num_masked = int((batch["labels"] != -100).sum())
    assert 0 < num_masked < 66
    calls = []
    layers = [*model.bert.encoder.layer[-2:]]
    for layer in layers:
        for module in (layer.attention.self.Wqkv, layer.attention.output.dense, layer.mlp.gated_layers, layer.mlp.wo):
            module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    model(**batch)
    assert calls == [66] * 4 + [66] + [num_masked] * 3
    calls.clear()
    model(**batch, output_hidden_states=True)
    assert calls == [66] * 8
    config.num_hidden_ngram_layers = config.num_hidden_layers
    calls.clear()
    fused = DNAZenForMaskedLM(config)
    fused.bert.encoder.layer[-1].mlp.wo.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    fused(**batch)
    assert calls == [66]  # G-grams are added to it, so all rows are needed


def test_evaluation_of_masked_rows_equals_that_of_all(config, make_batch):
    model, batch = DNAZenForMaskedLM(config).double().eval(), make_batch([17, 9, 40], [4, 0, 9])
    labels = batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, labels=labels).logits, model(**batch).logits[labels != -100], **FP64)


# -- the residual's gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_gradient_in_the_product_is_within_its_rounding(dtype, always_shared):
    """Of `r + g @ W`: a sum of 60 products in fp32 and at most two roundings, of the product and of the sum."""
    layer = SharedInputLinear(24, 60).to(dtype)
    states = torch.randn(50, 24).to(dtype).requires_grad_()
    for shape in ((50,), (5, 10)):
        projected, residual = project(layer, states.unflatten(0, shape))
        assert projected.grad_fn.name().startswith("_LinearAndInput")
        grads = [torch.randn_like(output) for output in (projected, residual)]
        exact, magnitude = (
            (change(grads[0].double()) @ change(layer.weight.double()) + change(grads[1].double())).flatten(0, -2)
            for change in (torch.clone, torch.abs)
        )
        inputs = [states, layer.weight, layer.bias]
        found = torch.autograd.grad([projected, residual], inputs, [grad.clone() for grad in grads])
        eps = torch.finfo(dtype).eps / 2
        bound = (2 * eps + 61 * 2**-24) * magnitude
        assert ((found[0].double() - exact).abs() <= bound).all()
        plain = torch.nn.functional.linear(states.unflatten(0, shape), layer.weight, layer.bias)
        for gradient, expected in zip(found[1:], torch.autograd.grad(plain, inputs[1:], grads[0])):
            torch.testing.assert_close(gradient, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("change", ["none", "reference", "dropout", "checkpoint", "reentrant", "frozen", "lora"])
def test_step_with_the_residual_gradient_in_the_product(change, config, make_batch, monkeypatch):
    """In fp64: added in place, to a gradient that nobody else still reads, whatever is built around the layers."""
    config.hidden_dropout_prob = 0.2 if change in ("dropout", "checkpoint", "reentrant") else 0.0
    if change == "reference":
        config.impl = "reference"
    model, batch = DNAZenForMaskedLM(config), make_batch([17, 9, 40], [4, 0, 9])
    if change == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in ("embeddings", "Wqkv", "layernorm")))
    if change == "lora":
        targets = ["Wqkv", "gated_layers"]
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    if change in ("checkpoint", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": change == "reentrant"})
    model = model.double().train()
    results, sums = [], []
    for minimum in (2**62, 0):
        monkeypatch.setattr(linear, "MIN_ELEMENTS", minimum)
        torch.manual_seed(3)
        with Recorder() as recorder:
            results.append(run(model, batch))
        shape = (3, 40, 24) if change == "reference" else (66, 24)
        sums.append(recorder.count({"add", "add_"}, shape))
    assert_same(*results, **FP64)
    if change in ("none", "dropout"):
        # in each of three layers one of [T, H] in attention; in the MLP of the last it is of masked rows
        assert sums[0] - sums[1] == 3 + 2, sums


def test_under_autocast_the_plain_way(config, make_batch, always_shared):
    """Products are of bf16 and residuals of fp32 there."""
    model, batch = DNAZenForMaskedLM(config), make_batch([17, 9], [4, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(model, batch)
    # some 20 roundings to 8 bits
    torch.testing.assert_close(found[0], run(model, batch)[0], rtol=0.03, atol=0)


# -- attention's gradients as one -------------------------------------------------------------------------------------


def stand_in_forward(query, key, value, return_lse, cu_seqlens_q, max_seqlen_q, aux_tensors=None, **_):
    slopes = None if aux_tensors is None else aux_tensors[0]
    attention = packed_attention("eager", cu_seqlens_q, max_seqlen_q, len(query), slopes)
    return attention(query, key, value)[0], torch.zeros(query.shape[1], len(query)), None, None, None


def stand_in_backward(query, key, value, out, grad, lse, *, dq, dk, dv, score_mod=None, score_mod_bwd=None, **bounds):
    with torch.enable_grad():
        states = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        context = stand_in_forward(*states, return_lse=True, **bounds)[0]
    for into, gradient in zip((dq, dk, dv), torch.autograd.grad(context, states, grad)):
        into.copy_(gradient)
    return dq, dk, dv


class StandInFunction(torch.autograd.Function):
    """FlashAttention-2's own for packed input: one gradient."""

    @staticmethod
    def forward(ctx, qkv, bounds):
        ctx.bounds = bounds
        ctx.save_for_backward(qkv)
        return stand_in_forward(*qkv.unbind(1), return_lse=True, **bounds)[0]

    @staticmethod
    def backward(ctx, grad):
        (qkv,) = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        into = dict(zip(("dq", "dk", "dv"), grad_qkv.unbind(1)))
        stand_in_backward(*qkv.unbind(1), None, grad, None, **into, **ctx.bounds)
        return grad_qkv, None


@pytest.fixture
def flash_stand_ins(monkeypatch):
    """Both packages' functions by their names and arguments, with eager attention in them; theirs need a GPU."""

    def separate(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes=None):
        attention = packed_attention("eager", cu_seqlens_q, max_seqlen_q, len(query), alibi_slopes)
        return attention(query, key, value)[0]

    def packed(qkv, cu_seqlens, max_seqlen, alibi_slopes):
        bounds = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max_seqlen, "aux_tensors": [alibi_slopes]}
        return StandInFunction.apply(qkv, bounds)

    modules = {
        "flash_attn.flash_attn_interface": SimpleNamespace(
            flash_attn_varlen_func=separate, flash_attn_varlen_qkvpacked_func=packed
        ),
        "flash_attn.cute.interface": SimpleNamespace(
            flash_attn_varlen_func=lambda *states, **bounds: (separate(*states, **bounds), None),
            _flash_attn_fwd=stand_in_forward, _flash_attn_bwd=stand_in_backward,
        ),
        "dnazen.layers.attention.flash_4_alibi": SimpleNamespace(alibi=abs, alibi_backward=abs),
    }  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_4"])
def test_flash_attention_writes_its_three_gradients_as_one(name, config, make_batch, flash_stand_ins):
    model, batch = DNAZenForMaskedLM(config).double(), make_batch([17, 9, 40], [4, 0, 9])
    results, stacked = [], []
    for backend in ("eager", name):
        model.bert.select_attention = lambda *_, backend=backend: Selection(backend, {})
        with Recorder() as recorder:
            results.append(run(model, batch))
        stacked.append(recorder.count({"stack", "cat"}, (66, 3, 3, 8)))
    assert_same(results[1], results[0], **FP64)
    assert stacked == [3, 0]  # one a layer


def test_flash_attention_4_takes_packed_states_with_all_slopes(flash_stand_ins):
    slopes = alibi_slopes(4)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    qkv = torch.randn(12, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    contexts, gradients = [], []
    for name in ("eager", "flash_attention_4"):
        context, _ = attend_packed(packed_attention(name, cu_seqlens, 7, 12, slopes), qkv)
        contexts.append(context)
        gradients.append(torch.autograd.grad(context.square().sum(), qkv)[0])
    torch.testing.assert_close(*contexts, **FP64)
    torch.testing.assert_close(*gradients, **FP64)
