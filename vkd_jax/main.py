"""python -m vkd_jax.main --config configs/tiny.py --workdir DIR [--config.train.steps=300 ...]

Exit status: 0 done, 1 the run diverged or broke, 2 bad input (one sentence says what), 143 stopped by SIGTERM with its
state saved.
"""

import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from vkd_jax.types import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(), e.g. configs/tiny.py.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything the run makes is written.")


def main(argv: Sequence[str]) -> int:
    """Runs what the config says."""
    if len(argv) > 1:
        return _bad_input(f"unexpected argument {argv[1]!r}; flags begin with --")
    if CONFIG.value is None or WORKDIR.value is None:
        return _bad_input("pass --config FILE and --workdir DIR.")
    from vkd_jax import pipeline, train  # after the flags: these imports take seconds

    try:
        pipeline.run(CONFIG.value, WORKDIR.value)
    except UserError as error:
        return _bad_input(str(error))
    except train.Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except train.Stopped as error:
        print(error, file=sys.stderr)
        return 143
    return 0


def parse(argv: Sequence[str]) -> list[str]:
    """absl's flag parsing, with every complaint in one sentence and exit status 2."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        sys.exit(_bad_input(str(error).strip().splitlines()[0]))


def _bad_input(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    app.run(main, flags_parser=parse)
