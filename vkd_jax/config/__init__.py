"""Settings of a run.

- `schema`: one frozen dataclass per section, with `RunConfig` as the root.
- `model`: the section of the given models.
- `training`: the section of a training loop.
- `evaluation`: the section of the evaluation.
- `comparison`: the sections of a comparison of methods.
- `request`: the section of one of several requests.
- `stages`: the values of `config.stage`, and what a run with each of them does.
- `fields`: declaration and validation of a field, shared by every section, method, attack and benchmark.
- `arguments`: the key=value arguments after a config's colon.
- `defaults`: building blocks of the files of configs/.
- `command_line`: the flags that the commands share.

ml_collections is the interface of configs/ and of the command line. `RunConfig.from_config_dict` converts a config
once, and all other code is given typed sections. A section that exists is valid: its values were checked when it was
created.

To add a field, declare it with `fields.setting` in its section. It can then be set in config files and by
`--config.SECTION.FIELD=VALUE`, and `--config FILE:help` prints it.
"""
