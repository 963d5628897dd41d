"""Asks a model every question of every set, and scores the answers."""
