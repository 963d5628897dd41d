"""Abstract steps of the tiny model, for the tests of the planner."""

from vkd_jax import methods
from vkd_jax.config.schema import RunConfig
from vkd_jax.planner import abstract_step
from vkd_jax.runtime.mesh import make_mesh

LENGTHS = abstract_step.Lengths(text=12, answer=5)


def build_step(config, method="vkd", quantized=True, mesh=None, **fields):
    method = methods.create(method, fields)
    return abstract_step.build(RunConfig.from_config_dict(config), mesh or make_mesh(), LENGTHS, method, quantized)
