"""Operations of a step: by hand, and as JAX traces them."""

import jax
import jax.numpy as jnp
import pytest
from planned import draw

from vkd_jax import plan
from vkd_jax.planner import arithmetic

# The tiny language model: products of a block for sixteen tokens, and of the last one, where nothing is computed
# again: keys and values for sixteen, the rest for the five that answer.
BLOCK = 2 * 16 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40)
LAST = 2 * 16 * (2 * 24 * 12) + 2 * 5 * (2 * 24 * 24 + 3 * 24 * 40)


def test_operations_of_a_tiny_llava_by_hand(config):
    """Five patch slots (a class token and 2 x 2), four image tokens, sixteen tokens, five of them answer."""
    found = plan.flops(draw(config))
    rows = 5
    block = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 5 * 5 * 16
    patches = 2 * 4 * (8 * 8 * 3 * 16)
    assert found["vision_tower"].forward == rows * (patches + 3 * block)  # the fourth block feeds nothing
    projector = 2 * 4 * (16 * 24 + 24 * 24)
    assert found["projector"].forward == found["projector"].weights == rows * projector
    attention = 4 * 16 * 16 * 24 + 4 * 5 * 16 * 24
    assert found["language_model"].forward == rows * (BLOCK + LAST + attention)
    assert found["language_model"].weights == 0  # frozen
    assert found["language_model"].backward == rows * (BLOCK + LAST + 2 * attention)
    assert found["head"].forward == rows * 2 * 5 * 24 * 400 and found["head"].weights == 0


@pytest.mark.parametrize("remat", ["", "dots", "full"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vkd", {}),
        ("vkd", dict(blocks=1)),
        ("vkd", dict(blocks=0)),
        ("grad_diff", dict(train="all")),
        ("grad_diff", dict(train="lora", lora_rank=2)),
        ("kl", dict(train="visual")),
        ("rmu", {}),
    ],
)
def test_operations_are_those_that_jax_traces(config, name, fields, remat):
    config.model.remat = remat
    drawn = draw(config, name, **fields)
    counted = sum(part.total for part in plan.flops(drawn).values())
    traced = arithmetic.traced(drawn.step, *drawn.inputs)
    assert counted == pytest.approx(traced, rel=0.02)


@pytest.mark.parametrize("remat", ["", "dots", "full"])
@pytest.mark.parametrize("fields", [dict(train="visual"), dict(train="all")])
def test_operations_of_qwen_are_those_that_jax_traces(get_config, qwen_folder, fields, remat):
    config = get_config("qwen2_vl.py")
    config.model.update(
        path=str(qwen_folder("qwen2_vl")), base="", remat=remat, dtype="float32", quantize="", max_pixels=56 * 56
    )
    config.train.batch_size.update(forget=2, retain=2)
    drawn = draw(config, "grad_diff", whole=True, **fields)
    counted = sum(part.total for part in plan.flops(drawn).values())
    assert counted == pytest.approx(arithmetic.traced(drawn.step, *drawn.inputs), rel=0.02)


def test_products_of_integers_by_hand(config):
    """Those of the blocks, forward and back, and where all is computed again but for the last one of the MLP."""
    for remat in ("", "dots", "full"):
        config.model.update(quantize="w8a8", remat=remat)
        drawn = draw(config)
        found = plan.flops(drawn)
        both = 2 * BLOCK if remat else BLOCK + LAST
        again = 2 * (BLOCK - 2 * 16 * 24 * 40) if remat == "full" else 0
        assert found["language_model"].integers == 5 * (2 * both + again)
        assert sum(part.integers for part in found.values()) == found["language_model"].integers
        counted = sum(part.total for part in found.values())
        assert counted == pytest.approx(arithmetic.traced(drawn.step, *drawn.inputs), rel=0.02)
    chip, total = plan.CHIPS["v5e"], sum(part.total for part in found.values())
    integers = found["language_model"].integers
    seconds = plan.figures(drawn, chip)["seconds"]["compute"]
    assert seconds == pytest.approx((total - integers) / 197e12 + integers / 394e12)


def test_loops_are_counted_as_often_as_they_turn():
    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    assert arithmetic.traced(loop, jnp.ones((3, 3))) == 7 * 2 * 27


def test_what_a_teacher_multiplies_in_integers_by_hand(config):
    """The forward products of its language model's two blocks, for the three retained rows alone."""
    config.model.update(quantize="w8a8", remat="")
    assert plan.flops(draw(config, "kl", train="visual"))["teacher"].integers == 3 * (BLOCK + LAST)
