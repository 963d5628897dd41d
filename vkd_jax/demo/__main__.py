"""Asks two models side by side in a browser, and runs a small relearning attack.

vkd demo
vkd demo --before tiny_llava --after /tmp/vkd-tiny/unlearned --images /tmp/vkd-tiny/portraits

Without models it opens on two that ship with the package: one that knows 60 synthetic people, and one that was trained
without six of them. The second command shows a run. The page is served on this machine alone until Ctrl-C.
`python -m vkd_jax.demo` is the same command. Exit status: 0 after Ctrl-C, 2 on bad input.
"""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from vkd_jax.config import command_line
from vkd_jax.demo import app
from vkd_jax.demo.session import Session
from vkd_jax.runtime import commands, memory
from vkd_jax.types import UserError


@commands.guarded
def main() -> int:
    """Runs the command line until Ctrl-C, and returns its exit status."""
    parser = command_line.ArgumentParser(prog="vkd demo", description=__doc__)
    parser.add_argument("--before", default="tiny_llava", help="model before unlearning: a folder, or id on the hub")
    parser.add_argument("--after", default="tiny_retain_only", help="model after unlearning")
    parser.add_argument("--images", help="folder of images to pick; the synthetic people by default")
    parser.add_argument("--port", type=int, default=7860, help="port of the page on this machine (7860)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that uploaded images are deleted
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port={args.port}: give 1 to 65535.")
    if args.images and "://" in args.images:
        raise UserError(f"--images={args.images}: give a folder of this machine.")
    with tempfile.TemporaryDirectory(prefix="vkd-demo-") as folder, memory.exhausted():
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploaded images are deleted at the end
        images, label = (
            (app.read_images(Path(args.images)), app.FOLDER) if args.images else (app.portraits(), app.PEOPLE)
        )
        names = (f"Before: {args.before}", f"After: {args.after}")
        page = app.create(Session.load(args.before, args.after), names, images, label)
        command_line.show(f"{app.serve(page, args.port)} shows the demo until Ctrl-C.")
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
