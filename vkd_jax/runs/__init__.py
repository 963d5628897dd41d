"""A run of the pipeline: its stages in order and the folder that it writes."""
