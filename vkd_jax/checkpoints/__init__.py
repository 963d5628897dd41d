"""Weights on disk: Hugging Face safetensors in both directions, and Orbax training checkpoints.

- `bundle`: `ModelBundle`, the one way to open a model; LoRA is attached in `ModelBundle.prepare_for`.
- `hf`: matches the tensors of a model folder with a model's parameters, and loads them.
- `export`: writes model folders; `new_model` makes one with random weights.
- `manifest`: compares two model folders tensor by tensor.
- `safetensors_files`: reads and writes safetensors files in pieces.
- `orbax_checkpoints`: checkpoints of a training state.
"""
