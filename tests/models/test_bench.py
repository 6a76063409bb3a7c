"""The work that speed is measured by, and the benchmark from command to picture."""

import gzip
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dnazen.cli.main import main
from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.tokenizer import train_tokenizer
from dnazen.models import DNAZenForMaskedLM
from dnazen.ngram.build import build_ngrams
from dnazen.pretraining.bench import format_bench, measure
from dnazen.pretraining.bench.compilations import Compilations
from dnazen.pretraining.bench.flops import skipped_flops, training_flops
from dnazen.pretraining.bench.measure import Stopwatch
from dnazen.pretraining.bench.profile import PROFILED_STEPS, idle_gaps, summarize_profile


def test_flops_are_those_that_pytorch_counts(config, make_batch):
    """Sequences of equal length, so that nothing is padded; embeddings get no gradient of their own by a product."""
    batch = make_batch([16, 16], [5, 5])
    config._attn_implementation = "eager"
    model = DNAZenForMaskedLM(config)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    num_masked = int((batch["labels"] != -100).sum())
    assert num_masked > 2
    owed = training_flops(config, np.array([16, 16]), np.array([5, 5]), num_masked)
    skipped = skipped_flops(config, 32, num_masked)
    assert skipped > 0 and owed - skipped == counter.get_total_flops()
    config.num_hidden_ngram_layers = config.num_hidden_layers  # then the last layer is fused, on all rows
    with FlopCounterMode(display=False) as counter:
        DNAZenForMaskedLM(config)(**batch).loss.backward()
    owed = training_flops(config, np.array([16, 16]), np.array([5, 5]), num_masked)
    assert skipped_flops(config, 32, num_masked) == 0 and owed == counter.get_total_flops()


@pytest.fixture
def compilations():
    yield Compilations()
    triton.knobs.runtime.jit_post_compile_hook = None
    torch._dynamo.reset()


def double(x):
    return 2 * x


def test_graphs_are_counted_once(compilations):
    compiled = torch.compile(double, backend="eager", dynamic=False)
    before = compilations.total()
    found = []
    for size in (3, 3, 4, 4, 3):
        compiled(torch.zeros(size))
        found.append(compilations.total() - before)
    assert found == [1, 1, 2, 2, 2]


class Hopper:
    """Triton's driver on a machine that has none: enough to compile, not to run."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def test_kernels_are_counted_once(compilations, monkeypatch):
    def kernel(pointer, number):
        tl.store(pointer, number)

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    jitted = JITFunction(kernel)  # triton.jit would interpret it here
    before = compilations.total()
    found = []
    for dtype, number in ((torch.int32, 2), (torch.int32, 3), (torch.int64, 2), (torch.int64, 16)):
        jitted.warmup(dtype, number, grid=(1,))
        found.append(compilations.total() - before)
    assert found == [1, 1, 2, 3]  # 16 is compiled as a multiple of 16


def test_flash_attention_4_is_counted(compilations, monkeypatch):
    """By a stand-in for the package: functions that share caches, as in 4.0.0b36."""
    forward, backward = (SimpleNamespace(compile_cache=SimpleNamespace(cache={})) for _ in range(2))
    interface = SimpleNamespace(forward=forward, same=forward, backward=backward, other=3)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    before = compilations.total()
    forward.compile_cache.cache["sm_90"] = backward.compile_cache.cache["sm_90"] = "kernel"
    assert compilations.total() - before == 2


def test_flash_attention_4_without_the_caches_of_this_release_is_told(compilations, monkeypatch):
    other = SimpleNamespace(forward=SimpleNamespace(kernels={}))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", other)
    assert not compilations.counts("flash_attention_4") and compilations.counts("flex_attention")
    other.forward.compile_cache = SimpleNamespace(cache={})
    assert compilations.counts("flash_attention_4")
    row = {"impl": "auto", "attention": "flash_attention_4", "counts_attention": False, "compilations": 0, "mfu": None}
    row |= dict.fromkeys(
        ("tokens_per_second", "tflops_per_second", "work_done", "tokens_per_step", "sequences_per_step",
         "padding_share", "loader_wait", "ngrams_per_token", "peak_memory_bytes"), 1.0,
    )  # fmt: skip
    row["warm_up"] = {"ended": True, "seconds": 1.0}
    result = {"model": "tiny", "precision": "bf16", "max_batch_tokens": 1, "machine": "m", "rows": [row]}
    said = format_bench({**result, "speed_up": [1.0], "failed": {}, "profile": None})
    assert "auto: flash_attention_4's kernels are not counted" in said


class Recorder:
    """What a Stopwatch says to its trainer, and when."""

    def __init__(self):
        self.said = []

    def start(self, now, warm_up):
        self.started = now
        self.said.append(("start", warm_up))

    def stop(self, now, compilations):
        self.said.append(("stop", compilations))


def run_steps(sizes, monkeypatch, most=100):
    """A step for each size, which is compiled when it is seen first; no time passes before the clock is stopped."""
    monkeypatch.setattr(measure, "MAX_WARM_UP_STEPS", most)
    compiled, recorder = torch.compile(double, backend="eager", dynamic=False), Recorder()
    watch = Stopwatch(recorder, 0.0, None)
    watch.compiled = watch.compilations.total()  # by other tests of this process
    args, control = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(should_training_stop=False)
    for step, size in enumerate(sizes, 1):
        compiled(torch.zeros(size))
        watch.on_step_end(args, SimpleNamespace(global_step=step), control)
        if control.should_training_stop:
            return step, recorder.said
    return None, recorder.said


def test_measuring_begins_when_nothing_compiles_any_more(compilations, monkeypatch):
    assert measure.QUIET_STEPS == 5
    stopped, said = run_steps([3, 3, 3, 4, 4, 4, 4, 4, 4, 4], monkeypatch)
    assert stopped == 10 and said[1] == ("stop", 0)
    assert said[0][1]["steps"] == 9 and said[0][1]["ended"]  # the fourth compiled, five more did not


@pytest.mark.slow
def test_a_warm_up_without_end_is_cut_and_says_so(compilations, monkeypatch):
    torch._dynamo.reset()
    stopped, said = run_steps(range(3, 20), monkeypatch, most=4)
    assert stopped == 5 and said[0][1]["steps"] == 4 and not said[0][1]["ended"]
    assert said[1] == ("stop", 1)  # and that something compiled while it was measured


def test_the_device_is_waited_for_before_the_first_profiled_step_and_after_the_last(
    compilations, monkeypatch, tmp_path
):
    """A wait between them would empty the queue, and the next forward would find the GPU idle."""
    watch = Stopwatch(Recorder(), 0.0, str(tmp_path))
    watch.is_measuring, watch.trainer.started, waited = True, 0.0, []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(watch.profiler and watch.profiler.step_num))
    args, control = SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(should_training_stop=False)
    steps = 0
    while not control.should_training_stop:
        watch.on_step_end(args, SimpleNamespace(global_step=steps), control)
        torch.zeros(1).add_(1)
        steps += 1
    # the step that ends the measurement, one to warm the profiler up, and those that are profiled
    assert steps == 1 + 1 + PROFILED_STEPS
    assert waited == [None, 0, PROFILED_STEPS]


def event(name, start, end, on_gpu=False, annotation=False):
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
        device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU, is_user_annotation=annotation, self_cpu_time_total=0,
    )  # fmt: skip


def test_gaps_of_overlapping_spans():
    assert idle_gaps([(5, 9), (0, 2), (1, 4), (9, 10), (12, 13), (6, 7)]) == [(4, 5), (10, 12)]
    assert idle_gaps([]) == []


def test_profile_by_hand():
    """Two steps: kernels for 6 and 3 us, idle for 4 us in an optimizer's launch and 2 us outside of any operator."""
    events = [
        event("ProfilerStep#1", 0, 100), event("ProfilerStep#1", 0, 100, on_gpu=True, annotation=True),
        event("Optimizer.step", 12, 18), event("aten::mul", 13, 17), event("launch", 14, 16),
        event("gemm", 10, 13, True), event("gemm", 17, 20, True), event("norm", 22, 25, True),
    ]  # fmt: skip
    found = summarize_profile(events, num_steps=2)
    assert found["unit"] == "kernel"
    assert found["expensive"] == [
        {"name": "gemm", "calls": 1, "ms": 0.003}, {"name": "norm", "calls": 0.5, "ms": 0.0015},
    ]  # fmt: skip
    assert (found["busy_ms"], found["idle_ms"]) == (0.0045, 0.003)
    assert found["gaps"] == [
        {"name": "Optimizer.step", "calls": 0.5, "ms": 0.002}, {"name": "Python", "calls": 0.5, "ms": 0.001},
    ]  # fmt: skip


@pytest.mark.slow
def test_bench_measures_both_paths_and_survives_a_third(config, tmp_path, capfd, root, monkeypatch):
    rng = np.random.default_rng(0)
    motif = "".join(rng.choice(list("ACGT"), 12))
    pieces = [motif if rng.random() < 0.3 else "".join(rng.choice(list("ACGT"), 12)) for _ in range(2000)]
    fasta = tmp_path / "random.fa"
    fasta.write_text(">x\n" + "".join(pieces) + "\n")
    tokenizer = train_tokenizer(["".join(pieces)], vocab_size=64)
    build_corpus([fasta], tokenizer, tmp_path / "corpus", max_tokens=62, validation_fraction=0.05)
    build_ngrams(Corpus.open(tmp_path / "corpus"), tmp_path / "ngrams", min_pmi=0.5)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_hidden_ngram_layers")
    (tmp_path / "small.json").write_text(json.dumps({name: getattr(config, name) for name in sizes}))
    line = f"bench --corpus {tmp_path / 'corpus'} --ngrams {tmp_path / 'ngrams'} --model {tmp_path / 'small.json'}"
    line += f" --impl reference triton --seconds 0.5 --max-batch-tokens 256 --output-dir {tmp_path / 'bench'}"
    line += f" --precision bf16 --deepspeed {root / 'ds_configs' / 'zero2.json'} --attn-implementation eager --profile"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # without it and a GPU, the kernels cannot run
    assert main(line.split()) == 0
    output = capfd.readouterr().out
    assert "times as fast as reference" in output and "on CPU" in output or torch.cuda.is_available()
    result = json.loads((tmp_path / "bench" / "bench.json").read_text())
    packed, reference, *kernels = result["rows"]
    assert (packed["impl"], reference["impl"]) == ("auto", "reference")
    assert (packed["attention"], reference["attention"]) == ("eager", "padded")
    profile = json.loads((tmp_path / "bench" / "profile.json").read_text())
    assert profile == result["profile"] and len(profile["expensive"]) == 10 and profile["steps"] == 3
    assert (profile["gaps"] is None) == (not torch.cuda.is_available()) and "that take longest (mean of 3" in output
    with gzip.open(tmp_path / "bench" / profile["trace"]) as file:
        assert len(json.load(file)["traceEvents"]) > 100
    if not torch.cuda.is_available():
        assert kernels == [] and "triton failed: RuntimeError: impl='triton' needs CUDA tensors" in output
        assert result["failed"].keys() == {"triton"}
    assert packed["padding_share"] == 0 < reference["padding_share"] < 1
    for row in result["rows"]:
        assert row["warm_up"]["steps"] >= 5 and row["warm_up"]["ended"]
        assert row["steps"] >= 1 and row["seconds"] >= 0.5 and 0 < row["loader_wait"] < 1
        assert 64 < row["tokens_per_step"] <= 256 and row["ngrams_per_token"] > 0
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["tokens_per_step"] * row["steps"])
        assert (row["mfu"] is None) == (row["device"] == "CPU")
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_attention_is_refused_before_anything_is_read(tmp_path, capsys):
    folders = f"--corpus {tmp_path} --ngrams {tmp_path} --output-dir {tmp_path / 'bench'}"
    line = f"bench {folders} --attn-implementation flashy"
    assert main(line.split()) == 1
    assert "expected one of flash_attention_4, " in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()
