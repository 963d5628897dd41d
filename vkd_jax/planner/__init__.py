"""Memory and minimum time of a training step on a TPU slice, without a TPU.

- `abstract_step`: the step of a config, with shapes and shardings instead of arrays.
- `compile`: the TPU compiler's figures for a step, which are stored on disk.
- `memory`, `flops`, `hlo`: bytes by kind, FLOPs by model part and pass, and what a compiled program contains.
- `tpu_specs`: published figures of the supported chips.
- `plan`: all figures of one config on one slice. `page` prints them, and `table` plans the rows of configs/plans.py.

Contract: nothing is downloaded, no array is created, and the planned step is the step that `training.loop.fit` jits.

To add a chip, add a row to `tpu_specs.TPUS`. A new model or method needs nothing here: models name their parts with
`jax.named_scope`, and methods declare their cached arrays in `Method.cache_spec`.
"""
