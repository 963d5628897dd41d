"""Weights on disk: reading Hugging Face safetensors, exporting them, and Orbax training checkpoints."""
