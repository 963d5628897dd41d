"""Steps of the tiny model, as shapes: what the tests of the planner and of its arithmetic draw."""

from vkd_jax import methods
from vkd_jax.planner import blueprint
from vkd_jax.runtime.mesh import make_mesh

LENGTHS = blueprint.Lengths(text=12, answer=5)


def draw(config, method="vkd", whole=False, mesh=None, **fields):
    method = methods.create(method, fields)
    return blueprint.draw(config, mesh or make_mesh(), LENGTHS, method, whole)
