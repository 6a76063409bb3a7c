"""`dnazen explain`: G-grams found by search, attention against the dense formula, tracks against plain sums."""

import csv
import re
import tracemalloc

import numpy as np
import pytest
import torch

from dnazen.batches.collator import PackedCollator
from dnazen.cli.main import main
from dnazen.data.tokenizer import load_tokenizer
from dnazen.inference.explain import explain, format_summary
from dnazen.models import DNAZenForMaskedLM, DNAZenModel
from dnazen.ngram.vocab import NgramVocabulary

MOTIF = "TATAWAW"


def read_table(folder):
    with open(folder / "ngrams.tsv") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def read_track(path):
    first, *lines = path.read_text().splitlines()
    assert first.startswith("track type=bedGraph ")
    return [(record, int(start), int(end), float(value)) for record, start, end, value in map(str.split, lines)]


@pytest.fixture(scope="module")
def plain(model_folder):
    """The G-grams of one sequence, by search, and the attention each gets, by the formula on dense matrices."""
    model = DNAZenModel.from_pretrained(model_folder).eval()
    tokenizer = load_tokenizer(model_folder)
    vocabulary = NgramVocabulary.from_pretrained(model_folder, tokenizer)
    owners = dict(zip(vocabulary.ngrams, vocabulary.ids))

    @torch.no_grad()
    def ngrams(sequence):
        ids = tokenizer(sequence, add_special_tokens=False)["input_ids"]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        bounds = np.cumsum([0, *map(len, tokens)]).tolist()
        found = {}  # by first position, then length
        for at in range(len(ids)):
            for length in range(2, 6):
                ngram = tuple(ids[at : at + length])
                if len(ngram) == length and ngram in owners:
                    found.setdefault(ngram, []).append((bounds[at], bounds[at + length]))
        states = model.ngram_embeddings(
            torch.tensor([owners[ngram] for ngram in found], dtype=torch.long), torch.tensor([0, len(found)])
        )
        received = []
        for layer in model.encoder.ngram_layers:
            attention = layer.attention.self
            query, key, value = (
                part(states).unflatten(-1, (3, 8)).transpose(0, 1)
                for part in (attention.query, attention.key, attention.value)
            )
            weights = torch.softmax(query @ key.mT / 8**0.5, dim=-1)
            received.append(weights.mean((0, 1)).numpy())
            output = layer.attention.output
            states = torch.nn.functional.layer_norm(
                output.dense((weights @ value).transpose(0, 1).flatten(1)) + states, (24,), output.LayerNorm.weight,
                output.LayerNorm.bias, output.LayerNorm.eps,
            )  # fmt: skip
            states = torch.nn.functional.layer_norm(
                layer.output.dense(layer.intermediate(states)) + states, (24,), layer.output.LayerNorm.weight,
                layer.output.LayerNorm.bias, layer.output.LayerNorm.eps,
            )  # fmt: skip
        return [
            (" ".join(tokenizer.convert_ids_to_tokens(ngram)), spans, [float(layer[number]) for layer in received])
            for number, (ngram, spans) in enumerate(found.items())
        ]

    return ngrams


def test_ngrams_attention_and_tracks_are_those_of_plain_loops(model_folder, genome, plain, tmp_path):
    sequences = [genome[start : start + length] for start, length in ((0, 400), (5000, 30), (9000, 900), (20_000, 2))]
    (tmp_path / "in.fa").write_text("".join(f">s{n}\n{sequence}\n" for n, sequence in enumerate(sequences)))
    summary = explain(str(model_folder), tmp_path / "in.fa", tmp_path / "out", motif="GCN")
    table = read_table(tmp_path / "out")
    expected = []
    for number, sequence in enumerate(sequences):
        found = plain(sequence)
        tracks = np.zeros((3, len(sequence)))
        for text, spans, weights in found:
            has_motif = any(re.search("GC[ACGT]", sequence[start:end]) for start, end in spans)
            for start, end in spans:
                expected.append((f"s{number}", start, end, text, len(found), int(has_motif), weights))
                tracks[:, start:end] += np.array([*weights, np.mean(weights)])[:, None]
        for name, track in zip(("layer_1", "layer_2", "mean"), tracks):
            values = np.zeros(len(sequence))
            end_of_last = 0
            for record, start, end, value in read_track(tmp_path / "out" / f"{name}.bedgraph"):
                if record == f"s{number}":
                    assert start >= end_of_last and end > start
                    values[start:end], end_of_last = value, end
            np.testing.assert_allclose(values, track, atol=1e-5)
    assert len(table) == len(expected) > 50
    for row, (record, start, end, text, count, has_motif, weights) in zip(table, expected):
        assert (row["record"], int(row["start"]), int(row["end"]), row["ngram"]) == (record, start, end, text)
        assert (int(row["ngrams_in_window"]), int(row["motif"])) == (count, has_motif)
        np.testing.assert_allclose([float(row["layer_1"]), float(row["layer_2"])], weights, rtol=1e-4)
    assert summary.counts["occurrences"] == len(expected) and summary.counts["records"] == 4
    assert summary.counts["ngrams"] == sum(len(plain(sequence)) for sequence in sequences)
    assert (tmp_path / "out" / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "with the motif" in format_summary(summary)


def test_the_share_of_the_motif(model_folder, genome, plain, tmp_path):
    (tmp_path / "in.fa").write_text(f">s\n{genome[:400]}\n>none\n{'A' * 50}\n")
    summary = explain(str(model_folder), tmp_path / "in.fa", tmp_path / "out", motif="GCA")
    found = plain(genome[:400])
    has_motif = np.array([any("GCA" in genome[start:end] for start, end in spans) for _, spans, _ in found])
    weights = len(found) * np.array([attention for _, _, attention in found])
    expected = np.stack([weights[has_motif].mean(0), weights[~has_motif].mean(0)], axis=1)
    np.testing.assert_allclose(summary.attention, expected, rtol=1e-5)
    assert summary.motif_windows == {"present": 1, "covered": 1}


def test_overlapping_windows_give_each_occurrence_once(model_folder, genome, tmp_path):
    """Occurrences and tracks of windows are those of the windows alone, cut at the seams."""
    record = genome[:500] + "N" * 3 + genome[700:900]
    (tmp_path / "in.fa").write_text(f">r\n{record}\n")
    summary = explain(str(model_folder), tmp_path / "in.fa", tmp_path / "out", window=200, stride=120)
    table = read_table(tmp_path / "out")
    assert summary.counts["windows"] == 5 and summary.counts["other_letters"] == 3
    assert "motif" not in table[0]
    values = np.zeros(len(record))
    for row in table:
        start, end = int(row["start"]), int(row["end"])
        assert row["ngram"].replace(" ", "") == record[start:end]
        values[start:end] += (float(row["layer_1"]) + float(row["layer_2"])) / 2
    assert len({(row["start"], row["end"]) for row in table}) == len(table)
    found = np.zeros(len(record))
    for _, start, end, value in read_track(tmp_path / "out" / "mean.bedgraph"):
        assert not found[start:end].any()
        found[start:end] = value
    np.testing.assert_allclose(found, values, atol=1e-5)


@pytest.mark.slow
def test_a_gap_takes_no_memory(model_folder, genome, tmp_path):
    """Zeros of one track over 5 Mb of N would take 40 MB."""
    runs, peaks = (genome[:250], genome[1000:1200]), []
    for gap in (1, 5_000_000):
        (tmp_path / "in.fa").write_text(f">r\n{runs[0]}{'N' * gap}{runs[1]}\n")
        tracemalloc.start()
        explain(str(model_folder), tmp_path / "in.fa", tmp_path / str(gap), window=100, stride=60)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20e6  # blocks of the file, several times
    narrow, wide = (read_track(tmp_path / str(gap) / "mean.bedgraph") for gap in (1, 5_000_000))
    assert wide == [
        (record, *(at + 4_999_999 * (start > 250) for at in (start, end)), value)
        for record, start, end, value in narrow
    ]  # fmt: skip
    assert sum(start > 250 for _, start, _, _ in narrow) > 3


@pytest.mark.slow
def test_attention_does_not_depend_on_the_batch(model_folder, genome, tmp_path):
    sequences = [genome[start : start + 80 + start % 97] for start in range(0, 40_000, 600)]
    (tmp_path / "in.csv").write_text("sequence\n" + "".join(f"{sequence}\n" for sequence in sequences))
    tables = []
    for size in (3, 8192):
        explain(str(model_folder), tmp_path / "in.csv", tmp_path / str(size), max_batch_tokens=size)
        tables.append(read_table(tmp_path / str(size)))
    for one, other in zip(*tables, strict=True):
        for name, value in one.items():
            if name.startswith("layer"):
                assert float(value) == pytest.approx(float(other[name]), rel=1e-4)
            else:
                assert value == other[name]


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_models_output_has_weights_of_both_encoders(model_folder, genome, impl):
    model = DNAZenForMaskedLM.from_pretrained(model_folder, attn_implementation="eager", impl=impl).eval()
    tokenizer = load_tokenizer(model_folder)
    collator = PackedCollator(tokenizer, NgramVocabulary.from_pretrained(model_folder, tokenizer))
    batch = collator(tokenizer([genome[:300], "ACGT", genome[300:800]], add_special_tokens=False)["input_ids"])
    output = model.bert(**batch, output_attentions=True)
    assert len(output.attentions) == 3 and len(output.ngram_attentions) == 2
    size = batch["max_ngrams"]
    for weights in output.ngram_attentions:
        assert weights.shape == (3, 3, size, size)
        for sequence, count in enumerate(batch["ngram_cu_seqlens"].diff().tolist()):
            torch.testing.assert_close(weights[sequence, :, :count, :count].sum(-1), torch.ones(3, count))
    assert model.bert(**batch).ngram_attentions is None


@pytest.mark.parametrize(
    "more, message",
    [
        (["--motif", "TAXA"], "motif: expected IUPAC codes"),
        (["--stride", "0"], "--window, --stride: expected 1 <= stride <= window, found 2040 and 0"),
    ],
)
def test_what_is_refused(model_folder, tmp_path, capsys, more, message):
    (tmp_path / "in.fa").write_text(">a\nACGT\n")
    command = ["explain", "--input", str(tmp_path / "in.fa"), "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--model", str(model_folder), *more]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.fa"]


def test_a_model_without_ngrams_is_refused(dnabert2_folder, tmp_path, capsys):
    (tmp_path / "in.fa").write_text(">a\nACGT\n")
    command = ["explain", "--input", str(tmp_path / "in.fa"), "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--model", str(dnabert2_folder)]) == 1
    assert "expected a model with G-grams, found none" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.fa"]


@pytest.mark.slow
def test_tata_promoters(model_folder, shared_data, tmp_path, capsys):
    """Real promoters: what the README shows."""
    source = shared_data / "gue" / "prom" / "prom_core_tata" / "test.csv.gz"
    command = ["explain", "--model", str(model_folder), "--input", str(source), "--motif", MOTIF]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "records     613 in 613 windows" in printed and "motif       in" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"ngrams.tsv", "layer_1.bedgraph", "layer_2.bedgraph", "mean.bedgraph", "attention.png"}
    assert (tmp_path / "out" / "attention.png").stat().st_size < 60_000
