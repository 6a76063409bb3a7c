"""Every command and every line of Python in the README runs, in order, in a fresh folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dnazen.data.fasta import read_fasta
from dnazen.data.tokenizer import load_tokenizer, save_tokenizer
from dnazen.pretraining.prepare import PACKAGED_GENOME
from tests.finetuning.conftest import motif_row, write_splits
from tests.helpers.launch import environment, free_port
from tests.helpers.published import write_dnabert2

# a few steps are enough to see that a command runs; what a reader would wait for is measured elsewhere
SHORT = ["--max_steps", "2", "--eval_steps", "2", "--disable_tqdm", "True", "--max_batch_tokens", "1024"]
SHORT_FINETUNING = ["--max_steps", "2", "--disable_tqdm", "True"]
SMALL_MODEL = (
    '{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, '
    '"num_hidden_ngram_layers": 1}'
)
TATA_BOX = """\
A [ 16 352 3 354 268 360 222 ]
C [ 46 0 10 0 0 3 2 ]
G [ 18 2 2 5 0 20 44 ]
T [ 309 35 374 30 121 6 121 ]
"""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(line: str, folder: Path) -> str:
    """Run one line of the README, shortened, `base` replaced by a small configuration, `hostfile` by this machine."""
    words = line.split()
    if words[0] == "hf":
        download(words, folder)
        return ""
    if words[0] == "deepspeed":
        words = [*words, *(SHORT_FINETUNING if "dnazen/finetune.py" in words else SHORT)]
        words[1:1] = ["--master_port", str(free_port())]
        if "--hostfile" in words:  # this machine may have no ssh server
            words[1:1] = ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    if words[:2] == ["dnazen", "gue"]:
        words += ["--max-steps", "2", "--seeds", "1"]
    if words[0] == "torchrun":
        words[1:1] = ["--master_port", str(free_port())]
    words = ["small.json" if pair == ("--model", "base") else pair[1] for pair in zip(["", *words], words)]
    result = subprocess.run(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout[-5000:]}"
    return result.stdout


def download(words: list[str], folder: Path) -> None:
    """In place of a download: a small DNABERT-2 with random weights and the tokenizer that was trained above."""
    assert words == "hf download zhihan1996/DNABERT-2-117M --local-dir DNABERT-2-117M".split()
    tokenizer = load_tokenizer(folder / "my" / "tokenizer")
    write_dnabert2(folder / "DNABERT-2-117M", vocab_size=len(tokenizer), num_hidden_layers=6)
    save_tokenizer(tokenizer, folder / "DNABERT-2-117M")


@pytest.fixture
def folder(root, tmp_path):
    """What the commands find around them: the project's own folders and a genome."""
    for name in ("dnazen", "ds_configs"):
        os.symlink(root / name, tmp_path / name)
    shutil.copy(PACKAGED_GENOME, tmp_path / "my_genome.fa.gz")
    genome = next(read_fasta(PACKAGED_GENOME))
    (tmp_path / "sequences.fa").write_text(f">one\n{genome.sequence[:3000]}\n>two\nACGTNNTTGACATATAAT\n")
    (tmp_path / "tata_promoters.csv").write_text(f"sequence,label\n{genome.sequence[4000:4300]},1\n")
    (tmp_path / "variants.vcf").write_text(
        "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
        f"{genome.name}\t1000\t.\t{genome.sequence[999]}\tA,C,G,T\t.\t.\t.\n"
    )
    (tmp_path / "genomes.txt").write_text("my_genome.fa.gz\n")
    (tmp_path / "test.csv").write_text(f"sequence,label\n{'ACGT' * 20},0\n")
    for name in ("my_data", "GUE/prom/prom_core_tata", "GUE/mouse/2"):
        write_splits(tmp_path / name, motif_row)
    (tmp_path / "GUE" / "tf" / "0").mkdir(parents=True)
    shutil.copy(tmp_path / "test.csv", tmp_path / "GUE" / "tf" / "0" / "train.csv")
    (tmp_path / "JASPAR.txt").write_text(">MA0108.3 TBP\n" + TATA_BOX)
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    (tmp_path / "small.json").write_text(SMALL_MODEL)
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_readme_runs(root, folder):
    text = (root / "README.md").read_text()
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        if line.startswith("make "):
            recipe = subprocess.run(
                ["make", "-n", line.split()[1]], cwd=root, capture_output=True, text=True, check=True
            ).stdout
            main_job = "deepspeed dnazen/pretrain.py --deepspeed ds_configs/zero2.json\n"
            assert (main_job in recipe) == (line == "make pretrain")
            continue
        output = run(line, folder)
        if "dnazen/finetune.py" in line:
            assert "best on dev" in output
        elif line.startswith("deepspeed"):
            assert "previous token" in output and "loss curve" in output
    for name in ("final/model.safetensors", "final/ngram.json", "loss_curve.png", "report.json", "run.json"):
        assert (folder / "my" / "model" / name).is_file()
    assert (folder / "runs" / "my_genome" / "tiny" / "final").is_dir()
    assert (folder / "dnabert2" / "published" / "model.safetensors").is_file()
    for block in blocks(text, "python"):
        output = subprocess.run(
            [sys.executable, "-c", block], cwd=folder, env=environment(), capture_output=True, text=True
        )
        assert output.returncode == 0, output.stderr
        assert "torch.Size" in output.stdout


@pytest.mark.slow
def test_the_main_job_runs_with_no_other_argument(root, folder):
    """What `make pretrain` runs, cut short: the packaged genome, whole, on the tiny model."""
    output = run("deepspeed dnazen/pretrain.py --deepspeed ds_configs/zero2.json", folder)
    assert "4,938,920 bases" in output and "DNAZEN tiny: 1.5 M parameters, bf16" in output
    assert (folder / "runs" / "ecoli536_NC_008253" / "tiny" / "report.json").is_file()


def test_pictures_and_files_the_readme_shows_exist(root):
    text = (root / "README.md").read_text()
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (root / path).is_file(), path
    assert shutil.which("make")
