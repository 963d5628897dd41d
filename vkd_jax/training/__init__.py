"""Training, for every method and every stage that trains.

- `loop`: `fit`, with checkpoints, metrics and resumption.
- `step`: the jitted step and its state.
- `optimizer`: clipping, Adam, weight decay, learning rate and masks.
- `preemption`: stopping on SIGTERM at one step on all processes.
- `metric_writer`: metrics for TensorBoard and in metrics.jsonl; the only module that imports TensorFlow.
"""
