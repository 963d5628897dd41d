"""Compares two model folders tensor by tensor."""

from typing import Any

from vkd_jax.checkpoints.safetensors_files import Checkpoint, Folder


def compare_tensors(before: Folder, after: Folder) -> dict[str, Any]:
    """Computes the SHA-256 of each tensor's bytes in two model folders, and the names of the tensors that differ.

    Returns:
        {"tensors": {name: {"before": digest, "after": digest, "changed": bool}}, "changed": [names]}; a
        digest is None if that folder has no such tensor.
    """
    first, second = Checkpoint(before).tensors, Checkpoint(after).tensors
    tensors = {}
    for name in sorted(first.keys() | second.keys()):
        old, new = (side[name].sha256() if name in side else None for side in (first, second))
        tensors[name] = {"before": old, "after": new, "changed": old != new}
    return {"tensors": tensors, "changed": [name for name, entry in tensors.items() if entry["changed"]]}
