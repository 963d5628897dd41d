"""Metrics of attacks: figures of whole models that the attacks compute."""

from vkd_jax.evaluation.metrics.base import Metric

AUC = Metric(name="auc", title="AUC", direction="half")
RECOVERY = Metric(name="recovery", title="recovery", direction="down")
