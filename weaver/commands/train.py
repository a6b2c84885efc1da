"""`weaver train`: a concept's file from pictures of it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from weaver.choices import PRECISIONS
from weaver.commands.train_settings import METHODS, add_settings, chosen_settings
from weaver.errors import WeaverError
from weaver.folder import check_folder

__all__ = ["add_parser"]

_DESCRIPTION = (
    "Learn a concept from pictures of it. The caption of NAME.jpg is in NAME.txt beside it, with {token} and {word} in "
    "it; NAME.mask.png, white or opaque where the concept is, keeps the rest from being learned. Interrupted, the same "
    "command goes on where it was."
)
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_EVERY = 100  # steps


def add_parser(commands, epilog: str) -> None:
    """Add the command to the subparsers `commands`."""
    parser = commands.add_parser(
        "train",
        help="learn a concept from pictures of it",
        description=_DESCRIPTION,
        epilog=epilog,
    )
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--word", required=True, help="its class, such as dog")
    parser.add_argument("--token", default="<v1>", help="what prompts will call it (<v1>)")
    parser.add_argument(
        "--model", default="embedded", help="of SD 1.x, 2.x, SDXL: folder, Hub id; or embedded (embedded)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the concept's file (concepts/TOKEN.safetensors)")
    parser.add_argument("--replace", action="store_true", help="write over a concept's file that is there")
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help=f"whole changes of weights, or factors ({METHODS[0]})"
    )
    parser.add_argument(
        "--class-images",
        type=Path,
        metavar="DIR",
        help="pictures of its class, captions in NAME.txt beside them (a WORD), masks not used; else the model's own",
    )
    parser.add_argument(
        "--validate",
        metavar="PROMPT",
        action="append",
        help="draw this, with the token in it, while it learns: in FILE's .validation folder; may be repeated",
    )
    parser.add_argument(
        "--validate-every", type=int, default=_EVERY, metavar="N", help=f"steps from one drawing to the next ({_EVERY})"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=_EVERY, metavar="N", help=f"steps after which it can go on ({_EVERY})"
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="write losses and validation there, for TensorBoard"
    )
    parser.add_argument("--at-once", type=int, metavar="N", help="pictures made (4) or encoded (8) in one pass: memory")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (auto)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of the model's weights meanwhile (float16 on cuda, else float32)"
    )
    parser.add_argument("--offline", action="store_true", help="take the model from the local cache only")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")
    add_settings(parser)
    parser.set_defaults(command=_train, ended="the same command goes on from its last checkpoint, if it wrote one")


def _train(args: argparse.Namespace) -> int:
    with args.stages.step("starting"):
        from weaver.models import model_source, quiet_libraries, threads_for

        quiet_libraries()
        from weaver.concepts.bank import prior_and_scenes
        from weaver.concepts.checkpoints import Checkpoint
        from weaver.concepts.images import load_class_images, load_images
        from weaver.concepts.prompts import names_token, naming_reasons
        from weaver.concepts.train import train_concept
        from weaver.concepts.validation import Validation
    out = _destination(args)
    for name in ("at_once", "checkpoint_every"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise WeaverError(f"--{name.replace('_', '-')}: is {count}, expected 1 or more")
    if not args.word.strip():
        raise WeaverError(f"--word: {args.word!r} is empty; write what it is, such as dog")
    if reasons := naming_reasons(args.token, args.word):
        raise WeaverError(f"--token: {'; '.join(reasons)}")
    validation = None
    if args.validate:
        for prompt in args.validate:
            if not names_token(prompt, args.token):
                raise WeaverError(f"--validate: {prompt!r} lacks the token {args.token!r}: put it before {args.word!r}")
        validation = Validation(args.validate, out.with_suffix(".validation"), args.validate_every)
    pictures = load_images(args.images, args.token, args.word)
    given = None
    if args.class_images:
        given = load_class_images(args.class_images, args.token, args.word)
        if own := given.shared_with(pictures):
            raise WeaverError(
                f"--class-images: {own[0]} is a picture of the concept itself: these are to show others of its class, "
                "leave it out"
            )
    with args.stages.step("loading the model"):
        with model_source(args.model, offline=args.offline, fuses=False) as (_, config, _):
            if config["_class_name"] not in _PIPELINES:
                known = " and ".join(_PIPELINES)
                raise WeaverError(
                    f"--model: {args.model!r} is a {config['_class_name']}; concepts are learned in {known}"
                )
        pipe, base_hash = _loaded(args)
    settings = chosen_settings(args, pipe)
    if given and not settings.prior_batch:
        raise WeaverError("--class-images: none of them is in a step; leave out --prior-batch 0, or the pictures")
    with threads_for(pipe):
        prior, woven = prior_and_scenes(pipe, pictures, args.token, args.word, settings)
        with args.stages.bar(f"learning {args.token} {args.word}", settings.steps, left=True) as move:
            concept = train_concept(
                pipe,
                pictures,
                token=args.token,
                word=args.word,
                name=out.stem,
                prior=given or prior,
                woven=woven,
                settings=settings,
                base_hash=base_hash,
                checkpoint=out.with_suffix(".checkpoint"),
                checkpoint_every=args.checkpoint_every,
                keep_checkpoint=True,
                at_once=args.at_once,
                log_dir=args.log_dir,
                validation=validation,
                progress=move,
            )
    concept.save(out)
    Checkpoint.remove(out.with_suffix(".checkpoint"))
    seconds = args.stages.elapsed()
    print(f"{out}: {args.token} {args.word}, learned from {_counted(pictures.images)} in {seconds:.0f} s")
    return 0


def _loaded(args: argparse.Namespace):
    """The pipeline in the precision that is asked for; the hash of its base, None where it is that of this pipeline."""
    import torch

    from weaver.concepts.concept import attn2_hash
    from weaver.models import load_model

    rounded = args.precision == "bfloat16"  # jobs have models in float16 and float32, which hash alike
    dtype = torch.float16 if rounded else args.precision and getattr(torch, args.precision)
    pipe = load_model(args.model, device=args.device, offline=args.offline, dtype=dtype, fuses=False)
    if not rounded:
        return pipe, None
    base_hash = attn2_hash(pipe.unet)
    return pipe.to(torch.bfloat16), base_hash


def _destination(args: argparse.Namespace) -> Path:
    """The concept's file, which is not there yet or may be replaced, in a folder that can be written to."""
    name = args.token.strip("<>")
    if args.out is None and not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        raise WeaverError(f"--token: {args.token!r} makes no name of a file; tell the concept's by --out")
    out = args.out or Path("concepts") / f"{name}.safetensors"
    if out.suffix != ".safetensors":
        raise WeaverError(f"--out: {out} must end in .safetensors")
    if out.exists() and not args.replace:
        raise WeaverError(f"--out: {out} is there already; name another file, or add --replace")
    check_folder(out.parent, [Path(out.name)])
    return out


def _counted(pictures) -> str:
    return f"{len(pictures)} picture{'s' * (len(pictures) > 1)}"
