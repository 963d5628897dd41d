"""Evaluation: asks a model every question of every evaluation set, and scores the answers.

`evaluate` asks the questions under one or more protocols and returns records, `inference` runs the model in batches,
and `metrics` turns records into figures. `encoded_images` and `cached_features` provide images to `inference`, and
`wording` has the texts of prompts. `judge` grades open answers with a language model, and `judge_scores` reads its
replies. `shortcuts` and `answer_lengths` warn of questions that measure nothing.

Contract: there is one record per question, or one per protocol if the question has options, in the order of the sets,
with the fields that docs/results_format.md lists under answers/MODEL.jsonl. Metrics read records only, never the model.

To add a metric: write a `metrics.base.Metric` in a file of `metrics/`, and add one line to `metrics.METRICS`. Results,
report, tables and plots then show it. See tests/test_extensions.py for a complete example.
"""
