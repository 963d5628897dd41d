"""Weights on disk: Hugging Face safetensors in both directions, and Orbax training checkpoints.

What is in it
- `bundle`: `ModelBundle`, the one way to open a model. `ModelBundle.prepare_for` is the one place that attaches LoRA.
- `hf`: matches the tensors of a model folder with the parameters of a model, and loads them.
- `sources`: models by name, with `adapters`, PEFT's, or other visual weights merged into them.
- `export`: writes model folders, and `peft` adapters. `new_model` creates one with random weights.
- `certificate`: digests of an exported model, which can be signed. `push` uploads it.
- `manifest`: compares two model folders tensor by tensor.
- `safetensors_files`: reads and writes safetensors files in pieces.
- `orbax_checkpoints`: checkpoints of a training state.

Contract: every tensor of a model folder matches exactly one row of its family's conversion table, and every parameter
is filled. An export keeps the names, dtypes and shards of its source, and the bytes of every tensor that did not
change.

To add a family, give its module in `models` the conversion attributes that `vkd_jax.models` lists; nothing here
changes.
"""
