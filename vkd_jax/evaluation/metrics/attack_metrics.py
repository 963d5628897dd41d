"""Metrics of attacks: figures of a whole model, which the attacks compute."""

from vkd_jax.evaluation.metrics.base import Metric

AUC = Metric(name="auc", title="AUC", direction="half")
RECOVERY = Metric(name="recovery", title="recovery", direction="down")
