# ---
# jupyter:
#   accelerator: none
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Unlearning people from SmolVLM-256M on a laptop
#
# SmolVLM-256M has 256 million parameters: half a gigabyte of weights on the hub. This notebook makes it forget people
# whose images you have, on a CPU, and shows the report.
#
# It downloads the model from the Hugging Face hub. It was compiled, and its commands were checked, but it was not run
# with the published weights; the same steps run with a tiny model in `demo.ipynb`.

# %% [markdown]
# ## Install
#
# In Colab, set `REPOSITORY` to the URL of a clone of this repository, and restart the runtime if Colab asks for it.
# Elsewhere, leave it empty and install the package.

# %%
REPOSITORY = ""  # @param {type:"string"}
if REPOSITORY:
    # !git clone --quiet --depth 1 {REPOSITORY} vkd_jax
    # %cd vkd_jax
    # !pip install --quiet --constraint colabs/pinned.txt .
    print("installed")

# %% [markdown]
# ## Model and data
#
# `MODEL` is a model that knows the people to forget: a folder, or an id on the Hugging Face hub. The published model
# knows no private people; it knows some public figures.
#
# `FORGET` and `RETAIN` are two folders of images and questions, as described in `docs/your_own_data.md`.

# %%
MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"  # @param {type:"string"}
FORGET = "request/forget"  # @param {type:"string"}
RETAIN = "request/retain"  # @param {type:"string"}
WORKDIR = "smolvlm-256m"  # @param {type:"string"}

# %% [markdown]
# ## Check first
#
# A dry run reads the model and the data, makes all checks of the run, and prints the number of questions and the memory
# of a training step. Images are resized to at most 512 x 512 pixels, so that a laptop suffices.

# %%
# !python -m vkd_jax.main --config configs/smolvlm.py:256m,folder --workdir {WORKDIR} --dry_run \
#     --config.model.path={MODEL} --config.data.forget={FORGET} --config.data.retain={RETAIN} \
#     --config.model.max_pixels=262144 --config.train.steps=100 --config.eval.max_items=50 \
#     --config.train.batch_size.forget=2 --config.train.batch_size.retain=2

# %% [markdown]
# ## Unlearn
#
# This evaluates the model, unlearns, evaluates the unlearned model, and writes all outputs to `WORKDIR`. To resume an
# interrupted run, run the cell again.

# %%
# !python -m vkd_jax.main --config configs/smolvlm.py:256m,folder --workdir {WORKDIR} \
#     --config.model.path={MODEL} --config.data.forget={FORGET} --config.data.retain={RETAIN} \
#     --config.model.max_pixels=262144 --config.train.steps=100 --config.eval.max_items=50 \
#     --config.train.batch_size.forget=2 --config.train.batch_size.retain=2

# %% [markdown]
# ## Report
#
# The page lists every question with its image and the answers of both models. Search it, and filter it.

# %%
from pathlib import Path

from IPython.display import IFrame, display

if (Path(WORKDIR) / "report.html").is_file():
    display(IFrame(f"{WORKDIR}/report.html", width="100%", height=900))

# %% [markdown]
# ## Ask both models
#
# The first answer is from the original model, the second from the unlearned model. Try other images and questions.

# %%
QUESTION = "Who is this person?"  # @param {type:"string"}
IMAGE = next(iter(sorted(Path(WORKDIR).glob("portraits/*"))), Path(FORGET))
# !python -m vkd_jax.ask --model {MODEL} --image {IMAGE} --question "{QUESTION}"
# !python -m vkd_jax.ask --model {WORKDIR}/unlearned --image {IMAGE} --question "{QUESTION}"

# %% [markdown]
# ## Pass it on
#
# `unlearned/` loads with transformers. The command checks it against its certificate, and writes that as one page.

# %%
# !python -m vkd_jax.verify {WORKDIR}/unlearned --pdf {WORKDIR}/certificate.pdf
