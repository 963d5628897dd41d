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
# # LLaVA-1.5-7B forgets a person on one TPU chip
#
# A v5e-1, the TPU of hosted notebooks, has one chip with 16 GB of memory. That is enough to make a model of seven
# billion parameters forget what it can see, because its language model is held in four bits and does not train.
#
# Choose a TPU runtime first (in Colab: Runtime, Change runtime type, v5e-1 TPU). The disk needs 45 GB for the model as
# it comes and as it leaves. No TPU was at hand when this was written: the memory is what the TPU's own compiler says.

# %% [markdown]
# ## Install
#
# Put in where a clone of this repository can be had; the versions are those that the planner was run with. If Colab
# asks to restart the runtime, do so and go on with the next cell.

# %%
REPOSITORY = ""  # @param {type:"string"}
# !git clone --quiet --depth 1 {REPOSITORY} vkd_jax
# %cd vkd_jax
# !pip install --quiet --constraint colabs/pinned.txt '.[tpu]'

# %% [markdown]
# ## Is there a TPU?
#
# This shall print one `TpuDevice`; a `CpuDevice` means that the runtime has none. It is asked in a process of its own,
# since a TPU serves one process at a time and this notebook must not keep it.

# %%
# !python -c "import jax; print(jax.devices())"

# %% [markdown]
# ## What shall be forgotten
#
# `MODEL` is a model that knows the people: a folder, or an id on the Hugging Face hub. The published LLaVA below knows
# some public figures and nobody of a benchmark, so a benchmark's people take a model that was fine-tuned on them.
#
# `FORGET` and `RETAIN` are two folders of pictures with questions, as `docs/your_own_data.md` describes them: who shall
# be forgotten, and who shall not. Upload them, or let them lie in your Drive, and put in where they are.

# %%
MODEL = "llava-hf/llava-1.5-7b-hf"  # @param {type:"string"}
FORGET = "/content/request/forget"  # @param {type:"string"}
RETAIN = "/content/request/retain"  # @param {type:"string"}
WORKDIR = "/content/llava-7b"  # @param {type:"string"}

# %% [markdown]
# ## Does it fit?
#
# The planner compiles the very step that will run, on the CPU and without touching the TPU, and says what it takes.
# Look at the line `fits`; it takes some minutes, and you may skip it.

# %%
# !python -m vkd_jax.plan --config configs/llava.py:7b,onechip --topology v5e:1x1 --nocompare

# %% [markdown]
# ## Fetch the model
#
# This loads 14 GB from the hub into its cache on this machine, and nothing twice. A model that is not public needs `hf
# auth login` before.

# %%
# !python -c "from vkd_jax.runtime import hub; print(hub.fetch_model('{MODEL}'))"

# %% [markdown]
# ## Unlearn
#
# It measures the model, makes it forget, measures it again, and writes everything into `WORKDIR`. If it is stopped, run
# the same cell again: it goes on where it stood.

# %%
# !python -m vkd_jax.main --config configs/llava.py:7b,folder,onechip --workdir {WORKDIR} \
#     --config.model.path={MODEL} --config.data.forget={FORGET} --config.data.retain={RETAIN} \
#     --config.eval.max_items=100

# %% [markdown]
# ## The report
#
# What was forgotten, what was kept, and how we know. The pictures in it are those of the people themselves.

# %%
from pathlib import Path

from IPython.display import Image, Markdown, display

if (Path(WORKDIR) / "report.md").is_file():
    display(Markdown((Path(WORKDIR) / "report.md").read_text(encoding="utf-8")))
    for name in ("portraits", "forget_retain"):
        if (picture := Path(WORKDIR) / "report" / f"{name}.png").is_file():
            display(Image(picture))

# %% [markdown]
# ## Ask with your own eyes
#
# The first answer is from the model before, the second from the one after. Put in another picture or question, as often
# as you like; each asking loads a model, which takes a minute or two.

# %%
QUESTION = "Who is this person?"  # @param {type:"string"}
PICTURE = next(iter(sorted(Path(WORKDIR).glob("portraits/*"))), Path(FORGET))
# !python -m vkd_jax.ask --model {MODEL} --image {PICTURE} --question "{QUESTION}"
# !python -m vkd_jax.ask --model {WORKDIR}/unlearned --image {PICTURE} --question "{QUESTION}"

# %% [markdown]
# ## Keep it
#
# The runtime's disk vanishes with it. The report and every answer are small and go into your Drive; the model is 14 GB,
# so put in a name on the hub, `you/llava-without-them`, and it is pushed there (after `hf auth login`), private.

# %%
REPO = ""  # @param {type:"string"}
if Path("/content").is_dir():
    from google.colab import drive

    drive.mount("/content/drive")
# !mkdir -p /content/drive/MyDrive/vkd
# !cd {WORKDIR} && cp -r report.md report portraits results.json answers /content/drive/MyDrive/vkd

# %%
# !test -z "{REPO}" || hf upload "{REPO}" {WORKDIR}/unlearned --private
