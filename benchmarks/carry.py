"""Everything a bare machine with a GPU needs, in files of a bounded size: the project, packages and prepared data.

    python -m benchmarks.carry --output-dir DIR [--part-mb 60]

For Python 3.12 on Linux x86-64, with PyTorch, Triton, transformers and their kin there already, but no network. Writes
two archives, cut into parts: `base` (the commit that is checked out, DeepSpeed and small packages, data and predictions
for `benchmarks.gpu`) and `flash4` (FlashAttention-4); and `unpack.py`, which is to be run there beside the parts, all
at once or as they come:

    python3 unpack.py TARGET_DIR

It checks the parts against their SHA-256, joins and unpacks each archive that is whole, and installs it.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.gpu import Sitting, installed
from benchmarks.yeast import ROOT, call, commit, is_changed
from dnazen.files import sha256_file, write_json

PACKAGES = {
    "base": (
        "hjson", "py-cpuinfo", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "xopen", "isal",
        "zlib-ng", "pysam", "biopython",
    ),
    "flash4": (
        "flash-attn-4>=4.0.0b36", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-core",
        "nvidia-cutlass-dsl-libs-cu13", "apache-tvm-ffi", "quack-kernels", "torch-c-dlpack-ext",
    ),
}  # fmt: skip
GLIBC = (17, 24, 27, 28, 31, 34)  # versions 2.x that wheels ask for and such a machine has
UNPACK = '''\
"""Join, check, unpack and install what lies beside this file: python3 unpack.py TARGET_DIR"""

import hashlib
import io
import json
import pathlib
import subprocess
import sys
import tarfile

here, target = pathlib.Path(__file__).resolve().parent, pathlib.Path(sys.argv[1]).resolve()
pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
for name, parts in json.loads((here / "parts.json").read_text()).items():
    missing = [part for part in parts if not (here / part).exists()]
    if missing:
        print(f"{name}: waiting for {', '.join(missing)}")
        continue
    contents = [(here / part).read_bytes() for part in parts]
    for (part, expected), content in zip(parts.items(), contents):
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            sys.exit(f"{part}: expected SHA-256 {expected}, found {found}; bring it again")
    with tarfile.open(fileobj=io.BytesIO(b"".join(contents))) as tar:
        tar.extractall(target, filter="data")
    wheels = sorted(map(str, (target / "wheels" / name).glob("*.whl")))
    if wheels:
        subprocess.run([*pip, *wheels], check=True)
    if name == "base" and (target / "dnazen").exists():
        subprocess.run([*pip, "-e", str(target / "dnazen")], check=True)
    print(f"{name}: unpacked to {target}, {len(wheels)} packages installed")
'''


def split(archive: Path, folder: Path, most: int) -> dict[str, str]:
    """Cut a file into parts of at most `most` bytes in `folder`; their names, in order, and SHA-256."""
    parts = {}
    with archive.open("rb") as file:
        while content := file.read(most):
            part = folder / f"{archive.name}.{len(parts):02}"
            part.write_bytes(content)
            parts[part.name] = sha256_file(part)
    return parts


def pack(folder: Path, output_dir: Path, most: int) -> None:
    """Archive each folder in `folder`, without naming it, and write the parts, `parts.json` and `unpack.py`."""
    found = {}
    for content in sorted(folder.iterdir()):
        archive = folder / f"{content.name}.tar"
        with tarfile.open(archive, "w") as tar:
            for item in sorted(content.iterdir()):
                tar.add(item, item.name)
        found[content.name] = split(archive, output_dir, most)
        archive.unlink()
    write_json(output_dir / "parts.json", found)
    (output_dir / "unpack.py").write_text(UNPACK)


def prepare_base(folder: Path) -> None:
    """The project as committed, DeepSpeed, packed from its source, and what the first steps of a sitting make."""
    project = folder / "dnazen"
    project.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(project)], input=archive, check=True)
    (project / "COMMIT").write_text(commit() + "\n")
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    call(*wheel, "-w", folder / "wheels" / "base", f"deepspeed=={installed('deepspeed')}")
    with tempfile.TemporaryDirectory() as scratch:
        sitting = Sitting(Path(scratch), folder / "data", dry=False)
        sitting.steps = [step for step in sitting.steps if step.figures == "made"]
        if not sitting.run(60):
            sys.exit("the data could not be prepared; see above")


def download(packages: tuple[str, ...], folder: Path) -> None:
    """Wheels for that machine, in the versions that are installed here, or else the newest."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "any"]
    target = ["--python-version", "3.12", "--implementation", "cp"]
    target += [word for name in platforms for word in ("--platform", name)]
    target += [word for name in ("cp312", "abi3", "none") for word in ("--abi", name)]
    wanted = [f"{name}=={installed(name)}" if installed(name) else name for name in packages]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", *target]
    call(*pip, "-d", folder, *wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="must not exist yet")
    parser.add_argument("--part-mb", type=float, default=60, help="of one part at most (%(default)s)")
    args = parser.parse_args()
    if is_changed():
        parser.error("files of this checkout differ from its commit, which is what would be packed: commit them first")
    args.output_dir.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, packages in PACKAGES.items():
            download(packages, Path(scratch) / name / "wheels" / name)
        prepare_base(Path(scratch) / "base")
        pack(Path(scratch), args.output_dir, int(args.part_mb * 1e6))
    for path in sorted(args.output_dir.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path.name}")


if __name__ == "__main__":
    main()
