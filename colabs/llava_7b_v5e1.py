# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Unlearning people from LLaVA-1.5-7B on one TPU chip
#
# A v5e-1, the TPU of hosted notebooks, has one chip with 16 GB of memory. That suffices for visual unlearning of a
# model with seven billion parameters, because its language model is frozen and quantized to four bits.
#
# Select a TPU runtime first (in Colab: Runtime, Change runtime type, v5e-1 TPU). The original and the unlearned model
# need 45 GB of disk space. This notebook was not verified on a TPU; the TPU compiler determined its memory use.

# %% [markdown]
# ## Install
#
# Set `REPOSITORY` to the URL of a clone of this repository. The memory was determined with the pinned versions. If
# Colab asks to restart the runtime, do so and continue with the next cell.

# %%
REPOSITORY = ""  # @param {type:"string"}
# !git clone --quiet --depth 1 {REPOSITORY} vkd_jax
# %cd vkd_jax
# !pip install --quiet --constraint colabs/pinned.txt '.[tpu]'

# %% [markdown]
# ## Check the TPU
#
# This prints one `TpuDevice`; a `CpuDevice` means that the runtime has no TPU. It runs in a separate process, because
# only one process at a time can use the TPU.

# %%
# !python -c "import jax; print(jax.devices())"

# %% [markdown]
# ## Model and data
#
# `MODEL` is a model that knows the people to forget: a folder, or an id on the Hugging Face hub. The published LLaVA
# below knows some public figures but not the people of a benchmark, which require a model fine-tuned on them.
#
# `FORGET` and `RETAIN` are two folders of images and questions, of the people to forget and the people to retain, as
# described in `docs/your_own_data.md`. Upload them or mount your Drive, and set the paths.

# %%
MODEL = "llava-hf/llava-1.5-7b-hf"  # @param {type:"string"}
FORGET = "/content/request/forget"  # @param {type:"string"}
RETAIN = "/content/request/retain"  # @param {type:"string"}
WORKDIR = "/content/llava-7b"  # @param {type:"string"}

# %% [markdown]
# ## Check the memory (optional)
#
# The planner compiles the training step on the CPU, without using the TPU, and prints the memory that it needs; see the
# line `fits`. It takes some minutes.

# %%
# !python -m vkd_jax.plan --config configs/llava.py:7b,onechip --topology v5e:1x1 --nocompare

# %% [markdown]
# ## Download the model
#
# This downloads 14 GB from the hub into its cache on this machine, once. A model that is not public requires
# `hf auth login` first.

# %%
# !python -c "from vkd_jax.runtime import hub; print(hub.fetch_model('{MODEL}'))"

# %% [markdown]
# ## Unlearn
#
# This evaluates the model, unlearns, evaluates the unlearned model, and writes all outputs to `WORKDIR`. To resume an
# interrupted run, run the cell again.

# %%
# !python -m vkd_jax.main --config configs/llava.py:7b,folder,onechip --workdir {WORKDIR} \
#     --config.model.path={MODEL} --config.data.forget={FORGET} --config.data.retain={RETAIN} \
#     --config.eval.max_items=100

# %% [markdown]
# ## Report
#
# The report shows what was forgotten and retained. Its portraits are images from your folders.

# %%
from pathlib import Path

from IPython.display import Image, Markdown, display

if (Path(WORKDIR) / "report.md").is_file():
    display(Markdown((Path(WORKDIR) / "report.md").read_text(encoding="utf-8")))
    for name in ("portraits", "forget_retain"):
        if (figure := Path(WORKDIR) / "report" / f"{name}.png").is_file():
            display(Image(figure))

# %% [markdown]
# ## Ask both models
#
# The first answer is from the original model, the second from the unlearned model. Each command loads a model, which
# takes a minute or two. Try other images and questions.

# %%
QUESTION = "Who is this person?"  # @param {type:"string"}
IMAGE = next(iter(sorted(Path(WORKDIR).glob("portraits/*"))), Path(FORGET))
# !python -m vkd_jax.ask --model {MODEL} --image {IMAGE} --question "{QUESTION}"
# !python -m vkd_jax.ask --model {WORKDIR}/unlearned --image {IMAGE} --question "{QUESTION}"

# %% [markdown]
# ## Save the outputs
#
# The disk is deleted with the runtime. The first cell copies the report and all answers to your Drive. The second cell
# uploads the model (14 GB) to a private repository on the Hugging Face hub, after `hf auth login`; set `REPO` to its
# name, such as `you/llava-unlearned`.

# %%
REPO = ""  # @param {type:"string"}
if Path("/content").is_dir():
    from google.colab import drive

    drive.mount("/content/drive")
# !mkdir -p /content/drive/MyDrive/vkd
# !cd {WORKDIR} && cp -r report.md report portraits results.json answers /content/drive/MyDrive/vkd

# %%
# !test -z "{REPO}" || hf upload "{REPO}" {WORKDIR}/unlearned --private
