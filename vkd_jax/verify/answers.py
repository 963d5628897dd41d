"""What is compared of a model's answer to a question."""

from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    """What a model computes of a question with p image features, d wide, and a vocabulary of v tokens."""

    prompt: np.ndarray  # int [t]: tokens of the prompt, the repeated image tokens included
    features: np.ndarray  # float32 [p, d]: what replaces the image tokens; p is 0 for a text-only question
    logits: np.ndarray  # float32 [a + n - 1, v]: at the last a tokens of the prompt, and all but the last of the answer
    tokens: np.ndarray  # int [n]: the greedy answer
