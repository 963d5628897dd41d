"""The jitted step, the loop around it, the optimizer and the metric writer."""
