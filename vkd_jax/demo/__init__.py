"""Demo: two models side by side in a browser, before and after unlearning, and a small relearning attack.

- `session`: both models, their answers with probabilities, and the attack; no user interface.
- `app`: the page, with gradio, which the extra `demo` installs.
- `__main__`: the command `vkd demo`.
"""
