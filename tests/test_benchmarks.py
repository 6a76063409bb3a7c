"""The benchmarks' machinery at small sizes, without a clock: implementations agree, bytes and rows are right."""

import csv
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import HfArgumentParser

from benchmarks import attention, budget, carry, gpu, gpu_page, recipe, registry, rehearsal, roofline, run
from benchmarks.batches import Genome, make_batch, ngrams_of
from benchmarks.registry import MODES, OPERATORS, Sizes
from dnazen.cli.main import parse_arguments
from dnazen.files import InputError
from dnazen.layers import linear
from dnazen.layers.attention import BACKENDS
from dnazen.models import DNAZenConfig
from dnazen.planning import step as planned
from dnazen.planning.cost import LARGE_SPARES, MICRO_BYTES, STEP_BYTES
from dnazen.pretraining.arguments import DataArguments
from dnazen.pretraining.bench.flops import skipped_flops
from dnazen.pretraining.training_arguments import PretrainingArguments
from dnazen_kernels.ngram_fusion import triton_impl as fusion_kernels
from dnazen_kernels.ngram_masking import ngram_masking
from tests.helpers.launch import PROGRAMS, rank_environments, run_program
from tests.helpers.warm import WarmProgram


@pytest.fixture(scope="module")
def batch():
    """Three sequences of 12, 7 and 9 tokens with special ones; G-grams overlap and repeat, and all survive."""
    vocabulary = {(7, 8): 1, (8, 9, 7): 2, (11, 12): 3}
    sequences = [[7, 8, 9, 7, 8, 5, 6, 11, 12, 13], [5, 6, 5, 6, 5], [11, 12, 11, 12, 7, 8, 6]]
    batch = make_batch(Genome("toy", sequences, vocabulary, 16), 28)
    unmasked = {**batch.masking, "mlm_probability": 0.0}  # so that some sequence has two G-grams left
    return batch._replace(masked=ngram_masking(batch.input_ids, **ngrams_of(batch.matches), **unmasked).trimmed())


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


@pytest.mark.slow
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
    assert inputs.sizes == Sizes(28, 3, 5, 4 + 3 + 2 + 4 + 2, 5 + 2 + 6, num_maskable_ids=11)
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
    # tokens, maskable, random, graph, maskable ids; tokens, labels, graph, counts
    ("ngram_masking", "fwd"): 80 + 10 + 240 + (24 + 12 + 72 + 44) + 6 * 8 + 80 + 80 + (24 + 12 + 72 + 44) + 8,
}


def test_bytes_by_hand():
    sizes = Sizes(10, 2, 3, 7, 5, hidden_size=4, itemsize=2, num_maskable_ids=6)
    for (name, mode), expected in HAND.items():
        assert OPERATORS[name].num_bytes[mode](sizes) == expected, (name, mode)
    for name in ("ngram_fusion", "residual_layer_norm"):
        assert OPERATORS[name].num_bytes["fwdbwd"](sizes) == HAND[name, "fwd"] + HAND[name, "bwd"]
        assert tuple(OPERATORS[name].num_bytes) == MODES
    # the seed; that, another gradient of all rows, and the bias before them
    assert registry.norm_forward_bytes(sizes, dropout=True) == HAND["residual_layer_norm", "fwd"] + 8
    with_dropout = registry.norm_backward_bytes(sizes, dropout=True, x_bias=True)
    assert with_dropout == HAND["residual_layer_norm", "bwd"] + 8 + 80 + 8
    without = Sizes(10, 2, 0, 0, 0, hidden_size=4, itemsize=2)
    assert OPERATORS["residual_layer_norm"].num_bytes["fwd"](without) == 3 * 80 + 2 * 8 + 80


def test_bytes_agree_with_the_tensors(batch):
    """Bytes of the tensors themselves, where an operand is read or written whole."""
    inputs = registry.fusion_inputs(batch, 24, torch.bfloat16, torch.device("cpu"))
    by_token = sum(tensor.nbytes for tensor in inputs.edges[:2])
    states = 2 * inputs.x.nbytes + inputs.ngram_states.nbytes
    assert registry.fusion_forward_bytes(inputs.sizes) == states + by_token
    whole = registry.integer_inputs(batch, 0, torch.int64, torch.device("cpu"))
    masked = ngram_masking(whole.input_ids, **whole.ngrams, **whole.masking)
    values = tree_leaves([whole.input_ids, whole.ngrams, whole.masking, masked])
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert registry.masking_bytes(whole.sizes) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.slow
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


def test_tokens_to_the_recipes_loss():
    """Falls at a step that is evaluated, between two, before the first; rises again; never falls so far."""
    evaluations = [(10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0)]
    expected = {5.5: 10, 5.0: 10, 4.75: 12.5, 4.0: 20, 3.75: 35, 3.0: 40, 2.9: None}
    assert {target: recipe.fall_to(target, evaluations) for target in expected} == expected
    runs = {
        recipe.PRESENT: [[(50, 4.0), (100, 3.0)], [(50, 3.0), (100, 2.0)]],  # the target is 2.5
        "Muon": [[(50, 2.5), (100, 2.0)], [(50, 3.0), (100, 2.0)]],  # reached at steps 50 and 75 of 100
        "drop-out 0.1": [[(50, 2.5), (100, 2.4)], [(50, 3.0), (100, 2.6)]],  # one run does not reach it
    }
    rows = [
        {"lever": lever, "rate": 0.1, "steps": 100, "tokens": 1000, "seconds": 600, "evaluations": evaluations}
        for lever, of_lever in runs.items()
        for evaluations in of_lever
    ]
    target, compared = recipe.compare(rows)
    assert target == 2.5
    found = {row["lever"]: (row["loss"], row["tokens_to_target"], row["minutes_to_target"]) for row in compared}
    assert found == {recipe.PRESENT: (2.5, None, None), "Muon": (2.0, 625, 6.25), "drop-out 0.1": (2.5, None, None)}


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
    assert found["corpus"].seconds == 1 + max(10 * 2, 10 * 18 / 4)
    assert rehearsal.extrapolate(measured, 96, 1e10)["corpus"].seconds == 1 + 10 * 2
    assert found["ngrams"].seconds == 1 + 10 * 2 + 10 * 18 / 4
    assert found["corpus"].first == 0.5 + 16 * 1e10 / 2040 / 2**30
    assert found["ngrams"].first == 0.5 + (70 * 1e7 + 500 * 1e6) / 2**30
    assert found["ngrams"].all == found["ngrams"].first + 4 * 0.25 + 70 * 1e7 / 2**30
    assert found["corpus"].disk == found["ngrams"].disk == 10


@pytest.mark.slow
def test_the_budget_of_a_step_holds_all_that_is_owed(batch, device, monkeypatch):
    """The kernels' arithmetic, taken from PyTorch's own graphs, against the formula that `dnazen bench` divides by,
    less what it says is left out. The first model adds residuals' gradients as large batches do, the second as small
    ones.
    """
    if device.type == "cuda":
        pytest.skip("needs Triton's interpreter, for it counts the operations that run on a CPU")
    masked = ngram_masking(batch.input_ids, **ngrams_of(batch.matches), **batch.masking).trimmed()
    # the labels of a masking that masks, and the G-grams of one that does not
    batch = batch._replace(masked=batch.masked._replace(labels=masked.labels))
    config = DNAZenConfig(
        vocab_size=16, ngram_vocab_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, num_hidden_ngram_layers=2,
    )  # fmt: skip
    shape = budget.shape_of(batch)
    assert linear.MIN_ELEMENTS == planned.MIN_ELEMENTS
    with monkeypatch.context() as patched:
        for module in (linear, planned):
            patched.setattr(module, "MIN_ELEMENTS", 0)
        parts = budget.parts_of_step(config, batch)
        hold_against_closed_form(parts, config, shape)
    recomputed = 0.0  # flash attention's scores, once more in the backward
    for number, lengths in ((3, shape.lengths), (2, shape.ngram_lengths)):
        recomputed += number * 2 * 32 * sum(length**2 for length in lengths)
    assert shape.num_masked > 0
    skipped = skipped_flops(config, shape.num_tokens, shape.num_masked)
    assert skipped > 0
    assert sum(part.total("flops") for part in parts) - recomputed == budget.flops_of(config, shape) - skipped
    # the neighbors' layers of `tiny`, and no drop-out
    config = DNAZenConfig.from_size("tiny", vocab_size=16, ngram_vocab_size=4, hidden_size=32, intermediate_size=64)
    hold_against_closed_form(budget.parts_of_step(config, batch), config, shape)


def hold_against_closed_form(counted, config, shape):
    """Every kernel of every part: the same FLOPs, shapes and random numbers, and the bytes to 2 %; of matching and
    masking, whose tables have sizes of their own, only how many they are."""
    for part, closed in zip(counted, budget.step_parts(config, shape), strict=True):
        assert (part.name, part.times) == (closed.name, closed.times)
        assert (len(part.forward), len(part.backward)) == (len(closed.forward), len(closed.backward)), part.name
        if part.name.startswith("`"):
            continue
        for direction in ("forward", "backward"):
            kernels, expected = (sorted(getattr(both, direction)) for both in (part, closed))
            assert [kernel[1:] for kernel in kernels] == [kernel[1:] for kernel in expected], part.name
        assert part.total("num_bytes") == pytest.approx(closed.total("num_bytes"), rel=0.02), part.name


@pytest.mark.slow
def test_the_budget_of_the_optimizer_is_what_deepspeed_moves(root):
    """Counted in a step under ZeRO-2 on one process: parameters that share a bucket, and ones larger than it."""
    output = run_program(PROGRAMS / "step_traffic.py", 1, **gpu.ON_CPU)
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    micro, once = (sum(bytes_of[2]) for bytes_of in (MICRO_BYTES, STEP_BYTES))
    # 0.1: states of one number beside the tensors
    assert found["ZeRO-2"] == pytest.approx([micro + once, 3 * micro + once], abs=0.1)
    micro -= LARGE_SPARES
    assert found["ZeRO-2, large"] == pytest.approx([micro + once, 3 * micro + once], abs=0.1)
    # the sum of further ones moves 6, where the first gradient was copied, which here is the backward's own: 4
    once = sum(STEP_BYTES[1])
    assert found["ZeRO-1"] == pytest.approx([once, once + 2 * (MICRO_BYTES[1].own - 4)], abs=0.1)


@pytest.mark.parametrize("arguments", [["--corpus", "x", "--ngrams", "x"], ["--output", "x"], ["--corpus", "x"]])
def test_a_budget_without_its_output_or_corpus_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["budget", *arguments])
    with pytest.raises(SystemExit):
        budget.main()
    assert "--corpus, --ngrams and --output go together" in capsys.readouterr().err


# -- a sitting at a GPU -----------------------------------------------------------------------------------------------


def say(*lines, status=0):
    """A command that prints the lines and ends with that status."""
    return shlex.join([sys.executable, "-c", f"print({chr(10).join(lines)!r}); raise SystemExit({status})"])


def sit(out, steps, minutes=5.0):
    """A sitting of these steps; whether all went well, their states by name, and the page."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    (out / "data" / "genome.fa.gz").touch()  # else the packaged one is copied
    sitting = gpu.Sitting(out, out / "data", dry=True)
    sitting.steps = steps
    good = sitting.run(minutes)
    states = {step.name: sitting.results.get(gpu.slug(step.name), {}).get("state") for step in steps}
    return good, states, (out / "report.md").read_text()


def test_a_failing_step_costs_itself_only(tmp_path):
    steps = [
        gpu.Step("one", say("1 passed in 2 s"), 60, "tests"),
        gpu.Step("two", say("Traceback", "ValueError: why", status=3), 60),
        gpu.Step("three", say("fine"), 60, after="two"),
        gpu.Step("four", say("no numbers here"), 60, "tests"),
        gpu.Step("five", say("x"), 60, needs="no-such-program"),
        gpu.Step("six", say("x"), 3600),
    ]
    good, states, page = sit(tmp_path, steps)
    assert not good and (states["one"], states["two"]) == ("done", "failed with exit status 3")
    assert states["four"].startswith("failed: no figures in what it wrote: IndexError")
    assert states["three"] is None and "| three | waits for 'two' |" in page
    assert states["five"] is None and "| five | left for another sitting: no-such-program is not here |" in page
    assert states["six"] is None and "| six | left for next time: needs up to 3600 s, and " in page
    assert "| one | tests passed |  | 1 |  |" in page and "ValueError: why" in page.partition("## What failed")[2]


def is_gone(pid):
    """Ended, whether or not anybody has asked for its exit status; a killed process takes a moment."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_step_at_its_limit_is_stopped_with_all_it_started(tmp_path):
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    line = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    _, states, _ = sit(tmp_path, [gpu.Step("slow", shlex.join([sys.executable, "-c", line]), 5)])
    assert states == {"slow": "stopped at its limit of 5 s"}
    assert is_gone(int(pid_file.read_text()))


def test_started_again_it_goes_on_with_what_is_left(tmp_path):
    """What is done stays done, what failed comes after what was never tried."""
    order = tmp_path / "order"
    mark = "import os, sys; open({!r}, 'a').write({!r}); sys.exit({})"

    def step(name, status, **fields):
        return gpu.Step(name, shlex.join([sys.executable, "-c", mark.format(str(order), name, status)]), 50, **fields)

    assert not sit(tmp_path, [step("a", 0), step("b", 1), step("c", 0, needs="no-such-program")])[0]
    good, states, _ = sit(tmp_path, [step("a", 1), step("b", 0), step("c", 0)])
    assert good and set(states.values()) == {"done"} and order.read_text() == "abcb"


def test_results_of_the_other_mode_are_refused(tmp_path, monkeypatch, capsys):
    """Else figures of a CPU would stand as done."""
    sit(tmp_path, [gpu.Step("one", say("x"), 50)])
    with pytest.raises(InputError, match="expected results of a sitting at a GPU, found those of a dry run"):
        gpu.Sitting(tmp_path, tmp_path / "data", dry=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda *args, **kwargs: "/bin/true")
    monkeypatch.setattr("sys.argv", ["gpu", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert capsys.readouterr().err.splitlines()[-1].startswith("gpu: error: ")


def test_rows_of_another_commit_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "commit", lambda: "0123456789abcdef")
    one, two = (gpu.Step(name, say("1 passed in 2 s"), 50, "tests") for name in ("one", "two"))
    sit(tmp_path, [one])
    monkeypatch.undo()
    page = sit(tmp_path, [one, two])[2]
    assert "| one (at commit 0123456789) | done |" in page and "| two | done |" in page
    assert "| one (at commit 0123456789) | tests passed |" in page and "| two | tests passed |" in page


def test_folders_may_have_spaces_and_quotes(tmp_path):
    step = gpu.Step("touch", "touch {out}/made {data}/made", 50)
    assert sit(tmp_path / "a folder's", [step])[0]
    assert (tmp_path / "a folder's" / "made").exists() and (tmp_path / "a folder's" / "data" / "made").exists()


def test_programs_of_cuda_are_found_off_the_path(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "some-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    step = gpu.Step("checked", "some-sanitizer", 50, needs="some-sanitizer")
    assert sit(tmp_path / "out", [step])[1] == {"checked": None}
    monkeypatch.setattr(gpu, "CUDA_PROGRAMS", str(program.parent))
    assert sit(tmp_path / "out", [step])[1] == {"checked": "done"}


@pytest.mark.slow
def test_interrupted_it_leaves_a_page_and_nothing_running(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks import gpu\n"
        f"quick, slow = {say('fast')!r}, {shlex.join([sys.executable, '-c', 'import time; time.sleep(600)'])!r}\n"
        "gpu.plan = lambda dry: [gpu.Step('quick', quick, 50), gpu.Step('slow', slow, 500)]\n"
        f"sys.argv = ['gpu', '--dry-run', '--output-dir', {str(tmp_path)!r}]; sys.exit(gpu.main())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=run.ROOT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "logs" / "slow.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = []
    while not children:
        children = psutil.Process(process.pid).children()
    process.terminate()
    assert process.wait(60) != 0 and all(is_gone(child.pid) for child in children)
    page = (tmp_path / "report.md").read_text()
    assert "| quick | done |" in page and "| slow | not begun |" in page


def test_predictions_stand_beside_what_was_measured(tmp_path):
    """By hand: 8.6 MB at 4.3 TB/s are 2 us, of which 4 us reach a half; einsum's 3 ms are the roofline's."""
    row = {column: "" for column in run.COLUMNS}
    row |= {"op": "ngram_fusion", "mode": "fwdbwd", "dtype": "bfloat16", "device": "NVIDIA H200"}
    shape = "genome S=512 T=32700 B=9 N=9 E=9 H=768"
    for impl, milliseconds in (("triton", 0.004), ("einsum", 6.0)):
        speed = 8.6e-3 / (milliseconds * 1e-3)  # GB/s
        run.write_row({**row, "impl": impl, "shape": shape, "p50_ms": milliseconds, "gb_per_s": speed}, tmp_path)
    rows = {"32768": {"einsum, bfloat16": 3.0}, "262144": {"einsum, bfloat16": 9.0}}
    predicted = {"operators": {"ngram_fusion": rows}}
    triton, einsum = gpu_page.read_operators(tmp_path, "", predicted)
    assert triton.predicted == pytest.approx(0.002) and triton.reached == pytest.approx(0.5)
    assert (einsum.measured, einsum.predicted, einsum.reached) == (6.0, 3.0, 0.5)
    assert gpu_page.Figure("tokens/s", 30.0, 40.0, True).reached == 0.75


def test_commands_for_a_gpu_are_ones_that_the_programs_take(monkeypatch, root):
    """Parsed, not run; those of a dry run are run below."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(run, "devices_of", lambda operator: set())  # so that none is measured
    constants = {name: getattr(fusion_kernels, name) for name in gpu.TUNED}
    steps, kinds = gpu.plan(dry=False), []
    assert [step.name for step in steps] == [step.name for step in gpu.plan(dry=True)]
    assert len({gpu.slug(step.name) for step in steps}) == len(steps) and not any(step.left_out for step in steps)
    for step in steps:
        words = shlex.split(step.command.format(out="out", data="data", port=1, fastest="--torch-compile"))
        if "dnazen.cli.main" in words:
            parse_arguments(words[words.index("dnazen.cli.main") + 1 :])
        elif "dnazen/pretrain.py" in words:
            dataclasses = (DataArguments, PretrainingArguments)
            HfArgumentParser(dataclasses).parse_args(words[words.index("dnazen/pretrain.py") + 1 :])
        elif "benchmarks.run" in words:
            monkeypatch.setattr("sys.argv", words[words.index("benchmarks.run") :])
            with pytest.raises(SystemExit) as stop:
                run.main()
            assert stop.value.code == 0, step.name
            for name, value in constants.items():
                setattr(fusion_kernels, name, value)
        elif "pytest" in words:
            assert [(root / word).exists() for word in words if word.startswith("tests/")] == [True], step.name
        kinds.append(step.figures)
        assert step.figures in gpu_page.READERS and step.after in ("", *(other.name for other in steps))
    assert tuple(gpu.BACKENDS) == tuple(BACKENDS) and set(kinds) == gpu_page.READERS.keys() - {"none"}


def test_a_constant_that_the_kernels_do_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(fusion_kernels, "WARPS_PER_SM", 8)
    run.set_constant("WARPS_PER_SM", 12)
    assert fusion_kernels.WARPS_PER_SM == 12
    with pytest.raises(ValueError, match="expected a constant of .*triton_impl, found 'torch'"):
        run.set_constant("torch", 12)


@pytest.mark.slow
def test_one_implementation_and_one_hidden_size(batch, monkeypatch):
    monkeypatch.setattr(run, "CPU_SECONDS", 0.0)
    speeds = {"cpu": 1.0}
    rows = list(run.measure("ngram_masking", batch, "toy", ["fwd"], speeds, "PyTorch", (16,)))
    assert [(row["impl"], row["ratio_to_baseline"]) for row in rows] == [("PyTorch", None)]
    assert " H=" not in rows[0]["shape"]  # masking has none


def test_attention_is_measured_at_production_shapes():
    tokens, ngrams = (shape.lengths() for shape in attention.SHAPES.values())
    assert (tokens.sum(), len(tokens), tokens.max() <= 512) == (65_536, 300, True)
    assert (ngrams.sum(), len(ngrams), ngrams.max() <= 45) == (3_000, 300, True)


def test_attention_is_set_up_once_and_not_timed_with_the_kernels(monkeypatch):
    """As for all layers of a forward pass; once more for the time of that itself, in 1 + 5 calls."""
    monkeypatch.setattr(run, "CPU_SECONDS", 0.0)
    small, cpu, made, run_ = attention.SMALL["tokens"], torch.device("cpu"), [], []
    right = attention.packed_attention

    def counting(*sizes):
        made.append(sizes[0])
        attend = right(*sizes)

        def once(*states):
            run_.append(sizes[0])
            return attend(*states)

        return once

    monkeypatch.setattr(attention, "packed_attention", counting)
    found = attention.measure("sdpa", small, cpu, torch.float32)
    assert found["ms"].keys() == {"fwd", "bwd", "set-up"}
    assert made.count("sdpa") == 1 + 1 + 6  # errors; fwd and bwd; itself
    assert run_.count("sdpa") == 1 + 6 + 1  # errors; fwd; the graph of bwd


def test_attention_that_is_wrong_is_told(monkeypatch):
    """sdpa agrees with eager; a stand-in for it that forgets the distance does not."""
    monkeypatch.setattr(run, "CPU_SECONDS", 0.0)
    small, cpu = attention.SMALL["tokens"], torch.device("cpu")
    found = attention.measure("sdpa", small, cpu, torch.float32)
    assert found["agrees"] and all(times[0] > 0 for times in found["ms"].values())
    right = attention.packed_attention

    def forgetful(name, *sizes):
        return right(name, *sizes[:3], None if name == "sdpa" else sizes[3])

    monkeypatch.setattr(attention, "packed_attention", forgetful)
    assert not attention.measure("sdpa", small, cpu, torch.float32)["agrees"]


class Starts:
    """In place of `subprocess.Popen`: each launcher is started once, and then its scripts warm, as modules are.

    But for what asks Triton's compiler, where the warm ones have its interpreter.
    """

    def __init__(self):
        self.launchers = set()

    def __call__(self, words, cwd, env, stdout, stderr):
        launcher, *rest = words
        output = Path(stdout.name)
        if launcher == sys.executable:
            if not {"benchmarks.budget", "doctor"} & set(rest):
                return WarmProgram(rest, [env], output, cwd)
        elif launcher in self.launchers:
            processes_flag, processes, port_flag, port, *script = rest
            assert processes_flag in ("--num_gpus", "--nproc_per_node") and port_flag == "--master_port"
            return WarmProgram(script, rank_environments(int(processes), int(port), env), output, cwd)
        else:
            self.launchers.add(launcher)
        return subprocess.Popen(words, cwd=cwd, env=env, stdout=stdout, stderr=stderr)


@pytest.mark.slow
@pytest.mark.longest
def test_the_plan_runs_dry(tmp_path, monkeypatch, capsys):
    """Every step that a CPU can do, small, in a folder with a space; a second call finds nothing to do."""
    tmp_path = tmp_path / "a folder"
    starts = Starts()
    monkeypatch.setattr(gpu, "start", starts)
    monkeypatch.setattr("sys.argv", ["gpu", "--dry-run", "--output-dir", str(tmp_path)])
    assert gpu.main() == 0, (tmp_path / "report.md").read_text()
    assert starts.launchers == {"deepspeed", "torchrun"}
    page = (tmp_path / "report.md").read_text()
    states = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| \d* \|$", page, re.MULTILINE))
    for step in gpu.plan(True):
        assert states[step.name] == (f"not in a dry run: {step.left_out}" if step.left_out else "done")
    assert sum(state == "done" for state in states.values()) >= 13
    assert "no figure here says anything of a GPU" in page and "commit: " in page
    assert "| pretraining ZeRO-2, resumed | began at |  | checkpoint-6 |" in page
    assert "| pretraining moved to one device | began at |  | checkpoint-2 |" in page
    moved = re.search(r"moved to one device \| loss at step 4 \| ([\d.]+), ZeRO-2's \| ([\d.]+) \|", page)
    # bf16: weights are rounded to 2^-9 of themselves in each of 4 steps, and a loss is a mean over many tokens
    assert float(moved[1]) == pytest.approx(float(moved[2]), rel=4 * 2**-9)
    assert "| attention sdpa | tokens, largest error | at most" in page and "agrees" in page
    assert "| most expensive operators | times a step | ms a step |" in page and "| tokens: attention |" in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()}
    assert gpu.main() == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()} == before


# -- what is carried to it --------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path):
    """Two archives, the first in three parts of at most 20 kB; and what is in them."""
    content = {"base/data/one.bin": os.urandom(45_000), "flash4/two.txt": b"two"}
    for name, value in content.items():
        path = tmp_path / "content" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(value)
    parts = tmp_path / "parts"
    parts.mkdir()
    carry.pack(tmp_path / "content", parts, 20_000)
    return parts, {name.partition("/")[2]: value for name, value in content.items()}


def unpack(parts, target):
    return subprocess.run(
        [sys.executable, parts / "unpack.py", target], capture_output=True, text=True, cwd=target.parent
    )


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="needs tarfile's filters, of Python 3.11.4")
def test_what_was_cut_is_joined_again(packed, tmp_path):
    parts, content = packed
    names = sorted(path.name for path in parts.iterdir())
    assert names == ["base.tar.00", "base.tar.01", "base.tar.02", "flash4.tar.00", "parts.json", "unpack.py"]
    assert all(path.stat().st_size <= 20_000 for path in parts.iterdir())
    (parts / "base.tar.01").rename(tmp_path / "on its way")
    result = unpack(parts, tmp_path / "there")
    assert result.returncode == 0 and "base: waiting for base.tar.01" in result.stdout
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["two.txt"]
    (tmp_path / "on its way").rename(parts / "base.tar.01")
    assert unpack(parts, tmp_path / "there").returncode == 0
    for name, value in content.items():
        assert (tmp_path / "there" / name).read_bytes() == value


def test_a_part_that_was_altered_is_refused(packed, tmp_path):
    parts, _ = packed
    damaged = parts / "base.tar.02"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    result = unpack(parts, tmp_path / "there")
    assert result.returncode != 0 and "base.tar.02: expected SHA-256" in result.stderr
    assert not (tmp_path / "there" / "data").exists()
