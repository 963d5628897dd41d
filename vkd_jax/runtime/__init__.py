"""Processes, devices, files and memory: everything below the models."""
