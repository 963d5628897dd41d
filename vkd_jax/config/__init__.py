"""The fields of a config and the words after a config's colon."""
