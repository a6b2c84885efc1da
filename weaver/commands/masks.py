"""`weaver masks job.yaml`: where each concept will stand, before anything is drawn; and masks edited by hand."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from weaver.commands.reading import tell_versions
from weaver.commands.seeds import add_seed, with_seed
from weaver.errors import WeaverError

__all__ = ["add_masks_option", "add_parser", "with_masks"]

_OVERLAY = "masks.png"
_GUESSED = "attention"


def add_parser(commands, epilog: str) -> None:
    """Add the command to the subparsers `commands`."""
    parser = commands.add_parser(
        "masks",
        help="a job's masks, to look at and to edit",
        description="Makes or reads a job's template and finds its masks; nothing is trained or drawn with them.",
        epilog=epilog,
    )
    parser.add_argument("job", type=Path, help="job.yaml, or the manifest.json of an earlier run")
    parser.add_argument("--preview", action="store_true", help="write the masks drawn over the template (the default)")
    parser.add_argument("--edit", action="store_true", help="write the template and a layer for each concept, too")
    parser.add_argument("--replace", action="store_true", help="with --edit: in the place of layers that are there")
    add_masks_option(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (outputs/JOB-masks)")
    add_seed(parser)
    parser.add_argument("--offline", action="store_true", help="take models from the local cache only")
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")
    parser.set_defaults(command=_masks)


def add_masks_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--masks`."""
    parser.add_argument(
        "--masks", type=Path, metavar="DIR", help="take the template and the edited layers that `weaver masks` left"
    )


def with_masks(job, manifest: Mapping | None, folder: Path | None):
    """The job, and the manifest that it comes from, with the template and masks of `--masks`, if that was given."""
    if folder is None:
        return job, manifest
    from weaver.job.preview import place_files, with_layers
    from weaver.manifest import with_files

    job = with_layers(job, folder)
    return job, manifest and with_files(manifest, place_files(job))


def _masks(args: argparse.Namespace) -> int:
    if args.edit and args.masks:
        raise WeaverError(f"--edit: the layers in {args.masks} are edited already; leave out one of --edit and --masks")
    if args.replace and not args.edit:
        raise WeaverError("--replace: replaces layers, which --edit writes; leave it out")
    with args.stages.step("starting"):
        from weaver.job.file import read_job
        from weaver.job.preview import LAYERS, TEMPLATE, layer_files, place_files, preview_masks
        from weaver.models import quiet_libraries

        quiet_libraries()
        job, manifest = with_masks(*read_job(args.job), args.masks)
        job = with_seed(job, args.seed)
    tell_versions(manifest)
    from weaver.folder import all_or_nothing, check_folder, clashes
    from weaver.job.inputs import training_paths
    from weaver.manifest import save_png

    out = args.out or args.masks or Path("outputs") / f"{args.job.stem}-masks"
    layers = layer_files([spec.name for spec in job.concepts]) if args.edit else []
    results = [Path(_OVERLAY), *([] if args.masks else [Path(TEMPLATE)]), *layers]
    check_folder(out, results)
    there = [file for file in layers if (out / file).exists()]
    if there and not args.replace:
        raise WeaverError(f"{out / there[0]} is there already: --replace writes it anew, --masks {out} takes it")
    if reasons := clashes(out, results, place_files(job) | training_paths(job)):
        raise WeaverError(f"{args.job}: " + "; ".join(reasons))
    preview = preview_masks(job, source=str(args.job), offline=args.offline, stages=args.stages, manifest=manifest)
    with all_or_nothing(out) as partial:
        save_png(preview.overlay(), partial / _OVERLAY)
        if not args.masks:
            save_png(preview.template, partial / TEMPLATE)
        for file, layer in zip(layers, preview.layers(), strict=False):
            (partial / LAYERS).mkdir(exist_ok=True)
            save_png(layer, partial / file)
    shares = preview.final.mean((1, 2)).tolist()
    for name, source, share in zip(preview.names, (*preview.sources, "what is left"), shares, strict=False):
        print(f"{name:20} {share:6.1%} of the picture, {source}")
    if any(source.startswith(_GUESSED) for source in preview.sources):
        print(f"{_GUESSED} finds a place for every word, there or not: look before you draw")
    print(f"{out / _OVERLAY}: the masks over the template")
    if args.edit:
        print(f"{out / LAYERS}: paint or erase, then `weaver run {args.job} --masks {out}`")
    return 0
