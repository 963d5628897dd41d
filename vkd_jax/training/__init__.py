"""Training, for every method and every stage that trains.

    loop            `fit`, with checkpoints, metrics and resumption
    step            the jitted step and its state
    optimizer       clipping, Adam, weight decay, learning rate and masks
    preemption      stopping on SIGTERM and Ctrl-C, at the same step in all processes
    metric_writer   metrics for TensorBoard and in metrics.jsonl; the only module that imports TensorFlow

Contract: the package knows methods only by `methods.base.Method`. Everything that a step computes is a function of the
state, the seed and the step, so that interrupted runs resume bit-identically. Only trainable weights are
differentiated, optimized and donated.

To add a learning rate schedule, add it to `optimizer.SCHEDULES` and to the choices of `TrainConfig.schedule`. To add a
metric of training, return it from a method's loss function.
"""
