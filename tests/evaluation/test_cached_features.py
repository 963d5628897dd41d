"""Questions about images that are gone, answered from the cached output of a vision block."""

import numpy as np
import pytest

from vkd_jax.evaluation.cached_features import CachedAnswerer, fit_tokens
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.methods import feature_targets
from vkd_jax.runs.features import _blank


@pytest.fixture(scope="module")
def images(tiny_sets):
    """Three images as they were and as black ones, by name."""
    found = {e.image_id: e.image for e in tiny_sets["retain"].examples}
    names = list(found)[:3]
    return names, [found[name] for name in names], [_blank(i, 48, 48) for i in range(3)]


def test_cached_features_stand_for_the_image(tiny_model, tiny_sets, images):
    names, files, blanks = images
    encoded = tiny_model.encode(list({e.image_id: e for e in tiny_sets["retain"].examples}.values()))
    taps = feature_targets.record_taps(tiny_model.graphdef, tiny_model.params, encoded.images, ["vision/0"])
    hidden = dict(zip([e.image_id for e in encoded.examples], taps["vision/0"].values, strict=True))
    cached = {name: np.pad(hidden[name], ((0, i), (0, 0))) for i, name in enumerate(names[:2])}
    answerer = CachedAnswerer(tiny_model, cached, 0, batch_size=2)
    expected = Answerer(tiny_model, batch_size=2).encode_images(files, names)
    features = answerer.encode_images([*blanks[:2], files[2]], names)
    np.testing.assert_allclose(features.features.values, expected.features.values, rtol=1e-5, atol=1e-6)
    assert features.rows == expected.rows and features.shapes == expected.shapes
    blank = answerer.encode_images(blanks, ["x", "y", "z"]).features.values  # without cached features
    assert abs(blank - expected.features.values).max() > 1e-3


def test_tokens_are_padded_or_cut_at_the_end():
    arrays = [np.ones((2, 3)), np.full((4, 3), 2.0)]
    fitted = fit_tokens(arrays, 3)
    assert fitted.shape == (2, 3, 3)
    np.testing.assert_array_equal(fitted[:, :, 0], [[1, 1, 0], [2, 2, 2]])
