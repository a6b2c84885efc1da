"""``python -m weaver.embedded.training STAGE``: make the embedded model and all that is derived from it.

Stages, in order: ``bank`` draws scenes, ``autoencoder`` and ``diffusion`` train the model from the committed weights
(``--from-scratch`` starts anew, the stage ``diffusion`` on the autoencoder there is; where a denoiser exists, only the
decoder goes on), ``derive`` rebuilds helpers, concepts, gates, model card and hashes from it; ``all`` does each. What
else is derived ``python -m benchmarks.rederive`` makes anew. ``card`` writes the model card of the gates there are.
Budgets are minutes of wall clock. ``--processes`` trains with several processes of one thread each.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from weaver.embedded.model import MODEL_DIR
from weaver.embedded.training.bank import load_bank, make_bank

TRAINING_STAGES = ("bank", "autoencoder", "diffusion")
STAGES = (*TRAINING_STAGES, "segmenter", "identity", "concepts", "gates", "card", "derive", "all")


def _command(stage: str, args: argparse.Namespace) -> list[str]:
    """The command of one training stage under torchrun, with `args.processes` processes that start no others."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.processes)]
    command += ["-m", "weaver.embedded.training", stage, "--processes", "1"]
    names = ("model", "work", "scenes", "batch", "minutes", "autoencoder_minutes", "autoencoder_batch")
    for name in (*names, "learning_rate", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return command + ["--compile"] * args.compile + ["--move-latents"] * args.move_latents


def _forget(model: Path, *, keep_autoencoder: bool) -> None:
    """Remove a model, or all of it that the diffusion training makes."""
    for path in sorted(model.glob("*")):
        if keep_autoencoder and path.name in ("vae", "curve_vae.jsonl"):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _encoded(args: argparse.Namespace):
    from weaver.embedded.training.diffusion import encode_bank

    bank = load_bank(args.work / "bank")
    return bank, encode_bank(bank, args.model / "vae", args.work / "bank")


def run(stage: str, args: argparse.Namespace) -> None:
    """Run one stage in this process."""
    if stage == "bank":
        make_bank(args.work / "bank", args.scenes, args.seed)
    elif stage == "autoencoder":
        from weaver.embedded.training.autoencoder import train_autoencoder

        bank = load_bank(args.work / "bank")
        learned = (args.model / "unet").exists() and not args.move_latents  # the denoiser knows these latents
        budget = args.autoencoder_minutes, args.autoencoder_batch
        train_autoencoder(bank, args.model / "vae", *budget, seed=args.seed, decoder_only=learned)
    elif stage == "diffusion":
        from weaver.embedded.training.diffusion import train_diffusion

        bank, latents = _encoded(args)
        rate = args.learning_rate
        train_diffusion(
            bank, latents, args.model, args.minutes, args.batch, rate, seed=args.seed, compiled=args.compile
        )
    else:
        from weaver.embedded.training import derive

        derive.run(stage, args.work, args.helper_minutes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m weaver.embedded.training", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder of the pipeline (default: the package's)")
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="scratch folder")
    parser.add_argument("--scenes", type=int, default=32000, help="scenes in the bank")
    parser.add_argument("--minutes", type=float, default=80.0, help="budget of the diffusion training")
    parser.add_argument("--autoencoder-minutes", type=float, default=12.0)
    parser.add_argument("--autoencoder-batch", type=int, default=16)
    parser.add_argument("--helper-minutes", type=float, default=10.0, help="budget of the segmenter's training")
    parser.add_argument("--batch", type=int, default=24, help="samples a step of the diffusion training, per process")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak of the diffusion training")
    parser.add_argument(
        "--processes",
        type=int,
        default=1 if torch.cuda.is_available() else 2,
        help="training processes of one thread each (default: 2 on CPUs, 1 on a GPU)",
    )
    parser.add_argument(
        "--move-latents",
        action="store_true",
        help="train the encoder too where a denoiser exists, which then has to follow",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the diffusion training first; capture it on a GPU"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="remove the model first instead of going on from it (of the stage diffusion: all but the autoencoder)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.model.resolve() != MODEL_DIR.resolve() and args.stage not in TRAINING_STAGES:
        parser.error(
            f"{args.stage} works on the package's own model ({MODEL_DIR}), not on {args.model}: "
            f"train there by the stages {', '.join(TRAINING_STAGES)}, then copy the folder over the package's"
        )
    torch.set_num_threads(1)
    if args.from_scratch:
        if args.stage not in ("autoencoder", "diffusion", "all"):
            parser.error(
                f"--from-scratch: {args.stage} does not train the model; it is for autoencoder, diffusion and all"
            )
        _forget(args.model, keep_autoencoder=args.stage == "diffusion")
    stages = (*TRAINING_STAGES, "derive") if args.stage == "all" else (args.stage,)
    for stage in stages:
        if args.processes > 1 and stage in ("autoencoder", "diffusion"):
            if stage == "diffusion":
                _encoded(args)  # once, before the processes start
            subprocess.run(_command(stage, args), check=True)
        else:
            run(stage, args)


if __name__ == "__main__":
    main()
