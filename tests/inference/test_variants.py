"""`dnazen variants`: scores against plain loops over the model, symmetries, and VCF files of every kind."""

import gzip
import random

import numpy as np
import pysam
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.batches.collator import PackedCollator
from dnazen.cli.main import main
from dnazen.data.tokenizer import load_tokenizer
from dnazen.dna import reverse_complement
from dnazen.inference.loading import load_for_inference
from dnazen.inference.variants import _pair_alleles, variants
from dnazen.models import DNAZenForMaskedLM
from dnazen.ngram.vocab import NgramVocabulary
from tests.inference.test_embed import check_full_disk

HEADER = "##fileformat=VCFv4.2\n##contig=<ID=chr1>\n##contig=<ID=chr2>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
LENGTH = 3000


def line(pos, ref, alt, chrom="chr1", name=".", info="."):
    return "\t".join(map(str, (chrom, pos, name, ref, alt, ".", ".", info))) + "\n"


def other(base):
    return "ACGT"["ACGT".index(base) - 1]


@pytest.fixture(scope="module")
def contig(genome):
    return genome[:LENGTH]


@pytest.fixture
def files(contig, genome, tmp_path):
    """A folder with a soft-masked reference and a writer of VCF files."""
    folder = tmp_path / "files"
    folder.mkdir()
    chr1, chr2 = f"{contig[:1000].lower()}\n{contig[1000:]}", genome[5000:5400]
    (folder / "ref.fa").write_text(f">chr1 first\n{chr1}\n>chr2\n{chr2}\n")

    def score(model, records, header=HEADER, output="out.vcf", **more):
        (folder / "in.vcf").write_text(header + records)
        counts = variants(str(model), folder / "in.vcf", folder / "ref.fa", folder / output, **more)
        return counts, read(folder / output)

    score.folder = folder
    return score


def read(path):
    """INFO fields of ours per record, by pysam."""
    with pysam.VariantFile(str(path)) as file:
        assert file.header.info["DNAZEN_LLR"].type == "Float" and file.header.info["DNAZEN_LLR"].number == "A"
        assert any(record.key == "dnazen" for record in file.header.records)
        return [{name: record.info[name] for name in record.info if name.startswith("DNAZEN")} for record in file]


@pytest.fixture(scope="module")
def plain(model_folder):
    """LLR and distance of a pair of windows, strand by strand, one sequence at a time, all logits."""
    model = DNAZenForMaskedLM.from_pretrained(model_folder, attn_implementation="eager").eval()
    tokenizer = load_tokenizer(model_folder)
    collator = PackedCollator(tokenizer, NgramVocabulary.from_pretrained(model_folder, tokenizer))

    @torch.no_grad()
    def scores(left, ref, alt, right, margin):
        ratios, distances = [], []
        for flip in (False, True):
            texts = [left + allele + right for allele in (ref, alt)]
            limits = [len(left) - margin, len(right) - margin]
            if flip:
                texts, limits = [reverse_complement(text) for text in texts], limits[::-1]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            tokens = [tokenizer.convert_ids_to_tokens(of) for of in ids]
            # the longest shared runs of whole tokens that do not reach the allele
            first = max(
                n for n in range(min(map(len, ids)) + 1)
                if ids[0][:n] == ids[1][:n] and len("".join(tokens[0][:n])) <= limits[0]
            )  # fmt: skip
            last = max(
                n for n in range(min(map(len, ids)) + 1)
                if ids[0][len(ids[0]) - n :] == ids[1][len(ids[1]) - n :]
                and len("".join(tokens[0][len(ids[0]) - n :])) <= limits[1]
            )  # fmt: skip
            totals, means = [], []
            for of in ids:
                means.append(model.bert(**collator([of])).last_hidden_state[1:-1].double().mean(0))
                hidden = [*of[:first], *[4] * (len(of) - first - last), *of[len(of) - last :]]
                logits = model(**collator([hidden])).logits[1:-1].log_softmax(-1)
                totals.append(sum(float(logits[at, of[at]]) for at in range(first, len(of) - last)))
            ratios.append(totals[1] - totals[0])
            distances.append(float((means[1] - means[0]).norm()))
        return np.mean(ratios), np.mean(distances)

    return scores


def test_scores_are_those_of_plain_loops(model_folder, contig, files, plain):
    """SNV, MNV, insertion, deletion and a complex change; at the contig's ends too; several alleles in one record."""
    flank = 90
    cases = [(500, contig[499], [other(contig[499])]), (1, contig[0], [other(contig[0]), contig[0] + "TTT"])]
    cases += [(LENGTH, contig[-1], [other(contig[-1])]), (800, contig[799:802], ["".join(map(other, contig[799:802]))])]
    cases += [(900, contig[899], [contig[899] + "GATTACA"]), (1001, contig[1000:1012], [contig[1000]])]
    cases += [(1500, contig[1499:1503], ["TTGGCCAA", contig[1499], other(contig[1499]) + contig[1500:1503]])]
    records = "".join(line(pos, ref, ",".join(alts)) for pos, ref, alts in cases)
    counts, found = files(model_folder, records, flank=flank)
    assert counts == {
        "records": 7, "ambiguous": 0, "alleles": 10, "scored": 10, "unspelled": 0, "unchanged": 0, "long": 0,
    }  # fmt: skip
    for (pos, ref, alts), info in zip(cases, found, strict=True):
        start, end = pos - 1, pos - 1 + len(ref)
        for number, alt in enumerate(alts):
            # what the two share goes to the flanks
            first, one, two = 0, ref, alt
            while one and two and one[0] == two[0]:
                first, one, two = first + 1, one[1:], two[1:]
            last = 0
            while one and two and one[-1] == two[-1]:
                last, one, two = last + 1, one[:-1], two[:-1]
            left = contig[max(start + first - flank, 0) : start + first]
            right = contig[end - last : end - last + flank]
            ratio, distance = plain(left, one, two, right, margin=int(not one or not two))
            # float32 in pysam, six digits in the file, rounding of fp32 sums
            assert info["DNAZEN_LLR"][number] == pytest.approx(ratio, rel=1e-4, abs=1e-4)
            assert info["DNAZEN_DIST"][number] == pytest.approx(distance, rel=1e-3)
    assert len({info["DNAZEN_LLR"] for info in found}) == 7


@pytest.mark.slow
def test_same_scores_alone_and_in_large_batches(model_folder, contig, files):
    positions = sorted(random.Random(0).sample(range(1, 3000), 30))
    records = "".join(line(pos, contig[pos - 1], other(contig[pos - 1])) for pos in positions)
    _, alone = files(model_folder, records, output="a.vcf", max_batch_tokens=3)
    _, together = files(model_folder, records, output="b.vcf")
    _, again = files(model_folder, records, output="c.vcf")
    assert again == together
    for one, two in zip(alone, together):
        assert one["DNAZEN_LLR"] == pytest.approx(two["DNAZEN_LLR"], rel=1e-4, abs=1e-4)
        assert one["DNAZEN_DIST"] == pytest.approx(two["DNAZEN_DIST"], rel=1e-3)


@pytest.mark.slow
def test_the_other_strand_and_the_way_back(model_folder, contig, files):
    """A variant has the same score on the reversed contig; from ALT to REF its LLR changes sign."""
    changes = [(700, "", ""), (1200, "", "ACCA"), (1700, contig[1700:1709], "")]
    changes[0] = (700, contig[700], other(contig[700]))
    forward, folder = [], files.folder
    for start, ref, alt in changes:
        anchor = contig[start - 1] if not (ref and alt) else ""
        forward.append(line(start - len(anchor) + 1, anchor + ref, anchor + alt))
    _, expected = files(model_folder, "".join(forward))
    flipped = reverse_complement(contig)
    for number, (start, ref, alt) in enumerate(changes):
        # reversed: the padding base that VCF demands is another one
        end = LENGTH - start
        begin = end - len(ref)
        anchor = flipped[begin - 1] if not (ref and alt) else ""
        text = line(begin - len(anchor) + 1, anchor + reverse_complement(ref), anchor + reverse_complement(alt))
        (folder / "ref.fa").write_text(f">chr1\n{flipped}\n")
        _, found = files(model_folder, text, output=f"flipped{number}.vcf", flank=256)
        back = contig[:start] + alt + contig[start + len(ref) :]
        (folder / "ref.fa").write_text(f">chr1\n{back}\n")
        anchor = contig[start - 1] if not (ref and alt) else ""
        text = line(start - len(anchor) + 1, anchor + alt, anchor + ref)
        _, reverted = files(model_folder, text, output=f"back{number}.vcf")
        assert found[0]["DNAZEN_LLR"] == pytest.approx(expected[number]["DNAZEN_LLR"], rel=1e-4, abs=1e-4)
        assert found[0]["DNAZEN_DIST"] == pytest.approx(expected[number]["DNAZEN_DIST"], rel=1e-3)
        ratio = -expected[number]["DNAZEN_LLR"][0]
        assert reverted[0]["DNAZEN_LLR"][0] == pytest.approx(ratio, rel=1e-4, abs=1e-4)
        assert reverted[0]["DNAZEN_REF_TOKENS"] == expected[number]["DNAZEN_ALT_TOKENS"]


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_for_inference(str(model_folder), DNAZenForMaskedLM)


@settings(max_examples=300, deadline=None)
@given(
    st.text("ACGT", min_size=1, max_size=40), st.text("ACGT", max_size=40), st.text("ACGT", max_size=8),
    st.text("ACGT", max_size=8),
)  # fmt: skip
def test_what_is_scored_spells_the_same_stretch_around_either_allele(loaded, left, right, ref, alt):
    if {ref[:1], ref[-1:]} & {alt[:1], alt[-1:]}:
        return  # not what remains of two alleles
    spell = [len(token) for token in loaded.id_to_token]
    for pair in _pair_alleles(left, right, ref, alt, loaded, np.array(spell)):
        scored = map(pair.spelled, (pair.ref, pair.alt))
        text = ["".join(loaded.id_to_token[token] for token in tokens) for tokens in scored]
        assert text[0] and text[1] and text[0] != text[1]
        assert len(text[1]) - len(text[0]) == len(alt) - len(ref)
        for count in range(3):
            masked = pair.masked(count, 4)
            assert masked[: pair.left] == pair.ref[: pair.left] == pair.alt[: pair.left]
            assert masked[len(masked) - pair.right :] == pair.alt[len(pair.alt) - pair.right :]
            assert masked.count(4) == count and len(masked) == pair.left + count + pair.right


def test_what_is_not_scored_is_counted_and_the_rest_of_the_line_kept(model_folder, contig, files):
    header = HEADER.replace("#CHROM", '##INFO=<ID=AF,Number=A,Type=Float,Description="f">\n#CHROM')
    header = header.replace("INFO\n", "INFO\tFORMAT\tS1\n")
    base, long = contig[99], "A" * 520
    rows = [
        f"chr1\t100\trs1\t{base.lower()}\t<DEL>,{other(base)},*\t50.123456789\tPASS\tAF=0.123456789,1e-9,.\tGT\t0/1",
        f"chr1\t100\t.\t{base}\t.\t.\tq10\tXX=3\tGT:DP\t./.:7",  # undeclared FILTER, INFO and FORMAT
        f"chr1\t100\t.\t{base}\t{base},{base}{long},N,{base}[chr2:5[\t.\t.\t.\tGT\t0/0",
    ]
    counts, found = files(model_folder, "\n".join(rows) + "\n", header=header)
    assert counts == {
        "records": 3, "ambiguous": 0, "alleles": 7, "scored": 1, "unspelled": 4, "unchanged": 1, "long": 1,
    }  # fmt: skip
    first, second, third = [
        text for text in (files.folder / "out.vcf").read_text().splitlines() if not text.startswith("#")
    ]
    columns = first.split("\t")
    info, *ours = columns[7].split(";")
    assert "\t".join([*columns[:7], info, *columns[8:]]) == rows[0]
    assert [field.split("=")[0] for field in ours] == [
        "DNAZEN_LLR", "DNAZEN_DIST", "DNAZEN_REF_TOKENS", "DNAZEN_ALT_TOKENS"
    ]  # fmt: skip
    assert [field.split("=")[1].split(",")[::2] for field in ours] == [[".", "."]] * 4
    assert (second, third) == (rows[1], rows[2])
    assert found[0]["DNAZEN_LLR"][0] is None and found[0]["DNAZEN_LLR"][1] != 0


def test_lines_keep_what_pysam_would_write_otherwise(model_folder, contig, files):
    """Digits, CRLF, a trailing semicolon, and bytes that are no UTF-8; BCF, whose numbers are float32, has no lines."""
    fields = ["chr1", "100", ".", contig[99], other(contig[99]), "1e3", ".", "AF=0.10;"]
    text = HEADER.replace("#CHROM", '##INFO=<ID=AF,Number=A,Type=Float,Description="f">\n#CHROM')
    text += "\t".join(fields) + "\r\n" + "\t".join([*fields[:7], "XX=\xe9"])
    (files.folder / "in.vcf").write_bytes(text.encode("latin-1"))
    with (
        pysam.VariantFile(str(files.folder / "in.vcf")) as file,
        pysam.VariantFile(str(files.folder / "in.bcf"), "wb", header=file.header) as copy,
    ):
        copy.write(next(file))
    for name in ("in.vcf", "in.bcf"):
        variants(str(model_folder), files.folder / name, files.folder / "ref.fa", files.folder / f"{name}.out.vcf")
    lines = [(files.folder / f"{name}.out.vcf").read_bytes().splitlines(keepends=True) for name in ("in.vcf", "in.bcf")]
    first, second = (line.split(b"\t") for line in lines[0][-2:])
    assert first[:7] == second[:7] == [field.encode() for field in fields[:7]]
    assert first[7].startswith(b"AF=0.10;DNAZEN_LLR=") and second[7].startswith(b"XX=\xe9;DNAZEN_LLR=")
    assert first[7].endswith(b"\n") and b"\r" not in first[7]
    assert lines[1][-1].split(b"\t")[7].split(b";")[1:] == first[7].split(b";")[1:]


def test_windows_end_at_letters_that_are_no_bases(model_folder, contig, files, plain):
    record = contig[:200] + "N" + contig[200:260] + "R" + contig[260:400]
    (files.folder / "ref.fa").write_text(f">chr1\n{record}\n")
    base = record[230]
    counts, found = files(model_folder, line(231, base, other(base)) + line(201, "N", "A"))
    ratio, _ = plain(record[201:230], base, other(base), record[231:261], margin=0)
    assert found[0]["DNAZEN_LLR"][0] == pytest.approx(ratio, rel=1e-4, abs=1e-4)
    assert counts["unspelled"] == 1


def test_bases_for_codes_of_the_reference(model_folder, contig, files, plain, capsys):
    """REF may have any base that R, say, stands for; the windows of others end there all the same."""
    record = contig[:200] + "R" + contig[201:260] + "Y" + contig[261:400]
    (files.folder / "ref.fa").write_text(f">chr1\n{record}\n")
    counts, found = files(model_folder, line(201, "a", "C") + line(200, record[199] + "G", other(record[199]) + "G"))
    ratio, _ = plain(record[:200], "A", "C", record[201:260], margin=0)
    assert found[0]["DNAZEN_LLR"][0] == pytest.approx(ratio, rel=1e-4, abs=1e-4)
    ratio, _ = plain(record[:199], record[199], other(record[199]), "", margin=0)
    assert found[1]["DNAZEN_LLR"][0] == pytest.approx(ratio, rel=1e-4, abs=1e-4)
    assert (counts["ambiguous"], counts["scored"]) == (2, 2)
    (files.folder / "in.vcf").write_text(HEADER + line(201, "C", "A"))
    assert main(command(model_folder, files.folder, "--output", str(files.folder / "b.vcf"))) == 1
    assert "record chr1:201: expected REF R, as in" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["plain", "gzip", "bgzip"])
def test_compressed_files(model_folder, contig, files, kind):
    text = line(700, contig[699], other(contig[699])) * 3
    _, expected = files(model_folder, text)
    folder, content = files.folder, (HEADER + text).encode()
    ending = "" if kind == "plain" else ".gz"
    for name, data in (("in", content), ("ref", (files.folder / "ref.fa").read_bytes())):
        path = folder / f"{name}{ending}"
        if kind == "plain":
            path.write_bytes(data)
        elif kind == "gzip":
            path.write_bytes(gzip.compress(data))
        else:
            with pysam.BGZFile(str(path), "wb") as file:
                file.write(data)
    variants(str(model_folder), folder / f"in{ending}", folder / f"ref{ending}", folder / "o.vcf.gz")
    assert read(folder / "o.vcf.gz") == expected
    assert gzip.open(folder / "o.vcf.gz").read() == (folder / "out.vcf").read_bytes()
    pysam.tabix_index(str(folder / "o.vcf.gz"), preset="vcf")  # which BGZF alone allows


def test_a_header_without_contigs_and_no_records(model_folder, contig, files):
    header = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    counts, found = files(model_folder, line(9, contig[8], other(contig[8])), header=header)
    assert counts["scored"] == 1 and len(found) == 1
    counts, found = files(model_folder, "", header=header, output="none.vcf")
    assert counts["records"] == 0 and found == []


def test_published_folders(dnabert2_folder, contig, files):
    _, found = files(dnabert2_folder, line(9, contig[8], other(contig[8])))
    assert np.isfinite(found[0]["DNAZEN_LLR"][0]) and found[0]["DNAZEN_DIST"][0] > 0


def command(model_folder, folder, *more):
    given = {"vcf": "in.vcf", "fasta": "ref.fa", "output": "out.vcf"}
    words = [word for name, file in given.items() for word in (f"--{name}", str(folder / file))]
    return ["variants", "--model", str(model_folder), *words, *more]


def test_the_command_says_what_it_did(model_folder, contig, files, capsys):
    (files.folder / "in.vcf").write_text(HEADER + line(50, contig[49], f"{other(contig[49])},*"))
    assert main(command(model_folder, files.folder)) == 0
    printed = capsys.readouterr().out
    assert "records     1 with 2 alternative alleles" in printed and "scored      1 alleles" in printed
    assert "ambiguous   0 records" in printed
    assert "not scored  1 not in A, C, G, T; 0 equal to REF; 0 too long" in printed


@pytest.mark.parametrize(
    "records, message",
    [
        (line(5, "?", "A"), "in.vcf: record chr1:5: expected REF "),
        (line(5, "?", "A", name="rs7"), "in.vcf: record chr1:5 (rs7): expected REF "),
        (line(5, "A", "C", chrom="chr9"), "record chr9:5: expected a contig of"),
        (line(2999, "ACGT", "C"), "record chr1:2999: expected positions 1 to 3,000 of chr1 in"),
        (line(401, "A", "C", chrom="chr2"), "record chr2:401: expected positions 1 to 400 of chr2 in"),
        (line(0, "A", "C"), "record chr1:0: expected positions 1 to 3,000 of chr1 in"),
        ("chr1\t2\n", "in.vcf: cannot be read as VCF: the first record:"),
        (line(5, "=", "A") + line("x", "A", "C"), "in.vcf: cannot be read as VCF: the record after chr1:5:"),
    ],
)
def test_records_off_the_reference_are_refused_by_name(model_folder, contig, files, capsys, records, message):
    wrong, right = other(contig[4]), contig[4]
    (files.folder / "in.vcf").write_text(HEADER + records.replace("?", wrong).replace("=", right))
    assert main(command(model_folder, files.folder)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dnazen: error: ") and message in error, error
    if "?" in records:
        assert f"expected REF {right}, as in {files.folder / 'ref.fa'}, found {wrong}" in error
    assert sorted(path.name for path in files.folder.iterdir()) == ["in.vcf", "ref.fa"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("in.vcf", b"", "in.vcf: cannot be read as VCF"),
        ("in.vcf", b"hello\n", "in.vcf: cannot be read as VCF"),
        ("in.vcf", None, "in.vcf: no such file or folder, given as --vcf"),
        ("in.vcf", gzip.compress(HEADER.encode() * 99, mtime=0)[:-20], "in.vcf: cannot be read as VCF"),
        ("ref.fa", b">chr1\nACGT\n>chr1\nACGT\n", "record name 'chr1' occurs twice"),
        ("ref.fa", None, "ref.fa: no such file or folder, given as --fasta"),
        ("ref.fa", gzip.compress(b">chr1\nACGT\n", mtime=0)[:-9], "ref.fa: cannot be read as FASTA"),
    ],
)
def test_files_that_are_refused(model_folder, contig, files, capsys, name, content, message):
    (files.folder / "in.vcf").write_text(HEADER + line(50, contig[49], other(contig[49])))
    (files.folder / name).unlink() if content is None else (files.folder / name).write_bytes(content)
    assert main(command(model_folder, files.folder)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dnazen: error: ") and message in error, error
    assert not (files.folder / "out.vcf").exists()


def test_bgzf_cut_between_blocks_is_refused(model_folder, contig, files, capsys):
    with pysam.BGZFile(str(files.folder / "in.vcf"), "wb") as file:
        file.write((HEADER + line(50, contig[49], other(contig[49])) * 50).encode())
    whole = (files.folder / "in.vcf").read_bytes()
    (files.folder / "in.vcf").write_bytes(whole[:-28])
    assert main(command(model_folder, files.folder)) == 1
    assert "in.vcf: cannot be read as VCF: no BGZF EOF marker" in capsys.readouterr().err.splitlines()[-1]


def test_outputs_and_arguments(model_folder, contig, files, capsys):
    (files.folder / "in.vcf").write_text(HEADER + line(50, contig[49], other(contig[49])))
    assert main(command(model_folder, files.folder, "--flank", "0")) == 1
    assert "flank: expected at least 1, found 0" in capsys.readouterr().err
    words = command(model_folder, files.folder)
    assert main([*words, "--output", str(files.folder / "out.txt")]) == 1
    assert "out.txt: expected a name that ends in .vcf or .vcf.gz" in capsys.readouterr().err
    assert main(words) == 0
    before = (files.folder / "out.vcf").read_bytes()
    assert main(words) == 1
    assert "out.vcf: already exists" in capsys.readouterr().err
    assert main([*words, "--vcf", str(files.folder / "out.vcf"), "--output", str(files.folder / "new.vcf")]) == 1
    assert "expected no INFO field DNAZEN_" in capsys.readouterr().err
    assert (files.folder / "out.vcf").read_bytes() == before and not (files.folder / "new.vcf").exists()


@pytest.mark.slow
def test_full_disk_leaves_nothing(model_folder, contig, files, capfd):
    records = [
        line(pos, base, other(base), info=f"N={random.Random(pos).randbytes(500).hex()}")  # not to be compressed away
        for pos, base in enumerate(contig[:200], 1)
    ]
    (files.folder / "in.vcf").write_text(HEADER + "".join(records))
    words = [*command(model_folder, files.folder), "--flank", "10", "--output"]
    check_full_disk([[*words, str(files.folder / name)] for name in ("out.vcf", "out.vcf.gz")], capfd)
    assert sorted(path.name for path in files.folder.iterdir()) == ["in.vcf", "ref.fa"]
