"""`dnazen plan`: what it says, what it refuses, and what must always hold."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.cli.main import main
from dnazen.files import InputError
from dnazen.planning import plan as planning
from dnazen.planning.memory import parameters
from dnazen.planning.plan import (
    Calibration,
    ModelShape,
    calibrate,
    choose_size,
    make_plan,
    make_setting,
    needed,
    settings_by_size,
    take_step,
)
from dnazen.planning.preparation import MEASURED
from dnazen.planning.text import count, duration, format_plan, format_sizes
from dnazen.sizes import SIZES

PLAIN = Calibration()


def setting(model="base", gpus="8xH100", tokens=None, nodes=1, deepspeed="zero2", accumulation=1, **more):
    given = {"attention": None, "checkpointing": False, **more}
    return make_setting(model, gpus, nodes, deepspeed, tokens, accumulation, **given)


def test_a_plan_by_hand():
    """A billion bases of 4.92 a token, in micro-batches that packing leaves half a sequence short, on eight GPUs."""
    found = make_plan(setting(), PLAIN, 1e9, 2.0, 16)
    assert found.tokens == pytest.approx(1e9 * 105006659 / 516705200)
    assert found.step.tokens == 8 * (65_536 - 202)
    assert found.steps == math.ceil(2 * found.tokens / found.step.tokens)
    alone = found.steps * found.step.seconds
    # 16 bytes a parameter, every 500 steps, at 0.5 GB/s; and the held-out part now and then
    assert found.checkpoints == math.ceil(found.steps / 500) * 16 * parameters(ModelShape()) / 0.5e9
    assert alone + found.checkpoints < found.training < 1.02 * alone + found.checkpoints
    assert found.disk == (4 * 16 + 4) * parameters(ModelShape())
    assert found.evaluation == 33 / 1.07e6 * 20e6
    text = format_plan(found)
    assert "8 x H100" in text and "predicted, not measured" in text and "raise --save-steps" in text
    assert f"{found.steps:,} steps of 522,672 tokens" in text
    assert "--model base --deepspeed zero2 --max-batch-tokens 65536 --torch-compile True" in text


def test_rates_of_preparation_are_those_of_the_record(root):
    record = json.loads((root / "benchmarks" / "results" / "scale-x86_64-2-cores.json").read_text())
    for job in ("corpus", "ngrams"):
        for name, value in MEASURED[job]["2 workers"].items():
            assert record[job]["2 workers"][name] == value, (job, name)
    assert record["start"]["processor_seconds"] == MEASURED["start"]["processor_seconds"]
    assert record["device"] == MEASURED["device"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bases 35e9 --gpus 8xH900", "--gpus: expected a number and a name, such as 8xH100, of H100, H200, H800"),
        ("--bases 35e9 --gpus 0xH100", "found '0xH100'"),
        ("--bases 35e9 --gpus H100 --deepspeed zero4", "--deepspeed: expected zero1, zero2 or zero3, found 'zero4'"),
        ("--bases 35e9 --gpus H100 --nodes 0", "--nodes: expected at least 1, found 0"),
        ("--bases 35e9 --gpus A100 --attn-implementation flash_attention_4", "--attn-implementation: expected one of"),
        ("--bases -1 --gpus H100", "--bases: expected a number above 0, found -1"),
        ("--bases 35e9 --gpus H100 --cores 0", "--cores: expected a number above 0, found 0"),
        ("--bases 1e5 --gpus 8xH100 --model base", "--bases: expected at least 857,"),
        ("--hours 0 --gpus H100", "--hours: expected a number above 0, found 0"),
        ("--bases 35e9 --gpus H100 --model huge", "huge: no such file; expected a size (tiny, base, large, xlarge)"),
        ("--bases 35e9 --gpus H100 --bench absent.json", "absent.json: no such file; expected bench.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(words, message, capsys):
    assert main(["plan", *words.split()]) == 1
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_what_would():
    """`xlarge` with eight times its tokens: each remedy that is named fits, and the next larger one does not."""
    wanted = setting("xlarge", tokens=65_536)
    with pytest.raises(InputError) as refused:
        make_plan(wanted, PLAIN, 35e9, 1.0, 16)
    message = str(refused.value)
    assert "expected at most the 80 GB that a H100 has, found 206 GB on each" in message
    assert "--max-batch-tokens 22528, or --gradient-checkpointing, or --model large, or --model base" in message
    assert needed(wanted._replace(max_batch_tokens=22_528), PLAIN) <= 80e9
    assert needed(wanted._replace(max_batch_tokens=22_528 + 1024), PLAIN) > 80e9
    assert needed(wanted._replace(checkpointing=True), PLAIN) <= 80e9
    # a measurement that took twice the memory
    with pytest.raises(InputError, match="found .* GB on each"):
        make_plan(setting("xlarge"), Calibration(memory=3.0), 35e9, 1.0, 16)


def test_zero_3_is_named_where_it_helps(tmp_path):
    """24 billion parameters, of which each of eight GPUs would have all weights under ZeRO-2."""
    config = {**SIZES["xlarge"], "num_hidden_layers": 400}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="what would fit: --deepspeed zero3"):
        large = setting(str(tmp_path / "config.json"), tokens=1024, checkpointing=True)
        make_plan(large, PLAIN, 35e9, 1.0, 16)
    with pytest.raises(InputError, match="; no other setting would fit either"):
        make_plan(setting("tiny", tokens=1024), Calibration(memory=100.0), 35e9, 1.0, 16)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": "wide"}))
    with pytest.raises(InputError, match="hidden_size: expected a number of at least 1, found 'wide'"):
        ModelShape.of(str(tmp_path / "config.json"))


def record(**changes):
    """What `dnazen bench` writes of `base` on an H200, twice as slow as predicted, with half as much memory again."""
    predicted = take_step(setting(gpus="H200", tokens=65_338), PLAIN)
    row = {
        "device": "NVIDIA H200", "attention": "flash_attention_4", "tokens_per_step": 65_136.0,
        "sequences_per_step": 161.0, "ngrams_per_token": 0.067, "parameters": parameters(ModelShape()),
        "tokens_per_second": predicted.tokens_per_second / 2,
        "peak_memory_bytes": 1.5 * needed(setting(gpus="H200", tokens=65_338), PLAIN),
    }  # fmt: skip
    result = {"model": "base", "precision": "bf16", "deepspeed": "ds_configs/zero2.json", "rows": [row]}
    for name, value in changes.items():
        (row if name in row else result)[name] = value
    return result


def test_a_measurement_corrects_the_plan(tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record()))
    found = calibrate(str(path))
    assert found.time == pytest.approx(2, rel=0.01) and found.memory == pytest.approx(1.5, rel=0.01)
    free, corrected = (make_plan(setting(gpus="8xH800"), one, 35e9, 1.0, 16) for one in (PLAIN, found))
    assert corrected.step.computing == pytest.approx(found.time * free.step.computing)
    assert corrected.step.communication == free.step.communication and corrected.step.tokens == free.step.tokens
    assert corrected.memory == pytest.approx(found.memory * free.memory)
    assert main(["plan", "--bases", "1e9", "--gpus", "H200", "--model", "base", "--bench", str(path)]) == 0
    assert "base on NVIDIA H200, measured, took 2.00 times the time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "CPU"}, "expected a record of one of H100, H200, H800, A100, found CPU"),
        ({"attention": "sdpa"}, "expected attention by one of flash_attention_4"),
        ({"deepspeed": None}, "expected bf16 under zero1, zero2 or zero3, found bf16, without DeepSpeed"),
        ({"precision": "fp32"}, "found fp32, ds_configs/zero2.json"),
        ({"rows": []}, "expected bench.json of `dnazen bench`"),
        ({"rows": [{}]}, "found no 'device'"),
    ],
)  # fmt: skip
def test_a_record_that_says_nothing_of_a_gpu_is_refused(changes, message, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(record(**changes)))
    with pytest.raises(InputError, match=message):
        calibrate(str(tmp_path / "bench.json"))


def test_hours_choose_the_largest_size_that_reads_enough(capsys):
    """24 hours of eight H100: `xlarge` would read fewer than 20 tokens a parameter, `large` more."""
    given = {
        "gpus": "8xH100",
        "nodes": 1,
        "deepspeed": "zero2",
        "accumulation": 1,
        "attention": None,
        "checkpointing": False,
    }
    sizes, best = choose_size(settings_by_size(**given), PLAIN, 24)
    by_name = {size.setting.model: size for size in sizes}
    assert by_name["xlarge"].tokens < 20 * by_name["xlarge"].count and best == by_name["large"]
    assert by_name["base"].count == parameters(ModelShape()) - 162_708 * 768
    speed = take_step(by_name["base"].setting, PLAIN).tokens_per_second
    assert by_name["base"].tokens == pytest.approx(24 * 3600 * speed)
    text = format_sizes(sizes, best, 24, PLAIN)
    assert "Take large, the largest that reads 20 tokens a parameter" in text and "epochs" not in text
    assert choose_size(settings_by_size(**given), PLAIN, 1e-6)[1] is None
    sizes, _ = choose_size(settings_by_size(**given), Calibration(memory=10.0), 24)
    assert not sizes[-1].fits and "does not fit 80 GB" in format_sizes(sizes, None, 24, PLAIN)
    assert main(["plan", "--hours", "24", "--gpus", "8xH100"]) == 0
    assert "None of them" not in capsys.readouterr().out


def test_numbers_read_well():
    assert [duration(s) for s in (5, 300, 7200, 86400 * 5)] == ["5 s", "5.0 min", "2.0 h", "5.0 days"]
    assert [count(n) for n in (999, 35e9, 1.6e12)] == ["999", "35.0 billion", "1.6 trillion"]


gpus = st.sampled_from(["A100", "H100", "H200", "H800"])
models = st.sampled_from(list(SIZES))
stages = st.sampled_from(["zero1", "zero2", "zero3"])


@settings(max_examples=20, deadline=None)
@given(gpus, models, stages, st.integers(1, 7), st.integers(1, 4), st.sampled_from([1, 4]))
def test_more_gpus_are_never_slower_and_take_no_more_memory(gpu, model, stage, few, nodes, accumulation):
    """In all: one more on a machine, and more machines of as many."""
    few, many, machines = (
        setting(model, f"{number}x{gpu}", deepspeed=stage, accumulation=accumulation, nodes=count)
        for number, count in ((few, 1), (few + 1, 1), (few, nodes))
    )
    assert take_step(machines, PLAIN).tokens_per_second >= take_step(few, PLAIN).tokens_per_second
    assert take_step(many, PLAIN).tokens_per_second >= take_step(few, PLAIN).tokens_per_second
    assert needed(many, PLAIN) <= needed(few, PLAIN)


@settings(max_examples=20, deadline=None)
@given(gpus, models, st.floats(1e8, 1e12), st.floats(1, 10), st.floats(1, 4))
def test_more_bases_and_more_of_anything_take_longer(gpu, model, bases, times, slower):
    one = setting(model, f"8x{gpu}", tokens=4096)
    first = make_plan(one, PLAIN, bases, 1.0, 16)
    more = make_plan(one, PLAIN, bases * times, 1.0, 16)
    assert more.training >= first.training and more.steps >= first.steps
    assert all(more.preparation[job].seconds >= first.preparation[job].seconds for job in first.preparation)
    assert make_plan(one, Calibration(time=slower), bases, 1.0, 16).training >= first.training
    assert take_step(one, PLAIN, expected=False).seconds <= first.step.seconds
    saving = make_plan(one._replace(checkpointing=True), PLAIN, bases, 1.0, 16)
    assert saving.training >= first.training and saving.memory <= first.memory


@settings(max_examples=20, deadline=None)
@given(models, st.integers(1024, 60_000))
def test_memory_grows_with_the_batch(model, tokens):
    assert needed(setting(model, tokens=tokens), PLAIN) < needed(setting(model, tokens=tokens + 2048), PLAIN)


def test_the_constants_are_pretrainings():
    from dnazen.pretraining.training_arguments import PretrainingArguments

    fields = PretrainingArguments.__dataclass_fields__
    assert (fields["save_steps"].default, fields["eval_steps"].default) == (planning.SAVE_STEPS, planning.EVAL_STEPS)
    assert fields["save_total_limit"].default + 1 == planning.CHECKPOINTS
