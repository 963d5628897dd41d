"""The command `vkd verify`: is a model the same in PyTorch, and is it the certified one?"""
