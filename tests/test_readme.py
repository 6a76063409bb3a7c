"""Every command and every line of Python in the README and the chapters of `docs` runs, in order, in a fresh folder."""

import ast
import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from dnazen.data.fasta import read_fasta
from dnazen.data.tokenizer import load_tokenizer, save_tokenizer
from dnazen.environment import free_port
from dnazen.pretraining.prepare import PACKAGED_GENOME
from tests.finetuning.conftest import motif_row, write_splits
from tests.helpers.launch import environment, killed_at_the_end, rank_environments, start
from tests.helpers.published import write_dnabert2
from tests.helpers.warm import WarmProgram
from tests.test_packaging import ARROWS

# a few steps are enough to see that a command runs; what a reader would wait for is measured elsewhere
SHORT = ["--max_steps", "2", "--eval_steps", "2", "--disable_tqdm", "True", "--max_batch_tokens", "1024"]
SHORT_FINETUNING = ["--max_steps", "2", "--disable_tqdm", "True"]
NUM_BASES = 300_000  # of the packaged genome, for a genome of one's own
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


# a block that no test can run has a comment above it, `<!-- not run: why -->`: page -> why, of each of them
NOT_RUN = {
    "pretraining.md": ["downloads a package for GPUs"],
    "CONTRIBUTING.md": ["the tests would run themselves"],
}


class Block(NamedTuple):
    """A block of code in a page."""

    reason: str  # why it is not run, if it is not
    language: str
    text: str


def blocks(text: str) -> list[Block]:
    pattern = r"(?:^<!-- not run: ([^>]+) -->\n)?^```(\w+)\n(.*?)^```"
    found = [Block(*block) for block in re.findall(pattern, text, flags=re.MULTILINE | re.DOTALL)]
    assert text.count("```") == 2 * len(found)  # none is written so that it would be passed over
    return found


def pages(root: Path) -> list[Path]:
    """The README, the chapters in the order of the site, and how to contribute."""
    listed = yaml.safe_load((root / "mkdocs.yml").read_text())["nav"]
    names = []
    while listed:
        ((_, entry),) = listed.pop(0).items()
        listed = entry + listed if isinstance(entry, list) else listed
        names += [entry] if isinstance(entry, str) else []
    return [root / "README.md", *(root / "docs" / name for name in names), root / "CONTRIBUTING.md"]


def run(line: str, folder: Path, in_full: bool = False) -> str:
    """Run one line of a page, shortened, `base` replaced by a small configuration, `hostfile` by this machine.

    DeepSpeed's launcher, and the packaged genome in place of its beginning, are taken if that is asked for; the
    launcher also if the line has flags for it.
    """
    words = line.split()
    if words[0] == "hf":
        download(words, folder)
        return ""
    if words[:2] == ["dnazen", "gue"]:
        words += ["--max-steps", "2", "--seeds", "1"]
    if words[:2] == ["dnazen", "bench"]:
        words += ["--seconds", "0.5"]
    if words[:2] == ["deepspeed", "dnazen/pretrain.py"] and not {"--fasta", "--corpus"} & set(words) and not in_full:
        words += ["--fasta", "my_genome.fa.gz"]
    if words[0] == "deepspeed":
        words = [*words, *(SHORT_FINETUNING if "dnazen/finetune.py" in words else SHORT)]
    words = ["small.json" if pair == ("--model", "base") else pair[1] for pair in zip(["", *words], words)]
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    if words[0] == "dnazen":
        program = WarmProgram(words, [environment()], output, folder)
    elif words[0] == "deepspeed" and words[1].endswith(".py") and not in_full:
        program = WarmProgram(words[1:], rank_environments(1, free_port()), output, folder)
    else:
        words[1:1] = ["--master_port", str(free_port())]
        if "--hostfile" in words:  # this machine may have no ssh server
            words[1:1] = ["--no_ssh_check", "--master_addr", "127.0.0.1"]
        program = start(words, output, folder)
    return finish(program, output, " ".join(words))


def finish(program: WarmProgram | subprocess.Popen, output: Path, line: str) -> str:
    """What a program printed, at its end, which must be a good one."""
    with killed_at_the_end(program):
        status = program.wait(600)
    text = output.read_text()
    assert status == 0, f"{line}\n{text[-5000:]}"
    return text


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
    genome = next(read_fasta(PACKAGED_GENOME))
    part = f">{genome.name}\n{genome.sequence[:NUM_BASES]}\n"
    (tmp_path / "my_genome.fa.gz").write_bytes(gzip.compress(part.encode()))
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
@pytest.mark.longest
def test_every_command_and_line_of_python_runs(root, folder):
    """The README, then the chapters in their order, in one folder; what two pages have in common runs once."""
    done, not_run = set(), {}
    for page in pages(root):
        for block in blocks(page.read_text()):
            if block.reason:
                not_run.setdefault(page.name, []).append(block.reason)
            elif block.language == "python" and block.text not in done:
                assert "torch.Size" in run_python(block.text, folder)
            elif block.language == "bash":
                for line in block.text.splitlines():
                    if line not in done:
                        check(line, root, folder)
                    done.add(line)
            done.add(block.text)
    assert not_run == NOT_RUN
    assert len(done) >= 40
    for name in ("final/model.safetensors", "final/ngram.json", "loss_curve.png", "report.json", "run.json"):
        assert (folder / "my" / "model" / name).is_file()
    assert (folder / "runs" / "my_genome" / "tiny" / "final").is_dir()
    assert (folder / "dnabert2" / "published" / "model.safetensors").is_file()


def check(line: str, root: Path, folder: Path) -> None:
    """Run a line and look for what it must print; of `make`, only that the target is there and what it would do."""
    if line.startswith("make "):
        recipe = subprocess.run(["make", "-n", line.split()[1]], cwd=root, capture_output=True, text=True, check=True)
        main_job = "deepspeed dnazen/pretrain.py --deepspeed ds_configs/zero2.json\n"
        assert (main_job in recipe.stdout) == (line == "make pretrain")
        return
    output = run(line, folder)
    if "dnazen/finetune.py" in line:
        assert "best on dev" in output
    elif line.startswith("deepspeed"):
        assert "previous token" in output and "loss curve" in output


def run_python(text: str, folder: Path) -> str:
    script, output = folder / "page.py", folder / "output.txt"
    script.write_text(text)
    output.unlink(missing_ok=True)
    return finish(WarmProgram([script], [environment()], output, folder), output, text)


@pytest.mark.slow
@pytest.mark.longest
def test_the_main_job_runs_with_no_other_argument(root, folder):
    """What `make pretrain` runs, cut short: the packaged genome, whole, on the tiny model."""
    main_job = "deepspeed dnazen/pretrain.py --deepspeed ds_configs/zero2.json"
    output = run(main_job, folder, in_full=True)
    assert "4,938,920 bases" in output and "DNAZEN tiny: 1.5 M parameters, bf16" in output
    assert (folder / "runs" / "ecoli536_NC_008253" / "tiny" / "report.json").is_file()


def test_the_readme_is_short(root):
    assert len((root / "README.md").read_text().splitlines()) <= 150


def test_links_and_pictures_lead_somewhere(root):
    """Relative ones, on all pages of the project, with their anchors."""
    others = ("CHANGELOG.md", "benchmarks/README.md", "benchmarks/learning.md", "kernels/README.md")
    for page in (*pages(root), *(root / name for name in others)):
        text = page.read_text()
        targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
        for target in targets:
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.is_file(), f"{page.name}: {target}"
            if anchor and linked.suffix == ".md":
                assert anchor in anchors(linked.read_text()), f"{page.name}: {target}"
    assert shutil.which("make")


def anchors(text: str) -> set[str]:
    """What the headings of a page can be linked by."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_the_map_of_the_rooms_is_the_one_that_imports_are_held_to(root):
    """What each room rests on, over any number of arrows, is the same drawn as in `ARROWS`."""

    def reach(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
        reached = {}
        for name, below in arrows.items():  # from the lowest up
            reached[name] = below.union(*(reached[other] for other in below))
        return reached

    block = blocks((root / "docs" / "architecture.md").read_text())[0]
    drawn = {line.split()[0]: set() for line in block.text.splitlines()}
    for name, below in re.findall(r"^(\w+) +<- ([\w, ]+?)  ", block.text, flags=re.MULTILINE):
        drawn[name] |= set(below.split(", "))
    assert drawn.pop("cli") == {"all"} and ARROWS["dnazen.cli"] is None
    held = {
        re.sub(r"^dnazen[._]", "", name): set(re.findall(r"dnazen[._](\w+)", below))
        for name, below in ARROWS.items()
        if below is not None and name != "dnazen"
    }
    assert reach(drawn) == reach(held)


def test_the_messages_of_the_chapter_on_trouble_are_in_the_code(root):
    """Each message, where `...` is not; one that was reworded must be reworded there too."""
    strings = {
        node.value
        for folder in ("dnazen", "kernels")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    messages = re.findall(r"^\| `([^`]+)`", (root / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(messages) >= 25
    for message in messages:
        for part in filter(None, map(str.strip, message.split("\u2026"))):
            assert any(part in text for text in strings), f"{message}: {part}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(root, tmp_path):
    pytest.importorskip("mkdocs", reason="needs mkdocs-material, which the extra `docs` installs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    result = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    chapters = [page for page in pages(root) if page.parent.name == "docs"]
    assert sorted(page.name for page in chapters) == sorted(path.name for path in (root / "docs").glob("*.md"))
    assert (tmp_path / "site" / "search" / "search_index.json").is_file()
