"""Packaging of DNAZEN: `dnazen/` as it is, `kernels/` and `ds_configs/` as `dnazen_kernels` and `dnazen_ds_configs`."""

from setuptools import find_packages, setup

# `transformers` probes for a package called `kernels`, so ours is installed under another name.
KERNELS = "dnazen_kernels"
DS_CONFIGS = "dnazen_ds_configs"
kernel_packages = [KERNELS] + [f"{KERNELS}.{name}" for name in find_packages("kernels")]

setup(
    name="dnazen",
    version="0.1.0",
    description="Pretraining and fine-tuning of DNAZEN, a DNA language model with G-grams",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["dnazen", "dnazen.*"]) + kernel_packages + [DS_CONFIGS],
    package_dir={KERNELS: "kernels", DS_CONFIGS: "ds_configs"},
    package_data={"dnazen.data": ["genomes/*.fna.gz"], DS_CONFIGS: ["*.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed>=0.19",
        "transformers>=5.14,<6",
        "tokenizers>=0.22",
        "numpy>=1.26",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "huggingface-hub>=1.5",
        "xopen>=2.0",
        "matplotlib>=3.8",
        "peft>=0.18",
        "pyarrow>=18",
        "h5py>=3.11",
        "pysam>=0.22",
        "biopython>=1.85",
        "psutil>=5.9",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "tqdm>=4.66",
        "typing-extensions>=4.10",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8"],
        "tensorboard": ["tensorboardX>=2.6"],
        "flash4": ["flash-attn-4>=4.0.0b36"],
        "flash4-cu13": ["flash-attn-4[cu13]>=4.0.0b36"],  # which CUDA PyTorch is built for, no requirement can ask
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-benchmark>=4",
            "hypothesis>=6.100",
            "vector-quantize-pytorch>=1.22",
            "ruff>=0.12",
            "mypy>=1.15",
        ],
    },
    entry_points={"console_scripts": ["dnazen = dnazen.cli.main:main"]},
)
