"""Random cases of the operations against float64: `make fuzz [N=2000] [INTERPRETED=200]`.

A case is its kind and its number: `--replay live:17` runs one alone. `live` is `context_attention` on the CPU,
`kernel` its Triton kernel under the interpreter; `lora` and `lora-kernel` are those of `routed_lora`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import torch

from operations import lora_cases
from operations.cases import assert_within_twice_eager, hard_weights, make_case, soft_weights
from operations.interpreted import interpreter_fault, lora_interpreted, run_interpreted
from weaver_kernels import ContextPlan, context_attention, routed_lora

HALF = (torch.float16, torch.bfloat16)
KINDS = ("live", "lora", "kernel", "lora-kernel")


def blobs(b, s, t, rng):
    """Masks of a picture: for each context a run of tokens, soft at both ends, some contexts dead."""
    start = torch.rand(b, s, 1, generator=rng) * t
    width = torch.rand(b, s, 1, generator=rng) * t / 2
    inside = width - (torch.arange(t) - start - width).abs()
    return inside.clamp(0, 1) * torch.randn(b, s, 1, generator=rng) * (torch.rand(b, s, 1, generator=rng) > 0.2)


def dead(b, s, t, rng):
    """Nothing alive."""
    return torch.zeros(b, s, t)


def draw(kind: str, seed: int) -> tuple[dict, dict]:
    """The arguments of `make_case`, or of `make_lora`, for a seed, and what else is done to the case."""
    choose = random.Random(f"{kind}:{seed}")
    if kind.startswith("lora"):
        return draw_lora(choose, seed, large=kind == "lora")
    large = kind == "live"
    s = choose.choice([1, 2, 3, 5, 9, 33, 70] if large else [1, 2, 3, 5, 66])
    shape = {
        "b": choose.randint(1, 3 if large else 2),
        "t": choose.choice([1, 7, 33, 64, 150, 400, 1100] if large and s < 10 else [1, 9, 16, 25, 34]),
        "h": choose.randint(1, 3 if large else 2),
        "d": choose.choice([8, 16, 24, 40, 64, 80, 96, 160, 256]),
        "s": s,
        "length": choose.choice([1, 5, 16, 33, 77, 100, 128, 154, 231] if large else [1, 5, 17, 77, 100, 130, 154]),
        "contexts": choose.choice([None, s + 2, max(1, s - 1)]),
        "indexed": choose.random() < 0.5,
        "dtype": choose.choice((torch.float32, *HALF) if large else (torch.float32, torch.float16)),
        "q_each": choose.random() < 0.3,
        "ragged": choose.random() < 0.4,
        "strided": choose.random() < 0.5,
        "weights": choose.choice([hard_weights, soft_weights, blobs, dead] if s < 10 else [hard_weights, blobs]),
        "amplitude": choose.choice([0.1, 1.0, 1.0, 3.0]),
        "seed": seed,
    }
    extra = {"plan": choose.random() < 0.5, "tile": choose.choice([16, 32]), "scale": choose.choice([None, 0.05, 1.0])}
    return shape, extra


def draw_lora(choose: random.Random, seed: int, large: bool) -> tuple[dict, dict]:
    """The same of `routed_lora`: a Linear, or a convolution."""
    s = choose.choice([1, 2, 3, 5, 9, 33, 70] if large else [1, 2, 3, 5, 66])
    shape = {
        "b": choose.randint(1, 3 if large else 2),
        "c": choose.choice([1, 5, 16, 33, 64, 100]),
        "o": choose.choice([1, 7, 16, 40, 64, 130]),
        "s": s,
        "ranks": [8, *(choose.choice([0, 1, 4, 16, 17, 33, 64, 128]) for _ in range(choose.randint(0, 4)))],
        "adapters": choose.choice([None, s + 2, max(1, s - 1)]),
        "indexed": choose.random() < 0.5,
        "dtype": choose.choice((torch.float32, *HALF) if large else (torch.float32, torch.float16)),
        "strided": choose.random() < 0.3,
        "weights": choose.choice([hard_weights, soft_weights, blobs, dead] if s < 10 else [hard_weights, blobs]),
        "amplitude": choose.choice([0.1, 1.0, 1.0, 3.0]),
        "seed": seed,
    }
    if choose.random() < 0.5:
        shape["t"] = choose.choice([1, 7, 33, 64, 150, 400, 1100] if large and s < 10 else [1, 9, 16, 25, 34])
    else:
        most = 24 if large and s < 10 else 6
        shape |= {
            "size": (choose.randint(3, most), choose.randint(3, most)),
            "taps": choose.randint(1, 3),
            "stride": choose.randint(1, 3),
            "padding": choose.randint(0, 3),
            "channels_last": choose.random() < 0.5,
        }
    return shape, {"plan": choose.random() < 0.5, "tile": choose.choice([16, 32, 64])}


def run_lora(kind: str, shape: dict, extra: dict) -> None:
    """Make and check one case of `routed_lora`."""
    case = lora_cases.make_lora(**shape)
    given = lora_cases.fresh(case)
    if kind == "lora-kernel":
        out = lora_interpreted(given, extra["tile"])
    else:
        out = routed_lora(**lora_cases.planned(given) if extra["plan"] else given)
    lora_cases.assert_within_twice_eager(out, case)


def run(kind: str, seed: int) -> None:
    """Make and check one case; raises when it is wrong."""
    shape, extra = draw(kind, seed)
    if kind.startswith("lora"):
        run_lora(kind, shape, extra)
        return
    case = make_case(**shape)
    if extra["scale"] is not None:
        case["scale"] = extra["scale"]
    if kind == "kernel":
        out = run_interpreted(case, extra["tile"])
    elif extra["plan"]:
        plan = ContextPlan(case["weights"], case.get("context_index"), merge=False)
        out = context_attention(**case | {"weights": plan.weights, "context_index": plan.context_index, "plan": plan})
    else:
        out = context_attention(**case)
    assert_within_twice_eager(out, case)


def run_many(kind: str, seeds) -> list[int]:
    """Run the cases, tell each that fails and how to run it again; returns their seeds."""
    failed = []
    for seed in seeds:
        try:
            run(kind, seed)
        except Exception as error:
            failed.append(seed)
            print(f"FAILED {kind}:{seed}  {type(error).__name__}: {error}\n  {draw(kind, seed)}")
            print(f"  again: make fuzz ARGS='--replay {kind}:{seed}'", flush=True)
    return failed


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--live", type=int, default=100, help="cases of each operation on the CPU")
    parser.add_argument("--interpreted", type=int, default=10, help="cases of each kernel, interpreted")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="some of them only")
    parser.add_argument("--first", type=int, help="number of the first case; drawn and printed if not given")
    parser.add_argument("--replay", metavar="KIND:SEED", help="one case alone, with its traceback")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.replay:
        kind, seed = arguments.replay.split(":")
        print(draw(kind, int(seed)))
        run(kind, int(seed))
        print("passes")
        return 0
    numbers = dict(zip(KINDS, 2 * (arguments.live,) + 2 * (arguments.interpreted,), strict=True))
    numbers = {kind: numbers[kind] for kind in KINDS if kind in arguments.kinds}
    if any(numbers.get(kind) for kind in KINDS[2:]) and (fault := interpreter_fault()):
        parser.error(f"{fault}; or leave them out: INTERPRETED=0")
    first = arguments.first if arguments.first is not None else time.time_ns() % 10**9
    print(f"first case {first} (--first {first} draws the same)", flush=True)
    failed = 0
    for kind, number in numbers.items():
        wrong = len(run_many(kind, range(first, first + number)))
        print(f"{kind}: {number - wrong} of {number} pass", flush=True)
        failed += wrong
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
