"""The models: against the formulas in plain code, and their forms and implementations against each other."""

import copy
import inspect
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from dnazen.models import DNAZenForMaskedLM, DNAZenForSequenceClassification, DNAZenModel

# Sequences of [CLS] x [SEP] and with no G-gram; equal neighbours, which share an SDPA call; no G-gram in the batch.
BATCHES = {
    "mixed": dict(lengths=[3, 17, 17, 9, 40], ngram_counts=[0, 4, 2, 0, 9]),
    "one short": dict(lengths=[3], ngram_counts=[1]),
    "no G-gram": dict(lengths=[12, 3, 12], ngram_counts=[0, 0, 0]),
    "nothing masked": dict(lengths=[12, 7], ngram_counts=[3, 1], mask_rate=0.0),
}
# fp32 rounding (6e-8 relative) of sums of some 40 terms in another order, through 3 layers, on logits of order 1 and
# gradients up to 2. Largest differences seen in 20 draws: 6e-6 and 3e-6.
LOGITS = dict(rtol=1e-5, atol=2e-5)
GRADIENTS = dict(rtol=1e-5, atol=2e-5)


def _run(model, batch, **settings):
    """Loss, the head's logits and every gradient, under changed configuration."""
    model = copy.deepcopy(model)
    for name, value in settings.items():
        setattr(model.config, name, value)
    output = model(**batch)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), "a parameter the gradient does not reach"
    return output.loss.detach(), output.logits.detach(), gradients


def _assert_same(left, right):
    torch.testing.assert_close(left[:2], right[:2], **LOGITS)
    for name, gradient in left[2].items():
        torch.testing.assert_close(gradient, right[2][name], **GRADIENTS, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("batch", BATCHES)
def test_packed_equals_padded_reference_and_eager_and_padded_input(batch, config, make_batch, pad_batch):
    batch, model = make_batch(**BATCHES[batch]), DNAZenForMaskedLM(config)
    packed = _run(model, batch)
    for other in (
        _run(model, batch, impl="reference"),
        _run(model, batch, _attn_implementation="eager"),
        _run(model, pad_batch(batch)),
        _run(model, pad_batch(batch), impl="reference"),
    ):
        _assert_same(packed, other)
    if len(batch["ngram_input_ids"]):
        # The signal is alive: all of it reaches the deepest parameters of both encoders.
        gradients = packed[2].items()
        expected = packed[0] > 0
        assert all(gradient.any() == expected for name, gradient in gradients if name.endswith("weight"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sequences=st.lists(st.tuples(st.integers(3, 20), st.integers(0, 6)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_packed_equals_padded_reference_on_random_batches(sequences, seed, config, make_batch):
    lengths, counts = zip(*sequences)
    torch.manual_seed(seed)
    batch, model = make_batch(lengths, counts, seed=seed), DNAZenForMaskedLM(config)
    _assert_same(_run(model, batch), _run(model, batch, impl="reference"))


def _plain_logits(weights, config, tokens, ngrams, covering):
    """Logits of one sequence from the formulas of the paper and of DNABERT-2, one position at a time.

    `covering[t]` lists the indices into `ngrams` of those that cover token t.
    """

    def norm(x, name):
        centred = x - x.mean()
        scaled = centred / (centred.square().mean() + config.layer_norm_eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0)

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def embed(ids, name):
        rows, types = weights[f"{name}.word_embeddings.weight"], weights[f"{name}.token_type_embeddings.weight"]
        return [norm(rows[i] + types[0], f"{name}.LayerNorm") for i in ids]

    def attend(queries, keys, values, slopes):
        size, contexts = config.hidden_size // config.num_attention_heads, []
        for i, query in enumerate(queries):
            heads = []
            for h, slope in enumerate(slopes):
                part = slice(h * size, (h + 1) * size)
                scores = [query[part] @ key[part] / math.sqrt(size) - slope * abs(i - j) for j, key in enumerate(keys)]
                shares = torch.stack(scores).softmax(0)
                heads.append(sum(share * value[part] for share, value in zip(shares, values)))
            contexts.append(torch.cat(heads))
        return contexts

    def residual(xs, hidden, name):
        return [norm(linear(x, f"{name}.dense") + h, f"{name}.LayerNorm") for x, h in zip(xs, hidden)]

    hidden, ngram_hidden = embed(tokens, "bert.embeddings"), embed(ngrams, "bert.ngram_embeddings")
    for index in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{index}"
        queries, keys, values = zip(*(linear(h, f"{layer}.attention.self.Wqkv").chunk(3) for h in hidden))
        # Three heads: two slopes of the rule for 2 heads, then the first of the rule for 4.
        contexts = attend(queries, keys, values, [2**-4, 2**-8, 2**-2])
        hidden = residual(contexts, hidden, f"{layer}.attention.output")
        gated = [linear(h, f"{layer}.mlp.gated_layers").chunk(2) for h in hidden]
        hidden = [
            norm(linear(gelu(gate) * value, f"{layer}.mlp.wo") + h, f"{layer}.mlp.layernorm")
            for (gate, value), h in zip(gated, hidden)
        ]
        if index < config.num_hidden_ngram_layers:
            layer = f"bert.encoder.ngram_layers.{index}"
            projected = [
                [linear(g, f"{layer}.attention.self.{name}") for g in ngram_hidden]
                for name in ("query", "key", "value")
            ]
            contexts = attend(*projected, [0, 0, 0])
            ngram_hidden = residual(contexts, ngram_hidden, f"{layer}.attention.output")
            wide = [gelu(linear(g, f"{layer}.intermediate.dense")) for g in ngram_hidden]
            ngram_hidden = residual(wide, ngram_hidden, f"{layer}.output")
            hidden = [h + sum(ngram_hidden[j] for j in js) for h, js in zip(hidden, covering)]
    transformed = [
        norm(gelu(linear(h, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm") for h in hidden
    ]
    return torch.stack([linear(h, "cls.predictions.decoder") for h in transformed])


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_logits_are_those_of_the_formulas(impl, config, make_batch):
    model = DNAZenForMaskedLM(config).double()
    for parameter in model.parameters():  # biases and LayerNorms that are not neutral
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    model.config.impl = impl
    batch = make_batch([8, 3, 13], [3, 0, 4], mask_rate=None)
    logits = model(**batch).logits.split([8, 3, 13])
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    starts, ngram_starts, offsets = ([*batch[name]] for name in ("cu_seqlens", "ngram_cu_seqlens", "token_offsets"))
    for b in range(3):
        tokens = batch["input_ids"][starts[b] : starts[b + 1]]
        ngrams = batch["ngram_input_ids"][ngram_starts[b] : ngram_starts[b + 1]]
        covering = [
            [int(j - ngram_starts[b]) for j in batch["token_ngrams"][offsets[t] : offsets[t + 1]]]
            for t in range(starts[b], starts[b + 1])
        ]
        expected = _plain_logits(weights, config, tokens, ngrams, covering)
        # fp64, but the bias and (by design) the reference's softmax are fp32: 1e-7 relative, times the logits' size.
        torch.testing.assert_close(logits[b], expected, rtol=1e-5, atol=1e-5)


def test_a_sequence_gives_the_same_alone_as_in_a_batch(config, make_batch):
    model = DNAZenForMaskedLM(config).eval()
    lengths, counts = [17, 3, 17, 25], [4, 0, 1, 6]
    batch = make_batch(lengths, counts, mask_rate=None)
    together = model(**batch).logits.split(lengths)
    starts, ngram_starts = batch["cu_seqlens"].tolist(), batch["ngram_cu_seqlens"].tolist()
    for b, length in enumerate(lengths):
        tokens, ngrams = slice(starts[b], starts[b + 1]), slice(ngram_starts[b], ngram_starts[b + 1])
        token_offsets = batch["token_offsets"][starts[b] : starts[b + 1] + 1]
        ngram_offsets = batch["ngram_offsets"][ngram_starts[b] : ngram_starts[b + 1] + 1]
        alone = dict(
            input_ids=batch["input_ids"][tokens],
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            max_seqlen=length,
            ngram_input_ids=batch["ngram_input_ids"][ngrams],
            ngram_cu_seqlens=torch.tensor([0, counts[b]], dtype=torch.int32),
            max_ngrams=counts[b],
            token_offsets=token_offsets - token_offsets[0],
            token_ngrams=batch["token_ngrams"][token_offsets[0] : token_offsets[-1]] - ngram_starts[b],
            ngram_offsets=ngram_offsets - ngram_offsets[0],
            ngram_tokens=batch["ngram_tokens"][ngram_offsets[0] : ngram_offsets[-1]] - starts[b],
        )
        torch.testing.assert_close(model(**alone).logits, together[b], **LOGITS)


def test_padded_input_gives_padded_output(config, make_batch, pad_batch):
    model = DNAZenForMaskedLM(config).eval()
    batch = make_batch([5, 9, 3], [2, 0, 1], mask_rate=None)
    packed, padded = model(**batch, output_hidden_states=True), model(**pad_batch(batch), output_hidden_states=True)
    assert padded.logits.shape == (3, 9, 50)
    is_token = pad_batch(batch)["attention_mask"].bool()
    torch.testing.assert_close(padded.logits[is_token], packed.logits, **LOGITS)
    assert len(padded.hidden_states) == len(packed.hidden_states) == config.num_hidden_layers + 1
    for left, right in zip(padded.hidden_states, packed.hidden_states):
        assert torch.equal(left[is_token], right) and not left[~is_token].any()


def test_padding_on_the_left_and_its_content_change_nothing(config, make_batch, pad_batch):
    model, padded = DNAZenForMaskedLM(config).eval(), pad_batch(make_batch([5, 9], [2, 1], mask_rate=None))
    left = {name: value.clone() for name, value in padded.items()}
    for name in ("input_ids", "attention_mask", "ngram_position_matrix"):
        left[name][0] = padded[name][0].roll(4, 0)
    left["input_ids"][0, :4] = 17
    left["ngram_position_matrix"][0, :4] = 1
    left["ngram_input_ids"][1, 1] = 5
    left["ngram_position_matrix"][1, :, 1] = 1
    expected, found = model(**padded).logits, model(**left).logits
    assert torch.equal(found[0, 4:], expected[0, :5]) and torch.equal(found[1], expected[1])


def test_without_mask_or_ngrams_every_row_is_all_tokens(config):
    model, input_ids = DNAZenForMaskedLM(config).eval(), torch.randint(5, 50, (3, 7))
    cu_seqlens = torch.arange(0, 22, 7, dtype=torch.int32)
    packed = model(input_ids.flatten(), cu_seqlens=cu_seqlens, max_seqlen=7).logits
    assert torch.equal(model(input_ids).logits.flatten(0, 1), packed)
    (as_tuple,) = model(input_ids, return_dict=False)
    assert torch.equal(as_tuple.flatten(0, 1), packed)
    model.config.return_dict = False
    assert torch.equal(model(input_ids)[0], as_tuple)


def test_nothing_masked_is_a_loss_of_zero_with_zero_gradients(config, make_batch):
    batch = make_batch([9, 5], [3, 0], mask_rate=0.0)
    for num_items_in_batch in (None, 0, torch.tensor(0), 7):
        loss, logits, gradients = _run(DNAZenForMaskedLM(config), dict(batch, num_items_in_batch=num_items_in_batch))
        assert loss == 0 and logits.shape == (0, 50)
        assert not any(gradient.any() for gradient in gradients.values())


def test_the_loss_is_the_sum_over_masked_positions_by_the_given_count(config, make_batch):
    model, batch = DNAZenForMaskedLM(config).eval(), make_batch([9, 12], [3, 1])
    labels = batch.pop("labels")
    labels[3] = 0  # token id 0 is a token like any other
    masked = labels != -100
    all_logits, output = model(**batch).logits, model(**batch, labels=labels)
    torch.testing.assert_close(output.logits, all_logits[masked], **LOGITS)
    by_hand = -all_logits.log_softmax(-1)[masked, labels[masked]].sum()
    torch.testing.assert_close(output.loss, by_hand / masked.sum())
    for count in (5, torch.tensor(5)):
        torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=count).loss, by_hand / 5)
    without = model(**batch, labels=labels.masked_fill(labels == 0, -100), num_items_in_batch=5).loss
    assert output.loss * masked.sum() / 5 - without > 0.1


def test_the_loss_of_a_batch_is_that_of_its_parts(config, make_batch):
    """Unequal numbers of masked tokens, one count for all: losses and gradients add up."""
    model = DNAZenForMaskedLM(config)
    parts = [make_batch([20, 9], [3, 1], seed=1), make_batch([5], [1], seed=2)]
    count = sum(int((part["labels"] != -100).sum()) for part in parts)
    for part in parts:
        model(**part, num_items_in_batch=count).loss.backward()
    split = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for part in parts:
        masked = (part["labels"] != -100).sum()
        (model(**part).loss * masked / count).backward()
    torch.testing.assert_close(split, [parameter.grad for parameter in model.parameters()], **GRADIENTS)


def test_attention_weights(config, make_batch):
    model, batch = DNAZenForMaskedLM(config).eval(), make_batch([5, 9], [2, 0], mask_rate=None)
    with pytest.raises(ValueError, match="output_attentions: expected attn_implementation='eager', .* found 'sdpa'"):
        model(**batch, output_attentions=True)
    model.set_attn_implementation("eager")
    attentions = model(**batch, output_attentions=True).attentions
    assert len(attentions) == config.num_hidden_layers
    for weights in attentions:
        assert weights.shape == (2, 3, 9, 9)
        assert not weights[0, :, :, 5:].any()  # no weight on padding
        torch.testing.assert_close(weights[0, :, :5].sum(-1), torch.ones(3, 5))


def test_unknown_attention_implementation(config):
    config._attn_implementation = "magic"
    with pytest.raises(ValueError, match="attn_implementation: expected one of auto, .* found 'magic'"):
        DNAZenForMaskedLM(config)


def test_bf16_stays_close_to_fp32(config, make_batch):
    model, batch = DNAZenForMaskedLM(config).eval(), make_batch([17, 9, 40], [4, 0, 9])
    loss, logits, _ = _run(model, batch)
    for impl in ("auto", "reference"):
        bf16_loss, bf16_logits, _ = _run(copy.deepcopy(model).bfloat16(), batch, impl=impl)
        assert bf16_logits.dtype == torch.bfloat16 and bf16_loss.dtype == torch.float32
        # bf16 keeps 8 bits (4e-3); some 20 roundings in a row add up to 2 % of the logits' spread, which is of order 1.
        error = (bf16_logits.float() - logits).std() / logits.std()
        assert error < 0.03
        assert bf16_loss.item() == pytest.approx(loss.item(), rel=0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_loss, _, _ = _run(model, batch)
    assert autocast_loss.item() == pytest.approx(loss.item(), rel=0.03)


def test_dropout_acts_in_training_only(config, make_batch):
    config.hidden_dropout_prob = 0.5
    model, batch = DNAZenForMaskedLM(config), make_batch([9], [2], mask_rate=None)
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_layer_with_a_hook_or_adapters_has_the_same_gradients(impl, config, make_batch):
    """Those that the residual LayerNorm sums for a plain layer's bias are those of the layer itself."""
    config.impl, config.hidden_dropout_prob = impl, 0.1
    model, batch = DNAZenForMaskedLM(config), make_batch([17, 9], [4, 0])
    hooked = copy.deepcopy(model)
    called = []
    for name, module in hooked.named_modules():
        if name.endswith((".dense", ".wo")):
            module.register_forward_hook(lambda module, args, output: called.append(1))
    adapters = LoraConfig(target_modules=["dense", "wo"], r=2, bias="all")
    adapted = get_peft_model(copy.deepcopy(model), adapters).train()  # adapters begin with zero
    results = []
    for variant in (model, hooked, adapted):
        torch.manual_seed(4)
        loss = variant(**batch).loss
        loss.backward()
        biases = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.grad
            for name, parameter in variant.named_parameters()
            if name.endswith("bias")
        }
        results.append((loss.detach(), biases))
    assert len(called) >= 2 * len(model.bert.encoder.layer)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_ngrams_reach_only_their_own_sequence(config, make_batch):
    model, batch = DNAZenModel(config).eval(), make_batch([12, 12], [4, 3], mask_rate=None)
    before = model(**batch).last_hidden_state
    batch["ngram_input_ids"] = batch["ngram_input_ids"].clone()
    batch["ngram_input_ids"][4:] = (batch["ngram_input_ids"][4:] + 1) % 20
    after = model(**batch).last_hidden_state
    assert torch.equal(before[:12], after[:12]) and not torch.equal(before[12:], after[12:])


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (1, None, torch.tensor([0.5, -1.0, 2.0])),
        (4, None, torch.tensor([0, 3, 1])),
        (2, "multi_label_classification", torch.tensor([[0.0, 1], [1, 1], [0, 0]])),
        (2, "regression", torch.tensor([[0.5, 1], [2, 1], [-1, 0]])),
    ],
)
def test_sequence_classification(num_labels, problem_type, labels, config, make_batch, pad_batch):
    config.num_labels, config.problem_type, config.classifier_dropout = num_labels, problem_type, 0.0
    model = DNAZenForSequenceClassification(config)
    batch = make_batch([5, 9, 3], [2, 0, 1], mask_rate=None)
    output = model(**batch, labels=labels)
    states = model.bert(**batch).last_hidden_state[[0, 5, 14]]
    pooled = torch.tanh(states @ model.bert.pooler.dense.weight.T + model.bert.pooler.dense.bias)
    logits = pooled @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(output.logits, logits, **LOGITS)
    if labels.dtype == torch.long:
        loss = -logits.log_softmax(-1)[torch.arange(3), labels].mean()
    elif problem_type == "multi_label_classification":
        loss = -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean()
    else:
        loss = (logits.squeeze() - labels).square().mean()
    torch.testing.assert_close(output.loss, loss, **LOGITS)
    torch.testing.assert_close(model(**pad_batch(batch), labels=labels).loss, loss, **LOGITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_seqlen=None), "max_seqlen: expected in a packed batch with G-grams, found None"),
        (dict(ngram_tokens=None, max_ngrams=None), "max_ngrams, ngram_tokens: expected in a packed batch with G-grams"),
        (dict(attention_mask=torch.ones(2, 9)), "attention_mask: expected None in a packed batch with G-grams"),
        (dict(cu_seqlens=None), r"ngram_attention_mask, ngram_position_matrix: expected in a padded \(no cu_seqlens\)"),
        (dict(input_ids=torch.ones(2, 7).long()), r"input_ids: expected shape \[any\], found \[2, 7\]"),
        (dict(ngram_cu_seqlens=torch.zeros(2).int()), r"ngram_cu_seqlens: expected shape \[3\], found \[2\]"),
        (dict(token_offsets=torch.zeros(2).int()), "token_offsets must have shape .*15.*, got .*2"),
        (dict(labels=torch.ones(13).long()), r"labels: expected shape \[14\], found \[13\]"),
    ],
)
def test_contradictory_packed_input_names_the_argument(change, message, config, make_batch):
    batch = make_batch([5, 9], [2, 1])
    with pytest.raises(ValueError, match=message):
        DNAZenForMaskedLM(config)(**batch | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ngram_attention_mask=None), r"ngram_attention_mask: expected in a padded \(no cu_seqlens\) batch with"),
        (dict(max_seqlen=9), r"max_seqlen: expected None in a padded \(no cu_seqlens\) batch with G-grams"),
        (dict(input_ids=torch.ones(14).long()), "input_ids: expected shape"),
        (dict(attention_mask=torch.ones(2, 8)), r"attention_mask: expected shape \[2, 9\], found \[2, 8\]"),
        (dict(attention_mask=torch.zeros(2, 9)), "attention_mask: expected a token in every sequence"),
        (dict(ngram_position_matrix=torch.ones(2, 2, 9)), r"ngram_position_matrix: expected shape \[2, 9, 2\], found"),
        (dict(labels=torch.ones(2, 8).long()), r"labels: expected shape \[2, 9\], found \[2, 8\]"),
    ],
)
def test_contradictory_padded_input_names_the_argument(change, message, config, make_batch, pad_batch):
    with pytest.raises(ValueError, match=message):
        DNAZenForMaskedLM(config)(**pad_batch(make_batch([5, 9], [2, 1])) | change)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant, config, make_batch):
    """Under dropout too: the second forward of a layer draws what the first drew."""
    config.hidden_dropout_prob = 0.3
    model, batch = DNAZenForMaskedLM(config).train(), make_batch([17, 9, 40], [4, 0, 9])
    runs = []
    layers_run = []
    for layer in [*model.bert.encoder.layer, *model.bert.encoder.ngram_layers]:
        layer.attention.register_forward_pre_hook(lambda *_: layers_run.append(1))
    for is_checkpointing in (False, True):
        if is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        layers_run.clear()
        runs.append((*_run(model, batch), len(layers_run)))
    assert [count for *_, count in runs] == [5, 10]
    torch.testing.assert_close(runs[0][:3], runs[1][:3], rtol=0, atol=0)


def test_batches_that_were_not_trimmed_are_refused(config, make_batch):
    """Tensors as large as before masking: G-grams of id 0 behind those of the sequences, without edges."""
    model, batch = DNAZenForMaskedLM(config), make_batch([17, 9, 40], [4, 0, 9])
    padding = torch.zeros(6, dtype=torch.int32)
    larger = batch | {
        "ngram_input_ids": torch.cat([batch["ngram_input_ids"], padding.long()]),
        "ngram_offsets": torch.cat([batch["ngram_offsets"], padding + batch["ngram_offsets"][-1]]),
        "token_ngrams": torch.cat([batch["token_ngrams"], padding]),
        "ngram_tokens": torch.cat([batch["ngram_tokens"], padding]),
    }
    with pytest.raises(ValueError, match="cu_seqlens: expected to ascend from 0 to 19 by at most 9, .* 13]"):
        _run(model, larger)


def test_masked_positions_may_be_given(config, make_batch, pad_batch):
    model, batch = DNAZenForMaskedLM(config), make_batch([17, 9], [4, 0])
    for filled in (batch, pad_batch(batch)):
        positions = (filled["labels"].flatten() != -100).nonzero().squeeze(1)
        _assert_same(_run(model, filled), _run(model, filled | {"masked_positions": positions}))


@pytest.mark.parametrize("model_class", [DNAZenModel, DNAZenForMaskedLM])
def test_unknown_arguments_are_refused(model_class, config):
    with pytest.raises(
        TypeError, match=rf"{model_class.__name__}: expected arguments of input_ids, .*, found mask, tokens"
    ):
        model_class(config)(torch.tensor([[1, 7, 2]]), tokens=None, mask=torch.ones(1, 3))


def test_the_signature_names_all_inputs_for_trainer(make_batch, pad_batch):
    """By it Trainer chooses the columns of a data set; others it drops in silence."""
    batch = make_batch([5, 9], [2, 1])
    names = inspect.signature(DNAZenForMaskedLM.forward).parameters.keys()
    assert {*batch, *pad_batch(batch), "masked_positions", "num_items_in_batch"} <= names
    assert "kwargs" not in names and "inputs" not in names
