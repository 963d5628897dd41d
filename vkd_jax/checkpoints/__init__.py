"""Weights on disk: Hugging Face safetensors in both directions, and Orbax training checkpoints.

- `safetensors_files`: reads and writes safetensors files in pieces.
- `hf`: matches the tensors of a model folder with a model's parameters, and loads them.
- `export`: writes model folders.
- `manifest`: compares two model folders tensor by tensor.
- `orbax_checkpoints`: checkpoints of a training state.
"""
