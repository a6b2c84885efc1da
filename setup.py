"""Distribution metadata: packages, what they need, and the data files that travel in the wheel."""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIRES = [
    "torch>=2.11",
    "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
    "triton-windows>=3.6; platform_system == 'Windows'",
    "accelerate>=1.10",
    "diffusers>=0.42.1",
    "transformers>=5.17",
    "safetensors>=0.5",
    "filelock>=3.16",
    "numpy>=2.0",
    "pillow>=11.0",
    "pyyaml>=6.0",
    "tqdm>=4.66",
]

EXTRAS = {
    # Both pull torchvision in, which must match the installed torch: never part of the default set-up.
    "masks": ["segment-anything>=1.0", "groundingdino-py>=0.4.0"],
    # The log of a training (`log_dir`); rendering the drawings of the embedded model's world.
    "train": ["tensorboard>=2.20", "resvg-py>=0.5"],
    "xformers": ["xformers"],
    # Named so that instructions stay the same; neither needs more than the base packages so far.
    "bench": [],
    "eval": [],
    "test": [
        "hypothesis>=6.100",
        "peft>=0.17",
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "setuptools>=77",
        "tensorboard>=2.20",
    ],
}

PACKAGE_DATA = {
    "weaver_kernels": ["configs/*.json", "*.md"],
    "weaver": ["jobs/*.yaml"],
    "weaver.evaluation": ["chosen.json"],
    "weaver.embedded": ["**/*.safetensors", "**/*.json", "**/*.jsonl", "**/*.txt", "**/*.png", "**/*.md", "**/*.csv"],
}

setup(
    name="concept-weaver",
    version=run_path(str(HERE / "weaver" / "version.py"))["__version__"],
    description="Several personalised concepts in one picture, each in its place: Concept Weaver on Stable Diffusion",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["weaver", "weaver.*", "weaver_kernels", "weaver_kernels.*"]),
    package_data=PACKAGE_DATA,
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["weaver = weaver.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
