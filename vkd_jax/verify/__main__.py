"""Compares a model with transformers on PyTorch, or with its certificate.

vkd verify MODEL                                                      is it the same model in PyTorch?
vkd verify MODEL --certificate [--public_key FILE]                    is it the certified model, and who signed for it?
vkd verify MODEL --certificate --sign FILE                            signs the certificate, if the model is that one
vkd verify MODEL --certificate --pdf FILE                             writes it as one page, if the model is that one

The first form needs PyTorch. It asks both libraries about images of several sizes, and compares prompts, image
features, logits and greedy tokens; docs/parity.md explains the table and the limits. MODEL is a folder or an id on the
Hugging Face Hub.

Runs write certificate.json beside the models that they export: digests of all tensors and files, config, inputs and
figures. Keys are Ed25519 keys in PEM format:

openssl genpkey -algorithm ed25519 -out PRIVATE.pem && openssl pkey -in PRIVATE.pem -pubout -out PUBLIC.pem

Exit status: 0 if the model is the same, 1 if it is not, 2 on bad input.
"""

import argparse
import sys
from pathlib import Path

from vkd_jax.checkpoints import sources
from vkd_jax.config import command_line
from vkd_jax.runtime import commands, memory, storage
from vkd_jax.types import UserError, located
from vkd_jax.verify import certified, parity, questions

DTYPES = ("float32", "bfloat16")


@commands.guarded
def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = command_line.ArgumentParser(prog="vkd verify", description=__doc__)
    parser.add_argument("model", help="model folder, or id on the Hugging Face Hub")
    torch = parser.add_argument_group("comparison with PyTorch")
    torch.add_argument("--images", metavar="DIR", help="folder of images to ask about; three synthetic ones by default")
    torch.add_argument("--questions", nargs="+", default=[], metavar="TEXT", help="questions to ask about each image")
    torch.add_argument("--dtype", choices=DTYPES, help="dtype of weights and computation (float32)")
    torch.add_argument("--max_new_tokens", type=int, help="tokens of each answer (16)")
    torch.add_argument("--max_pixels", type=int, help="resize larger images (Qwen-VL, SmolVLM)")
    signed = parser.add_argument_group("comparison with the certificate")
    signed.add_argument("--certificate", action="store_true", help="compare the folder with its certificate.json")
    signed.add_argument("--public_key", help="key that must have signed the certificate, PEM")
    signed.add_argument("--sign", help="private key to sign the certificate with, PEM")
    signed.add_argument("--pdf", help="file to write the certificate to as one page, PDF")
    args = parser.parse_args()
    _check_combination(args)
    with storage.write_errors("folder"), memory.exhausted():
        return _verify(args)


def _check_combination(args: argparse.Namespace) -> None:
    """Checks that all flags belong to the same comparison."""
    of_torch = ("images", "questions", "dtype", "max_new_tokens", "max_pixels")
    unused = of_torch if args.certificate else ("public_key", "sign", "pdf")
    if given := [f"--{name}" for name in unused if getattr(args, name) not in (None, [])]:
        kind = "without" if args.certificate else "with"
        raise UserError(f"{given[0]} is used {kind} --certificate; see --help for the two comparisons.")


def _verify(args: argparse.Namespace) -> int:
    if args.certificate:
        public_key, private_key = _file("--public_key", args.public_key), _file("--sign", args.sign)
        return certified.verify(sources.fetch_model(args.model), public_key, private_key, _file("--pdf", args.pdf))
    given = {name: getattr(args, name) for name in ("max_new_tokens", "max_pixels") if getattr(args, name) is not None}
    asked = questions.build(args.images, args.questions)
    return parity.verify(sources.fetch_model(args.model), asked, dtype=args.dtype or "float32", **given)


def _file(flag: str, name: str | None) -> Path | None:
    with located(flag):
        return None if name is None else storage.resolve(name)


if __name__ == "__main__":
    sys.exit(main())
