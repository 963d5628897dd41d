"""Inference on images that are no longer available, from the cached output of a vision block that never trains."""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from PIL import Image

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.data.batching import in_batches
from vkd_jax.data.images import PackedImages
from vkd_jax.evaluation.encoded_images import EncodedImages
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.models.base import bind
from vkd_jax.runtime import finite
from vkd_jax.runtime.mesh import replicated


class CachedAnswerer(Answerer):
    """An answerer that continues from cached features where it has them; see `Answerer`.

    Args:
        bundle: the model.
        hidden: the cached output of the vision block, [p, c] for each image, by the name of the image.
        block: the number of that block.
        batch_size: rows per batch.
    """

    def __init__(self, bundle: ModelBundle, hidden: Mapping[str, np.ndarray], block: int, *, batch_size: int = 32):
        super().__init__(bundle, batch_size=batch_size)
        self._hidden, self._block = hidden, block

    def encode_images(
        self, prompts: Sequence[bytes | Image.Image | Sequence[bytes | Image.Image]], names: Sequence[str] = ()
    ) -> EncodedImages:
        """Encodes the image of each prompt; one with a name of `hidden` only decides the number of tokens."""
        encoded = super().encode_images(prompts, names)
        cached = [i for i, name in enumerate(names) if name in self._hidden]
        if not cached:
            return encoded
        blanks = PackedImages.of([encoded.blank_images(i)[0] for i in cached], self.config)
        bundle, program = self.bundle, _program(self.mesh, self._block)
        tap = jax.eval_shape(
            lambda params, images: bind(bundle.graphdef, params).encode(images)[1][f"vision/{self._block}"].values,
            bundle.params,
            blanks[np.arange(1)],
        )
        hidden = fit_tokens([self._hidden[names[i]] for i in cached], tap.shape[1])
        features = in_batches(
            lambda batch: program(bundle.graphdef, bundle.params, *self._put(batch)), (blanks, hidden), self.batch_size
        )
        finite.check(features.values, "The model's features of cached images", finite.LARGEST_FEATURE)
        for i, values in zip(cached, features.values, strict=True):
            encoded.features.values[encoded.rows[i][0], : len(values)] = values
        return encoded


def fit_tokens(arrays: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Stacks arrays [p, c] as [n, length, c]: padding at the end of each is cut off, or added as zeros."""
    fitted = np.zeros((len(arrays), length, arrays[0].shape[1]), arrays[0].dtype)
    for row, array in zip(fitted, arrays, strict=True):
        row[: len(array)] = array[:length]
    return fitted


@functools.cache
def _program(mesh: jax.sharding.Mesh | None, block: int):
    """Jits the rest of the vision tower and the projector for a mesh."""

    def encode(graphdef, params, images, hidden):
        return bind(graphdef, params).encode(images, earlier={f"vision/{block}": hidden})[0]

    return jax.jit(encode, static_argnums=0, **({} if mesh is None else {"out_shardings": replicated(mesh)}))
