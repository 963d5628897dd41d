"""Standard suites of general ability, as evaluation sets of the role `general` for any benchmark.

    suite          `Suite`: what a suite declares, its sample, and its source
    yes_no         POPE, MME
    choice         ScienceQA, MMBench
    short_answer   GQA, VQAv2, VizWiz, TextVQA, MM-Vet

A suite satisfies `vkd_jax.benchmarks.cache.Benchmark` without sets to unlearn. Its rules of scoring are in
`vkd_jax.evaluation.metrics.suites`. To add one, write a `Suite` in a file, its rule and its metrics, and add a line to
`SUITES` in vkd_jax/registry.py.
"""

from pathlib import Path

from vkd_jax import registry
from vkd_jax.benchmarks.general.suite import Suite
from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.types import Example


def create(config: EvalConfig) -> list[Suite]:
    """The suites that a run asks, with their sources.

    Raises:
        UserError: a source is neither a folder, nor a URI, nor an id on the hub.
    """
    suites = []
    for name, source in config.general_sources().items():
        suite = registry.lookup("suite", registry.SUITES, name)
        suites.append(suite(source=suite.HUB if source == "hub" else source, most=config.max_items, seed=config.seed))
    for suite in suites:
        suite.check()
    return suites


def read(suites: list[Suite], folder: str | Path) -> dict[str, list[Example]]:
    """Reads the sets of some suites, by name; see `vkd_jax.benchmarks.cache.read`."""
    from vkd_jax.benchmarks import cache  # tensorflow-datasets takes a while to import

    return {name: examples for suite in suites for name, examples in cache.read(suite, folder).items()}
