"""The benchmarks' machinery at small sizes, without a clock: implementations agree, bytes and rows are right."""

import csv
import functools

import pytest
import torch
from dnazen_kernels.ngram_masking import ngram_masking

from benchmarks import budget, registry, rehearsal, roofline, run
from benchmarks.batches import Genome, graph_of, make_batch
from benchmarks.registry import MODES, OPERATORS, Sizes
from dnazen.models import DNAZenConfig


@pytest.fixture(scope="module")
def batch():
    """Three sequences of 12, 7 and 9 tokens with special ones; G-grams overlap and repeat, and all survive."""
    vocabulary = {(7, 8): 1, (8, 9, 7): 2, (11, 12): 3}
    sequences = [[7, 8, 9, 7, 8, 5, 6, 11, 12, 13], [5, 6, 5, 6, 5], [11, 12, 11, 12, 7, 8, 6]]
    batch = make_batch(Genome("toy", sequences, vocabulary, 16), 28)
    unmasked = {**batch.masking, "mlm_probability": 0.0}  # so that some sequence has two G-grams left
    return batch._replace(masked=ngram_masking(batch.input_ids, **graph_of(batch.matches), **unmasked).trimmed())


def outputs(name, batch, device, hidden_size=24, dtype=torch.float32):
    """Per implementation: its packed output, and the leaves' gradients after each mode."""
    operator = OPERATORS[name]
    for impl, (kind, prepare) in operator.implementations.items():
        device_of_impl = device if kind == "cuda" else torch.device("cpu")
        inputs = operator.make_inputs(batch, hidden_size, dtype, device_of_impl)
        for mode in operator.num_bytes:
            case = prepare(inputs)
            function = run.timed_function(case, mode)
            output = function()
            if mode == "fwd":
                yield impl, "output", case.packed(output)
            else:
                for position, leaf in enumerate(case.leaves):
                    grad = leaf.grad
                    if grad.dim() == 3:
                        layout = inputs.ngrams if position == len(case.leaves) - 1 else inputs.tokens
                        grad = layout.unpad(grad)
                    yield impl, f"{mode} {position}", grad


@pytest.mark.parametrize("name", OPERATORS)
def test_all_implementations_agree(name, batch, device, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = {}
    with torch._functorch.config.patch(donated_buffer=False):
        for impl, what, value in outputs(name, batch, device):
            found.setdefault(what, {})[impl] = value
    assert found["output"].keys() == OPERATORS[name].implementations.keys()
    for values in found.values():
        expected = values[OPERATORS[name].baseline]
        for value in values.values():
            if isinstance(expected, dict):
                assert value == expected
            else:
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)  # fp32 sums of 24 to 28 numbers


def test_a_batch_is_counted_by_hand(batch):
    """Matches: 7 8 (twice), 8 9 7, 11 12 in the first sequence; none in the second; 11 12 (twice), 7 8 in the third."""
    inputs = registry.integer_inputs(batch, 0, torch.int64, torch.device("cpu"))
    assert inputs.sizes == Sizes(28, 3, 5, 4 + 3 + 2 + 4 + 2, 5 + 2 + 6, num_ordinary_ids=11)
    assert batch.cu_seqlens.tolist() == [0, 12, 19, 28]
    state = registry.fusion_inputs(batch, 24, torch.bfloat16, torch.device("cpu"))
    assert state.sizes == Sizes(28, 3, 5, 15, 13, hidden_size=24, itemsize=2)
    assert state.matrix.shape == (3, 12, 3) and state.matrix.sum() == 15


HAND = {  # T=10, B=2, N=3, E=7, C=5 covered, H=4, 2 bytes an element
    ("ngram_fusion", "fwd"): 10 * 4 * 2 + 3 * 4 * 2 + (11 + 7) * 4 + 10 * 4 * 2,
    ("ngram_fusion", "bwd"): 5 * 4 * 2 + (4 + 7) * 4 + 3 * 4 * 2,
    ("residual_layer_norm", "fwd"): 2 * 80 + 2 * 8 + 24 + 72 + 80 + 2 * 10 * 4,
    ("residual_layer_norm", "bwd"): 3 * 80 + 8 + 2 * 10 * 4 + 44 + 80 + 2 * 8 + 24,
    # tokens, sequences, prefilter, table; ids, sequences, two views, counts
    ("ngram_matching", "fwd"): 80 + 12 + 10 + 3 * 16 + (24 + 12 + 72 + 44 + 16),
    # tokens, ordinary, random, graph, ordinary ids; tokens, labels, graph, counts
    ("ngram_masking", "fwd"): 80 + 10 + 240 + (24 + 12 + 72 + 44) + 6 * 8 + 80 + 80 + (24 + 12 + 72 + 44) + 8,
}


def test_bytes_by_hand():
    sizes = Sizes(10, 2, 3, 7, 5, hidden_size=4, itemsize=2, num_ordinary_ids=6)
    for (name, mode), expected in HAND.items():
        assert OPERATORS[name].num_bytes[mode](sizes) == expected, (name, mode)
    for name in ("ngram_fusion", "residual_layer_norm"):
        assert OPERATORS[name].num_bytes["fwdbwd"](sizes) == HAND[name, "fwd"] + HAND[name, "bwd"]
        assert tuple(OPERATORS[name].num_bytes) == MODES
    without = Sizes(10, 2, 0, 0, 0, hidden_size=4, itemsize=2)
    assert OPERATORS["residual_layer_norm"].num_bytes["fwd"](without) == 3 * 80 + 2 * 8 + 80


def test_bytes_agree_with_the_tensors(batch):
    """Bytes of the tensors themselves, where an operand is read or written whole."""
    inputs = registry.fusion_inputs(batch, 24, torch.bfloat16, torch.device("cpu"))
    by_token = sum(tensor.nbytes for tensor in inputs.csr[:2])
    states = 2 * inputs.x.nbytes + inputs.ngram_states.nbytes
    assert registry.fusion_forward_bytes(inputs.sizes) == states + by_token
    whole = registry.integer_inputs(batch, 0, torch.int64, torch.device("cpu"))
    masked = ngram_masking(whole.input_ids, **whole.graph, **whole.masking)
    read = [whole.input_ids, *whole.graph.values(), *(x for x in whole.masking.values() if isinstance(x, torch.Tensor))]
    assert registry.masking_bytes(whole.sizes) == sum(tensor.nbytes for tensor in [*read, *masked])


def test_rows_have_every_column_and_go_to_their_device(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CPU_SECONDS", 0.0)
    for name in ("ngram_matching", "ngram_masking"):
        for row in run.measure(name, batch, "toy S=12", ["fwd"], {"cpu": 1.0, "cuda": 1.0}):
            run.write_row({**row, **run.describe_machine()}, tmp_path)
    paths = list(tmp_path.iterdir())
    with next(path for path in paths if "core" in path.name).open() as file:
        rows = list(csv.DictReader(file))
    assert {row["impl"] for row in rows} == {"PyTorch", "numpy", "plain Python"}
    for row in rows:
        assert tuple(row) == run.COLUMNS and row["shape"] == "toy S=12 T=28 B=3 N=5 E=15"
        assert [float(row[f"p{p}_ms"]) for p in (20, 50, 80)] == sorted(float(row[f"p{p}_ms"]) for p in (20, 50, 80))
        assert row["impl"] != "plain Python" or row["ratio_to_baseline"] == "1"
        assert len(row["commit"]) == 40 and row["dirty"] in ("True", "False")


def test_without_a_gpu_the_fusion_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("sys.argv", ["run", "--op", "residual_layer_norm"])
    with pytest.raises(SystemExit) as stop:
        run.main()
    assert stop.value.code == 0
    assert "not measured and nothing recorded" in capsys.readouterr().out


def test_no_speed_is_reported_when_tests_fail(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(run, "tests_pass", lambda path: False)
    monkeypatch.setattr(run, "write_row", lambda *row: pytest.fail("a row was written"))
    monkeypatch.setattr("sys.argv", ["run", "--op", "ngram_masking"])
    with pytest.raises(SystemExit) as stop:
        run.main()
    assert stop.value.code == 1
    assert "fails, so there is no speed to report" in capsys.readouterr().out


def test_roofline_by_hand():
    """A quarter of a million tokens of base size: 3 tensors of 384 MiB at 3.3 TB/s are 366 µs."""
    sizes = Sizes(262_144, 512, 0, 0, 0, hidden_size=768, itemsize=2)
    row = {row.name: row for row in roofline.kernel_rows(sizes)}["`residual_layer_norm` without, forward"]
    assert row.num_bytes == 3 * 384 * 2**20 + 8 * 262_144 + 2 * 768 * 2
    assert row.flops == 8 * 262_144 * 768
    assert row.seconds(3.3e12) == pytest.approx(366.7e-6, rel=1e-3)
    assert roofline.Row("many", 100, 1000).seconds(3.3e12) == pytest.approx(500e-6)  # the host's time to launch them


def test_traffic_by_hand():
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    with roofline.Traffic() as traffic:
        (a @ b).add_(1)
    assert (traffic.launches, traffic.num_bytes) == (2, 4 * (24 + 40 + 30) + 4 * (30 + 30))
    assert traffic.multiplying == pytest.approx(2 * 2 * 3 * 4 * 5 / 67e12)
    index, values = torch.tensor([1, 2]), torch.zeros(100, dtype=torch.int64)
    with roofline.Traffic() as traffic:
        values.index_select(0, index)[None]
    assert (traffic.launches, traffic.num_bytes) == (1, 16 + 16 + 16)  # a view costs nothing
    with roofline.Traffic() as traffic:
        values.sort()
    assert traffic.num_bytes == 8 * 2 * (800 + 800)


def test_roofline_counts_launches(batch, device):
    """The dense form casts, multiplies, adds and casts; the kernel is one operation each way."""
    fused, dense = (
        {row.name: row for row in roofline.implementation_rows(batch, "ngram_fusion")}[f"{impl}, bfloat16"]
        for impl in ("triton", "einsum")
    )
    assert fused.launches == 2
    # 28 tokens, 5 G-grams and 15 edges; backward, 15 rows of the gradient are read at the most
    assert fused.num_bytes == 2 * 768 * (28 + 5 + 28) + 4 * (29 + 15) + 2 * 768 * (15 + 5) + 4 * (6 + 15)
    # forward: both cast up, product, sum, cast down; backward: cast up, product, two casts down
    assert dense.launches == 9 and dense.multiplying > 0
    assert [row.name for row in roofline.integer_rows(batch)] == ["`ngram_matching`", "`ngram_masking`"]


def test_rehearsal_by_hand():
    """Ten times what was measured on 2 cores, on 4: 1 s of start; what the first process does is not shared."""
    job = {"processor_seconds": 21.0, "processor_seconds_of_the_first": 3.0, "peak_mib": 512, "disk_bytes": 10**9}
    job["peak_mib_of_a_child"] = 256
    corpus = {"1 workers": {}, "2 workers": {**job, "bases": 10**9}}
    ngrams = {"2 workers": {**job, "num_runs": 10**6, "num_ngrams": 10**5}}
    measured = {"start": {"processor_seconds": 1.0}, "corpus": corpus, "ngrams": ngrams}
    found = rehearsal.extrapolate(measured, 4, 1e10)
    assert found["corpus"]["seconds"] == 1 + max(10 * 2, 10 * 18 / 4)
    assert rehearsal.extrapolate(measured, 96, 1e10)["corpus"]["seconds"] == 1 + 10 * 2
    assert found["ngrams"]["seconds"] == 1 + 10 * 2 + 10 * 18 / 4
    assert found["corpus"]["first"] == 0.5 + 16 * 1e10 / 2040 / 2**30
    assert found["ngrams"]["first"] == 0.5 + (70 * 1e7 + 500 * 1e6) / 2**30
    assert found["ngrams"]["all"] == found["ngrams"]["first"] + 4 * 0.25 + 70 * 1e7 / 2**30
    assert found["corpus"]["disk"] == found["ngrams"]["disk"] == 10


def test_the_budget_of_a_step_holds_all_that_is_owed(batch, device):
    """The kernels' arithmetic, taken from PyTorch's own graphs, against the formula that `dnazen bench` divides by."""
    if device.type == "cuda":
        pytest.skip("needs Triton's interpreter, for it counts the operations that run on a CPU")
    masked = ngram_masking(batch.input_ids, **graph_of(batch.matches), **batch.masking).trimmed()
    # the labels of a masking that masks, and the G-grams of one that does not
    batch = batch._replace(masked=batch.masked._replace(labels=masked.labels))
    config = DNAZenConfig(
        vocab_size=16, ngram_vocab_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, num_hidden_ngram_layers=2,
    )  # fmt: skip
    parts = budget.parts_of_step(config, batch)
    flops = sum(part.times * sum(kernel.flops for kernel in part.kernels) for part in parts)
    recomputed = 0.0  # flash attention's scores, once more in the backward
    for number, offsets in ((3, batch.cu_seqlens), (2, batch.masked.ngram_cu_seqlens)):
        recomputed += number * 2 * 32 * float((offsets.diff() ** 2).sum())
    assert int((batch.masked.labels != -100).sum()) > 0
    assert flops - recomputed == budget.owed(config, batch)
    assert all(kernel.num_bytes >= 0 for part in parts for kernel in part.kernels)
