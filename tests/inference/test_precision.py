"""`--precision` and `--attn-implementation`, wherever a model runs: the same result but for rounding."""

import json

import numpy as np
import pytest
import torch

from dnazen.cli.main import main
from dnazen.files import InputError
from dnazen.inference.loading import load_for_inference
from dnazen.models import DNAZenForMaskedLM


def test_fp32_is_the_default_and_another_is_refused(model_folder):
    name = str(model_folder)
    for precision, dtype in (((), torch.float32), (("fp32",), torch.float32), (("bf16",), torch.bfloat16)):
        assert load_for_inference(name, DNAZenForMaskedLM, *precision).model.dtype == dtype
    with pytest.raises(InputError, match="precision: expected fp32 or bf16, found 'fp8'"):
        load_for_inference(name, DNAZenForMaskedLM, "fp8")


@pytest.fixture
def run(model_folder, genome, tmp_path):
    """Run a command on the small model; the numbers that it writes."""
    (tmp_path / "genome.fa").write_text(f">part\n{genome[:3000]}\n")
    header = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    record = f"part\t1000\t.\t{genome[999]}\t{'C' if genome[999] != 'C' else 'A'}\t.\t.\t.\n"
    (tmp_path / "v.vcf").write_text(header + record)

    def call(command, *options):
        out = tmp_path / "-".join(("out", command, *options))
        words = [command, "--model", model_folder]
        if command == "evaluate":
            words += ["--corpus", model_folder.parent / "corpus", "--output-dir", out]
        elif command == "explain":
            words += ["--input", tmp_path / "genome.fa", "--output-dir", out]
        elif command == "embed":
            out = out.with_suffix(".npy")
            words += ["--input", tmp_path / "genome.fa", "--output", out]
        else:
            out = out.with_suffix(".vcf")
            words += ["--vcf", tmp_path / "v.vcf", "--fasta", tmp_path / "genome.fa", "--output", out]
        assert main([str(word) for word in (*words, *options)]) == 0
        if command == "evaluate":
            return np.array(
                json.loads((out / "evaluation.json").read_text())["scores"]["model"]["bits_per_base"]["mean"]
            )
        if command == "explain":
            return np.loadtxt(out / "mean.bedgraph", skiprows=1, usecols=3)
        if command == "embed":
            return np.load(out)
        fields = dict(field.split("=") for field in out.read_text().splitlines()[-1].split("\t")[7].split(";"))
        return np.array([float(fields["DNAZEN_LLR"]), float(fields["DNAZEN_DIST"])])

    return call


@pytest.mark.slow
@pytest.mark.parametrize("command", ["embed", "explain", "variants", "evaluate"])
def test_bf16_differs_by_rounding(run, command):
    plain, rounded = run(command), run(command, "--precision", "bf16")
    assert np.isfinite(rounded).all() and not np.array_equal(plain, rounded)
    # some 40 operations, each rounded by 2^-9 of a value of order 1 and of a sum of such
    assert np.abs(plain - rounded).max() <= 0.1 * max(1.0, np.abs(plain).max())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["embed", "variants", "evaluate"])
def test_attention_by_name(run, command, capsys):
    plain, eager = run(command), run(command, "--attn-implementation", "eager")
    np.testing.assert_allclose(plain, eager, rtol=1e-3, atol=1e-4)


def test_unknown_attention_is_refused(model_folder, tmp_path, capsys):
    (tmp_path / "a.fa").write_text(">a\nACGT\n")
    words = ["embed", "--model", str(model_folder), "--input", str(tmp_path / "a.fa"), "--output"]
    assert main([*words, str(tmp_path / "v.npy"), "--attn-implementation", "magic"]) == 1
    assert "error: --attn-implementation: expected one of auto, " in capsys.readouterr().err
