"""A run of the pipeline, from a config to results and a report, and comparisons of many runs.

- `pipeline`: `run` and `execute`, which go through the stages of a config in order.
- `job`: the config with its data, and all checks that are made before anything is computed.
- `stages`: fine-tuning, unlearning with the export, evaluation, attacks and the report.
- `results_writer`: results.json, and provenance.json beside exported weights.
- `workdir`: the folder of a run, which belongs to a config and to inputs.
- `inputs`: digests of what a run reads; those of what it has computed are in `runtime.records`.
- `api`: runs from Python, as `vkd_jax.unlearn`, `vkd_jax.evaluate` and `vkd_jax.attack`.
- `judging`: the stage that grades open answers with a language model.
- `dry_run`: what a run would compute, for `--dry_run`.
- `rebuild_report`: `vkd report`, which writes the report of a finished run again.
- `sweep`, `worker_pool`: the runs of a comparison, and the processes that execute them.
- `requests`, `ledger`, `features`: sequential requests, the ledger that records them, and the cached features that
  replace the images of the people of earlier requests; `purging` deletes these.

Contract: all inputs of a run are in its `RunConfig`. Each stage writes its result into the folder of the run, and is
skipped if that result exists and is whole, so an interrupted run resumes with the same config.

To add a stage, write a function of a `Job` in `stages` and call it in `pipeline`, or in `stages.unlearn_and_evaluate`
if it needs the models. The values of `config.stage`, each of which selects some stages, are in `config.stages`.
"""
