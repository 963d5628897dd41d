"""Synthetic people: their portraits and facts, written in the layout of each benchmark."""
