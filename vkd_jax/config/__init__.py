"""Settings of a run.

- `fields`: declaration and validation of a field, shared by every section, method, attack and benchmark.
- `schema`: one frozen dataclass per section, `RunConfig` as the root. ml_collections is the interface of configs/ and
  of the command line; `RunConfig.from_config_dict` converts once, and all other code is given typed sections.
- `arguments`: the key=value arguments after a config's colon.
- `defaults`: pieces that the files of configs/ are made of.

To add a field, declare it with `setting` in its section: it can then be set in config files and on the command line.
"""
