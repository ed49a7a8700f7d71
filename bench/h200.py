"""What `bash bench/h200.sh` runs: stage after stage, each in a process of its own and under its own time limit.

A stage keeps what it has found in OUT/STAGE.json as it goes, so that what it had when it was ended is there.
OUT/summary.json has a line for each: whether it did all it should, why not, its seconds, what it found.
The stages are in bench/stages.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import stages
from device import Sampled
from stages import ROOT

CHARACTERS = 40_000  # of a stage's output that are kept: its end
TOY = 900  # seconds that a stage may take with --toy, on two busy cores
MINUTES = {1: 7.5, 2: 6.0}  # of each part: two commands, with their starts, in 15


@dataclass
class Stage:
    "One question to the machine."

    part: int  # of the two commands that all of it takes
    seconds: int  # that it may take
    work: Callable  # (args, keep) -> what went wrong, a line each


SEVEN = "--shape", "7b", "--max-tokens", "8192"
STAGES = {
    "machine": Stage(1, 45, stages.machine),
    "kernels": Stage(1, 120, stages.kernels),
    "tests": Stage(1, 100, stages.by_pytest("not flex")),
    "tiny": Stage(1, 90, stages.tiny),
    "resume": Stage(1, 90, stages.resume),
    "train1b": Stage(1, 100, stages.by_train("1b", 25, zero=2, max_tokens=16_384)),
    "bench1b": Stage(1, 110, stages.by_bench("--shape", "1b", "--steps", "24", "--minutes", "1.4")),
    "bench7b": Stage(
        2,
        150,
        stages.by_bench(
            *SEVEN, "--variants", "ours", "--recompute", "full", "cheap", "--steps", "12", "--minutes", "2"
        ),
    ),
    "train7b": Stage(2, 150, stages.by_train("7b", 8, zero=3, recompute="full", max_tokens=8192)),
    "padded7b": Stage(
        2,
        120,
        stages.by_bench(
            *SEVEN, "--variants", "ours", "padded", "stock", "--recompute", "full", "--steps", "8", "--minutes", "1.6"
        ),
    ),
    "testsflex": Stage(2, 120, stages.by_pytest("flex")),  # which compiles for every shape: apart, and last
}


def write(file: Path, found: dict) -> None:
    "Whole or not at all."
    file.with_suffix(".part").write_text(json.dumps(found, indent=1, default=str))
    file.with_suffix(".part").replace(file)


def work(args) -> int:  # exit code
    "Inside the stage's process."
    found, file = {}, args.out / f"{args.work}.json"

    def keep(**more):
        found.update(more)
        write(file, {"found": found})

    wrong = STAGES[args.work].work(args, keep)
    keep(wrong=wrong)
    return int(bool(wrong))


def end(leader: int) -> None:
    "Kill a stage and all that it has started, in whatever session."
    try:
        below = psutil.Process(leader).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    for p in below:
        try:
            p.kill()
        except psutil.NoSuchProcess:
            pass
    try:
        os.killpg(leader, 9)
    except ProcessLookupError:
        pass


def ended(name: str, args, limit: float) -> tuple[int | None, str, dict]:
    """Exit code (None: over its limit), output and the device's readings of a stage's process.

    Its temporary files, 14 GB of them at 7B, go with it."""
    words = [sys.executable, __file__, "--work", name, "--out", str(args.out)]
    words += ["--toy"] * args.toy + (["--model", args.model] if args.model else [])
    with Sampled() as device, tempfile.TemporaryFile("w+", errors="replace") as log, stages.folder() as own:
        env = os.environ | {"TMPDIR": own}
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, cwd=ROOT, env=env)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        end(process.pid)
        process.wait()
        log.seek(0)
        said = log.read()[-CHARACTERS:]
    return code, said, device.found


def run(name: str, args, limit: float) -> dict:  # its line of the summary
    "One stage."
    file, begun = args.out / f"{name}.json", time.monotonic()
    file.unlink(missing_ok=True)
    code, said, device = ended(name, args, limit)
    found = json.loads(file.read_text())["found"] if file.is_file() else {}
    if code is None:
        why = f"ended after its {limit:.0f} s"
    else:
        why = "; ".join(found.get("wrong", [])) or (f"exit code {code}: {stages.last_line(said)}" if code else "")
    told = line(name, why, time.monotonic() - begun, limit, found.get("headline", ""), device)
    write(file, told | {"found": found, "log": said})
    return told


def line(name: str, why: str, seconds: float = 0, limit: float = 0, headline: str = "", device: dict = {}) -> dict:
    "A stage's line of the summary."
    return {
        "stage": name,
        "ok": not why,
        "why": why,
        "seconds": round(seconds, 1),
        "limit": round(limit),
        "headline": headline,
        "device": device,
    }


def table(told: list[dict]) -> str:
    "The summary for a reader."
    rows = [f"{'stage':10} {'':3} {'seconds':>7} {'GB':>6} {'W':>5}  found, or why not"]
    for t in told:
        memory, power = t["device"].get("memory_mib_max"), t["device"].get("power_w_max")
        gigabytes, watts = f"{memory * 1024**2 / 1e9:.1f}" if memory else "-", f"{power:.0f}" if power else "-"
        said = " | ".join(filter(None, (t["why"], t["headline"])))
        well = "ok" if t["ok"] else "BAD"
        rows.append(f"{t['stage']:10} {well:3} {t['seconds']:7.1f} {gigabytes:>6} {watts:>5}  {said}")
    return "\n".join(rows)


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stages", nargs="*", help=f"1, 2, or of {', '.join(STAGES)}; none: all")
    p.add_argument("--toy", action="store_true", help="toy shapes, for a CPU")
    p.add_argument("--model", help="a llava-hf folder for the runs of train.py, in place of random weights")
    p.add_argument("--minutes", type=float, help="for all stages together (default: 7.5 for part 1, 6 for part 2)")
    p.add_argument("--limit", action="append", default=[], metavar="STAGE=SECONDS", help="another limit for a stage")
    p.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/h200")), help=argparse.SUPPRESS)
    p.add_argument("--work", choices=STAGES, help=argparse.SUPPRESS)
    return p


def main() -> int:  # exit code
    p = arguments()
    args = p.parse_args()
    if args.toy:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # a minute a kernel, which then has no backward pass
    if args.work:
        return work(args)
    unknown = sorted(set(args.stages) - {"1", "2", *STAGES})
    if unknown:
        p.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    names = [n for n, s in STAGES.items() if not args.stages or {n, str(s.part)} & set(args.stages)]
    limits = {n: TOY if args.toy else STAGES[n].seconds for n in names}
    limits |= {n: float(s) for n, s in (word.split("=") for word in args.limit)}
    minutes = args.minutes or (120 if args.toy else sum(MINUTES[k] for k in {STAGES[n].part for n in names}))
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    told, until = [], time.monotonic() + 60 * minutes
    for name in names:
        left = until - time.monotonic()
        late = line(name, f"not begun: the {minutes:g} minutes were over")
        told.append(run(name, args, min(limits[name], left)) if left > 5 else late)
        summary = {"stages": told, "table": table(told), "command": sys.argv[1:], "minutes": minutes}
        write(args.out / "summary.json", summary)
        print(table(told[-1:]).splitlines()[1], flush=True)
    print(f"\n{table(told)}\n{args.out / 'summary.json'}", flush=True)
    return int(not all(t["ok"] for t in told))


if __name__ == "__main__":
    sys.exit(main())
