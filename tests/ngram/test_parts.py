"""G-grams from counts of parts: the same bytes as from all at once; what must not be merged; kills."""

import json
import os
import resource
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.cli.main import main
from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.tokenizer import train_tokenizer
from dnazen.files import InputError
from dnazen.ngram import count, parts
from dnazen.ngram.build import build_ngrams
from dnazen.ngram.count import NO_RUNS, Runs, merge_runs
from dnazen.ngram.parts import build_counts, merge_by_range, merge_counts, take_shard
from tests.helpers.forked import kill_at, run_command

OPTIONS = {"min_pmi": 0.7, "min_pair_count": 4, "max_len": 4, "long_pieces": "split"}


def make_genome(seed: int) -> str:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("ACGT"), 12)) for _ in range(30)]
    return "".join(words[i] for i in rng.integers(0, 30, 2000))


def build(folder, name, files, tokenizer, held_out):
    options = dict(max_tokens=100, validation_records=held_out, num_workers=1)
    build_corpus([folder / file for file in files], tokenizer, folder / name, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Corpora `a`, `b`, `c` (of one sequence), `all` of them; `b` with another tokenizer, name, held-out record."""
    folder = tmp_path_factory.mktemp("corpora")
    tokenizer = train_tokenizer([make_genome(0)], vocab_size=64)
    for i, name in enumerate("abc"):
        genome = make_genome(i)[: 150 if name == "c" else None]
        (folder / f"{name}.fa").write_text(f">{name}\n{genome}\n>{name}v\n{genome[:1000]}\n")
        build(folder, name, [f"{name}.fa"], tokenizer, [f"{name}v"])
    build(folder, "all", ["a.fa", "b.fa", "c.fa"], tokenizer, ["av", "bv", "cv"])
    build(folder, "b-other", ["b.fa"], train_tokenizer([make_genome(0)], vocab_size=50), ["bv"])
    shutil.copy(folder / "b.fa", folder / "copy.fa")
    build(folder, "b-copy", ["copy.fa"], tokenizer, ["bv"])
    build(folder, "b-again", ["b.fa"], tokenizer, ["b"])
    return folder


def count_all(folder, out, names, pairs=None, number=1, **options):
    """The folders with counts of `number` shards of each corpus."""
    found = []
    for name in names:
        for i in range(1, number + 1):
            found.append(out / f"{name}-{i}-of-{number}{'-runs' if pairs else ''}")
            build_counts(Corpus.open(folder / name), found[-1], shard=(i, number), pairs=pairs or (), **options)
    return found


@pytest.fixture(scope="module")
def counted(folder, tmp_path_factory):
    """Folders with the pairs and with the runs of `a` and `b`."""
    out = tmp_path_factory.mktemp("counts")
    pairs = count_all(folder, out, "ab")
    return pairs, count_all(folder, out, "ab", pairs, **OPTIONS)


def read_ngrams(path):
    """The bytes of what is written, but for the manifest, which knows how it was made."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.slow
@pytest.mark.parametrize("shards_of_pairs, shards_of_runs", [(1, 1), (2, 3)])
def test_merged_equals_all_at_once(folder, tmp_path, capsys, monkeypatch, shards_of_pairs, shards_of_runs):
    """Shards of `c` are empty, but for one."""
    monkeypatch.setattr(parts, "MERGED_RUNS", 100)
    options = {**OPTIONS, "long_pieces": "drop"} if shards_of_runs == 3 else OPTIONS
    whole = ["ngrams", "--corpus", str(folder / "all"), "--output-dir", str(tmp_path / "whole"), "--min-count", "3"]
    assert main(whole + flags(options)) == 0
    for number in (shards_of_pairs, shards_of_runs):
        pairs = sorted(tmp_path.glob("pairs-*"))  # none yet, or all
        for name in "abc":
            for i in range(1, number + 1):
                output_dir = tmp_path / f"{'runs' if pairs else 'pairs'}-{name}-{i}"
                words = ["--corpus", folder / name, "--shard", f"{i}/{number}", "--output-dir", output_dir]
                words += ["--pairs", *pairs, *flags(options)] if pairs else []
                words += ["--num-workers", i]
                assert main(["ngrams", "count", *map(str, words)]) == 0
                assert "M tokens/s" in capsys.readouterr().out
    counts = [str(path) for path in reversed(sorted(tmp_path.glob("runs-*")))]  # in any order
    merge = ["ngrams", "merge", "--counts", *counts, "--output-dir", str(tmp_path / "merged"), "--min-count", "3"]
    assert main(merge) == 0
    assert "kept" in capsys.readouterr().out
    assert read_ngrams(tmp_path / "merged") == read_ngrams(tmp_path / "whole")
    assert len(Corpus.open(folder / "c").train) == 1
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "merged")]
    for name in ("num_tokens", "num_pairs", "num_candidates", "num_pieces", "num_long_pieces", "num_ngrams"):
        assert manifests[0]["statistics"][name] == manifests[1]["statistics"][name], name
    checksums = [Corpus.open(folder / name).checksum for name in "abc"]
    assert manifests[1]["corpus_checksums"] == sorted(checksums)
    assert manifests[1]["parameters"] == {"min_len": 2, **options, "min_count": 3}
    assert manifests[0]["statistics"]["num_ngrams"] > 100


@given(st.lists(st.integers(0, 7), max_size=40), st.integers(1, 60))
def test_shards_are_all_sequences_once(lengths, number):
    offsets = np.cumsum([3, *lengths])
    shards = [take_shard([(np.arange(offsets[-1]), offsets)], i, number)[0] for i in range(1, number + 1)]
    assert [list(shard[1]) for shard in shards if len(shard[1]) > 1] != [] or not lengths
    assert np.concatenate([shard[1][:-1] for shard in shards]).tolist() == offsets[:-1].tolist()
    assert {len(shard[1]) - 1 for shard in shards} <= {len(lengths) // number, len(lengths) // number + 1}


@st.composite
def run_parts(draw):
    run = st.tuples(st.integers(0, 30), st.integers(0, 5), st.booleans())
    return [draw(st.lists(run, max_size=20)) for _ in range(draw(st.integers(1, 4)))]


@settings(deadline=None)
@given(run_parts())
def test_runs_add_up(lists):
    def merged(rows):
        columns = list(zip(*rows)) or [[], [], []]
        dtypes = (torch.int64, torch.int64, torch.bool)
        return merge_runs([Runs(*(torch.tensor(c, dtype=d) for c, d in zip(columns, dtypes, strict=True)))])

    whole = merged(sum(lists, []))
    expected = {key: [0, False] for rows in lists for key, _, _ in rows}
    for key, number_seen, is_candidate in sum(lists, []):
        expected[key] = [expected[key][0] + number_seen, expected[key][1] or is_candidate]
    assert whole.keys.tolist() == sorted(expected)
    for key, *found in zip(*(array.tolist() for array in whole), strict=True):
        assert found == expected[key]
    again = merge_runs([merged(rows) for rows in lists] + [NO_RUNS])
    assert all(x.equal(y) for x, y in zip(again, whole, strict=True))


@pytest.mark.parametrize("size, empty", [(2, [0]), (3, [1]), (4, [0, 1, 2, 3]), (4, [])])
def test_every_key_is_merged_in_one_range(monkeypatch, size, empty):
    """Each part has keys of its own and some in common, few of them or many, in the same place or not."""
    monkeypatch.setattr(parts, "MERGED_RUNS", 700)
    columns = []
    for part in range(size):
        rng = np.random.default_rng(part)
        keys = np.unique(rng.integers(0, 50 + 2000 * part**3, 0 if part in empty else 3000))
        columns.append((keys, rng.integers(0, 9, len(keys)), rng.random(len(keys)) < 0.3))
    merged = list(merge_by_range(columns))
    expected = merge_runs([Runs(*map(torch.from_numpy, arrays)) for arrays in columns])
    for arrays, whole in zip(zip(*merged, strict=True), expected, strict=True):
        assert torch.cat(arrays).equal(whole)
    num_keys = sum(len(keys) for keys, *_ in columns)
    assert len(merged) == 1 + num_keys // 700
    if len(expected.keys) > 5000:
        assert all(len(runs.keys) > 0.5 * len(expected.keys) / len(merged) for runs in merged)


def test_two_counts_of_the_same_are_refused(folder, counted, tmp_path):
    pairs, runs = counted
    with pytest.raises(InputError, match="counts shard 1/1 of the corpus that .*a-1-of-1-runs counts too"):
        merge_counts([*runs, runs[0]], tmp_path / "g")
    with pytest.raises(InputError, match="counts shard 1/1 of the corpus that .*a-1-of-1 counts too"):
        count_all(folder, tmp_path, "a", [*pairs, pairs[0]])
    copy = count_all(folder, tmp_path, ["b-copy"])
    with pytest.raises(InputError, match="counts tokens that .*b-1-of-1 counts too, in another corpus or a copy"):
        count_all(folder, tmp_path, "a", pairs + copy)
    again = count_all(folder, tmp_path, ["b-again"])
    with pytest.raises(InputError, match="counts a FASTA file that .*b-1-of-1 counts too, in another corpus"):
        count_all(folder, tmp_path, "a", pairs + again)
    halves = count_all(folder, tmp_path, "b", number=2)
    with pytest.raises(InputError, match="b-1-of-2: expected a shard of 1, as .*b-1-of-1, found one of 2"):
        count_all(folder, tmp_path, "a", [*pairs, halves[0]])
    assert not list(tmp_path.glob("*-runs")) and not list(tmp_path.glob(".*"))


def test_missing_counts_are_refused(folder, counted, tmp_path):
    pairs, runs = counted
    thirds = count_all(folder, tmp_path, "b", number=3)
    with pytest.raises(InputError, match="expected all 3 shards of the corpus of .*b-2-of-3, found no 1, 3"):
        count_all(folder, tmp_path, "b", [thirds[1]])
    with pytest.raises(InputError, match="expected all 3 shards of the corpus of .*b-1-of-3, found no 3"):
        count_all(folder, tmp_path, "b", [pairs[0], *thirds[:2]])
    with pytest.raises(InputError, match="expected a corpus whose pairs were counted, found .*b, whose pairs are in"):
        count_all(folder, tmp_path, "b", pairs[:1])
    checksum = Corpus.open(folder / "b").checksum
    with pytest.raises(InputError, match=f"the 2 corpora whose pairs were counted, found 1; missing .* {checksum}"):
        merge_counts(runs[:1], tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_what_does_not_belong_together_is_refused(folder, counted, tmp_path):
    pairs, runs = counted
    other = count_all(folder, tmp_path, ["b-other"])
    with pytest.raises(InputError, match="b-other-1-of-1: expected the same tokenizer_checksum as .*a-1-of-1"):
        count_all(folder, tmp_path, "a", [pairs[0], *other])
    for name, value in {"min_pmi": 1.5, "min_pair_count": 3, "min_len": 3, "max_len": 3, "long_pieces": "drop"}.items():
        changed = count_all(folder, tmp_path / name, "b", pairs, **{**OPTIONS, name: value})
        with pytest.raises(InputError, match=f"b-1-of-1-runs: expected the same parameters as .*'{name}': {value!r}"):
            merge_counts([runs[0], *changed], tmp_path / "g")
    alone = count_all(folder, tmp_path / "alone", "b", pairs[1:], **OPTIONS)
    with pytest.raises(InputError, match="expected runs of the pairs linked in .*a-1-of-1-runs, found others linked"):
        merge_counts([runs[0], *alone], tmp_path / "g")
    with pytest.raises(InputError, match=r"expected runs counted by `dnazen ngrams count --pairs` .*found .*2, pairs"):
        merge_counts(pairs, tmp_path / "g")
    with pytest.raises(InputError, match=r"expected pairs counted by `dnazen ngrams count` .*found .*2, runs"):
        count_all(folder, tmp_path, "a", runs)
    with pytest.raises(InputError, match=r"b: expected runs counted .* found dnazen-corpus of version \d+, None"):
        merge_counts([folder / "b"], tmp_path / "g")
    with pytest.raises(InputError, match="no such file; expected the manifest of counts"):
        merge_counts([tmp_path / "nothing"], tmp_path / "g")


@pytest.mark.parametrize("change", ["cut", "flip", "remove", "manifest", "tokenizer"])
def test_cut_and_altered_files_are_refused(folder, counted, tmp_path, change):
    for source, name in ((counted[0], "pairs"), (counted[1], "run_counts")):
        path = tmp_path / f"{change}-{name}"
        shutil.copytree(source[1], path)
        file, message = path / f"{name}.npy", f"{name}.npy: cut short or altered"
        data = bytearray(file.read_bytes())
        if change == "cut":
            file.write_bytes(data[:-1])
        elif change == "flip":
            data[-8] ^= 1
            file.write_bytes(data)
        elif change == "remove":
            file.unlink()
            message = f"{name}.npy: no such file; these counts are not whole"
        elif change == "manifest":
            manifest = json.loads((path / "manifest.json").read_text())
            manifest["shard"] = [1, 2]
            (path / "manifest.json").write_text(json.dumps(manifest))
            message = "manifest.json: altered; its checksum is not its own"
        else:
            shutil.rmtree(path / "tokenizer")
            shutil.copytree(folder / "b-other" / "tokenizer", path / "tokenizer")
            message = "tokenizer: altered; it is not the tokenizer that was counted with"
        with pytest.raises(InputError, match=message):
            if name == "pairs":
                count_all(folder, tmp_path / "out", "a", [source[0], path])
            else:
                merge_counts([source[0], path], tmp_path / "g")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shard", "3/2"], "shard: expected I/N with I from 1 to N, found 3/2"),
        (["--shard", "0/2"], "found 0/2"),
        (["--min-pmi", "1", "--max-len", "3"], "--min-pmi, --max-len: expected only with pairs"),
        (["--num-workers", "0"], "--num-workers: expected at least 1, found 0"),
        (["--min-pmi", "nan", "--pairs", "a"], "--min-pmi: expected a number of bits, found nan"),
    ],
)
def test_count_refuses(folder, tmp_path, capsys, words, message):
    command = ["ngrams", "count", "--corpus", str(folder / "a"), "--output-dir", str(tmp_path / "out"), *words]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["corpus", "--fasta", "a.fa", "--tokenizer", "tokenizer"],
        ["ngrams", "--corpus", "a"],
        ["ngrams", "count", "--corpus", "a"],
        ["ngrams", "merge", "--counts", "a", "b"],
    ],
)
def test_several_processes_are_refused(tmp_path, capsys, monkeypatch, words):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.chdir(tmp_path)
    for name in ("a.fa", "tokenizer", "a", "b"):
        (tmp_path / name).touch()
    assert main([*words, "--output-dir", "out"]) == 1
    message = capsys.readouterr().err
    assert "expected one process, without torchrun or deepspeed" in message and "found 4 (WORLD_SIZE)" in message
    if words[:2] == ["ngrams", "--corpus"]:
        assert "several machines: `dnazen ngrams count --shard I/N`, then `dnazen ngrams merge`" in message
    assert not (tmp_path / "out").exists()


def test_command_lines_that_are_none(folder, tmp_path, capsys):
    for words, message in (
        (["ngrams", "cuont"], "invalid choice: 'cuont'"),
        (["ngrams", "count", "--corpus", "a", "--output-dir", "b", "--shard", "2"], "expected I/N, such as 2/4, found"),
        (["ngrams"], "required: command"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_taken_folders_are_kept(folder, counted, tmp_path):
    (tmp_path / "precious").touch()
    corpus = Corpus.open(folder / "a")
    writers = (build_ngrams, corpus), (build_counts, corpus), (merge_counts, counted[1])
    for write, read in writers:
        with pytest.raises(InputError, match="already exists; choose another directory"):
            write(read, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_no_ngram_in_a_merge(counted, tmp_path):
    with pytest.raises(InputError, match="a-1-of-1-runs, .*b-1-of-1-runs: none of .* candidates .* is a G-gram"):
        merge_counts(counted[1], tmp_path / "g", min_count=10**6)
    with pytest.raises(InputError, match="min_count: expected at least 1, found 0"):
        merge_counts(counted[1], tmp_path / "g", min_count=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("at", ["ngrams.tsv", "manifest.json.tmp", "os.rename"])
@pytest.mark.parametrize("what", ["ngrams", "merge"])
def test_killed_extraction_leaves_nothing_whole(folder, counted, tmp_path, caplog, what, at):
    merge = ["ngrams", "merge", "--counts", *counted[1]]
    command = merge if what == "merge" else ["ngrams", "--corpus", folder / "a", *flags(OPTIONS)]
    check_kill(command, tmp_path, at, caplog)


@pytest.mark.parametrize(
    "kind, at",
    [("pairs", "pairs.npy"), ("pairs", "os.rename"), ("runs", "run_keys.npy"), ("runs", "manifest.json.tmp")],
)
def test_killed_count_leaves_nothing_whole(folder, counted, tmp_path, caplog, kind, at):
    pairs = ["--pairs", *counted[0]] if kind == "runs" else []
    check_kill(["ngrams", "count", "--corpus", folder / "a", *pairs], tmp_path, at, caplog)


@pytest.mark.slow
def test_killed_while_workers_count(folder, tmp_path, monkeypatch):
    """Its workers die with it, whatever they are at."""

    def work(*arguments):
        (tmp_path / f"{os.getpid()}.worker").touch()
        time.sleep(60)

    def die():
        monkeypatch.setattr(count, "_count_pairs", work)
        monkeypatch.setattr(count.futures, "wait", wait)

    def wait(*arguments, **options):
        while len(list(tmp_path.glob("*.worker"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    command = ["ngrams", "--corpus", folder / "a", "--output-dir", tmp_path / "out", "--num-workers", "2"]
    monkeypatch.setattr(count, "BLOCK_TOKENS", 1000)
    assert run_command(*command, before=die) == -signal.SIGKILL
    workers = list(tmp_path.glob("*.worker"))
    deadline = time.monotonic() + 30
    while any(map(is_running, (int(path.stem) for path in workers))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for path in workers:
        path.unlink()
    assert not (tmp_path / "out").exists()
    assert run_command(*command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # ended, and nobody asked how
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("what", ["pairs", "runs", "merge"])
def test_full_disk_leaves_nothing(folder, counted, tmp_path, capfd, what):
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = ["ngrams", "count", "--corpus", folder / "a"] + (["--pairs", *counted[0]] if what == "runs" else [])
    if what == "merge":
        command = ["ngrams", "merge", "--counts", *counted[1]]
    assert run_command(*command, "--output-dir", tmp_path / "out", before=fill) == 1
    assert f"dnazen: error: {tmp_path / 'out'}" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def check_kill(command, tmp_path, at, caplog):
    """Killed, it leaves a hidden folder, which is refused; run again, it removes that and writes what it should."""
    command = [*map(str, command), "--output-dir"]
    assert run_command(*command, tmp_path / "out", before=lambda: kill_at(at)) == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".out.") and leftover.name.endswith(".tmp")
    if at != "os.rename":
        assert not (leftover / "manifest.json").exists()
        with pytest.raises(InputError, match="no such file; expected the manifest of counts"):
            merge_counts([leftover], tmp_path / "g")
    assert main([*command, str(tmp_path / "out")]) == 0
    assert f"removing {leftover}: the process that wrote it was killed" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main([*command, str(tmp_path / "again")]) == 0
    assert read_ngrams_deep(tmp_path / "out") == read_ngrams_deep(tmp_path / "again")


def read_ngrams_deep(path):
    return {f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != "manifest.json"}
