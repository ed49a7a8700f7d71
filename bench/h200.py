"""The stages of `bash bench/h200.sh`, which says how it is used; and what runs them one after another, each in a process of its own.

A stage keeps what it has found in OUT/STAGE.json as it goes, so that what it had when it was ended is there. OUT/summary.json has
a line for each stage: whether it did all it should, why not, its seconds, what it found in one line.
"""
import argparse
import concurrent.futures
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from device import Sampled

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CHARACTERS = 40_000             # of a stage's output that are kept: its end
FLOAT32, BF16 = 1e-4, 2e-2      # how far a tiny run's losses may be from the CPU's; tf32 is off
Keep = Callable[..., None]      # keep(name=value, ...): add to the stage's JSON, now


# What runs a stage

@dataclass
class Stage:
    "One question to the machine."
    part: int           # of the two commands that all of it takes
    seconds: int        # that it may take
    toy: int            # the same, with --toy on two cores
    work: Callable      # (args, keep) -> what went wrong, a line each


def write(file: Path, found: dict) -> None:
    "Whole or not at all."
    file.with_suffix(".part").write_text(json.dumps(found, indent=1, default=str))
    file.with_suffix(".part").replace(file)


def work(args) -> int:
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
    try: below = psutil.Process(leader).children(recursive=True)
    except psutil.NoSuchProcess: below = []
    for p in below:
        try: p.kill()
        except psutil.NoSuchProcess: pass
    try: os.killpg(leader, 9)
    except ProcessLookupError: pass


def run(name: str, args, limit: float) -> dict:
    "One stage to its end, or to the end of its time."
    file, begun, over, code = args.out / f"{name}.json", time.monotonic(), False, None
    file.unlink(missing_ok=True)
    words = [sys.executable, __file__, "--work", name, "--out", str(args.out), *(["--toy"] if args.toy else []), *(["--model", args.model] if args.model else [])]
    with Sampled() as device, tempfile.TemporaryFile("w+", errors="replace") as log, tempfile.TemporaryDirectory(prefix="h200-", ignore_cleanup_errors=True) as own:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT, env=os.environ | {"TMPDIR": own})      # 14 GB of it at 7B: gone with the stage
        try: code = process.wait(limit)
        except subprocess.TimeoutExpired: over = True
        end(process.pid)
        process.wait()
        log.seek(0)
        said = log.read()[-CHARACTERS:]
    found = json.loads(file.read_text())["found"] if file.is_file() else {}
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    why = f"ended after its {limit:.0f} s" if over else "; ".join(found.get("wrong", [])) or (f"exit code {code}: {last[:300]}" if code else "")
    told = {"stage": name, "ok": not why, "why": why, "seconds": round(time.monotonic() - begun, 1), "limit": round(limit), "headline": found.get("headline", ""), "device": device.found}
    write(file, told | {"found": found, "log": said})
    return told


def table(told: list[dict]) -> str:
    lines = [f"{'stage':12} {'':4} {'seconds':>7} {'GB':>6} {'W':>5}  found, or why not"]
    for t in told:
        memory, power = t["device"].get("memory_mib_max"), t["device"].get("power_w_max")
        lines.append(f"{t['stage']:12} {'ok' if t['ok'] else 'BAD':4} {t['seconds']:7.1f} {f'{memory * 1024**2 / 1e9:.1f}' if memory else '-':>6} {f'{power:.0f}' if power else '-':>5}  "
                     + " | ".join(filter(None, (t["why"], t["headline"]))))
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stages", nargs="*", help=f"1, 2, or of {', '.join(STAGES)}; none: all")
    p.add_argument("--toy", action="store_true", help="toy shapes, for a CPU")
    p.add_argument("--model", help="a llava-hf folder for the runs of train.py, in place of random weights")
    p.add_argument("--minutes", type=float, help="for all stages together (default: 7.5 for part 1, 6 for part 2)")
    p.add_argument("--limit", action="append", default=[], metavar="STAGE=SECONDS", help="another limit for a stage")
    p.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/h200")), help=argparse.SUPPRESS)
    p.add_argument("--work", choices=STAGES, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.toy: os.environ["TORCH_COMPILE_DISABLE"] = "1"      # on a CPU a minute for each kernel, which then has no backward pass
    if args.work: return work(args)
    names = [n for n, stage in STAGES.items() if not args.stages or n in args.stages or str(stage.part) in args.stages]
    if unknown := set(args.stages) - {"1", "2", *STAGES}: p.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    limits = {n: STAGES[n].toy if args.toy else STAGES[n].seconds for n in names} | {n: float(s) for n, s in (word.split("=") for word in args.limit)}
    parts = {STAGES[n].part for n in names}
    minutes = args.minutes or (60 if args.toy else sum({1: 7.5, 2: 6.0}[k] for k in parts))
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    told, until = [], time.monotonic() + 60 * minutes
    for name in names:
        left = until - time.monotonic()
        if left > 5: told.append(run(name, args, min(limits[name], left)))
        else: told.append({"stage": name, "ok": False, "why": f"not begun: the {minutes:g} minutes were over", "seconds": 0.0, "limit": 0, "headline": "", "device": {}})
        write(args.out / "summary.json", {"stages": told, "table": table(told), "command": sys.argv[1:], "minutes": minutes})
        print(table(told[-1:]).splitlines()[1], flush=True)
    print(f"\n{table(told)}\n{args.out / 'summary.json'}", flush=True)
    return int(not all(t["ok"] for t in told))


# What more than one stage uses

def cuda() -> bool:
    import torch
    return torch.cuda.is_available()


def timed(do: Callable, repeats: int, warm: int = 2) -> list[float]: # ms of each
    "Seconds by the wall, the device waited for before and after."
    import torch
    wait, found = torch.cuda.synchronize if cuda() else lambda: None, []
    for n in range(warm + repeats):
        wait()
        begun = time.perf_counter()
        do()
        wait()
        if n >= warm: found.append(1e3 * (time.perf_counter() - begun))
    return found


def spread(ms: list[float]) -> dict: return {"ms": statistics.median(ms), "least": min(ms), "most": max(ms)}


def folder() -> tempfile.TemporaryDirectory: return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


@dataclass
class Trained:
    "A run of train.py to its end."
    code: int
    said: str               # the end of it
    seconds: float
    history: list[dict]     # one a logged step

    @property
    def losses(self) -> list[float]: return [h["loss"] for h in self.history]


def train(file: Path, *, cpu: bool = False, launcher: bool = False, program: list[str] | None = None) -> Trained:
    "Start train.py as a user would, and read what it has left."
    import runs
    how = runs.command(file, 0)
    start = program or [str(ROOT / "llava_nb" / "train.py")]
    how["args"] = [sys.executable, *start, *(["launch", "--ranks", "1"] if launcher else []), str(file), *(["--use_cpu", "True"] if cpu else [])]
    how["env"] |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "PATH": os.environ["PATH"], "LLAVA_NB_CACHE": str(file.parent / f"cache-{file.stem}")}
    if cpu: how["env"] |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    begun = time.monotonic()
    done = subprocess.run(**how, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    state = Path(json.loads(file.read_text())["output_dir"]) / "trainer_state.json"
    history = [h for h in json.loads(state.read_text())["log_history"] if "loss" in h] if state.is_file() else []
    return Trained(done.returncode, done.stdout[-6_000:], round(time.monotonic() - begun, 1), history)


def all_at_once(jobs: dict[str, Callable]) -> dict:
    "Processes side by side: starting takes most of a small run's time."
    with concurrent.futures.ThreadPoolExecutor(min(len(jobs), max(2, (os.cpu_count() or 2) // 2))) as pool:
        return dict(zip(jobs, pool.map(lambda job: job(), jobs.values())))


# The stages

def machine(args, keep: Keep) -> list[str]:
    "What it is, and how fast."
    import torch
    from llava_nb.meter import datasheet_rate, matmul_rate
    names = ("torch", "transformers", "deepspeed", "liger-kernel", "triton", "accelerate", "tokenizers", "safetensors", "pillow", "numpy", "pyarrow", "flash-attn", "pydantic")
    found = {}
    for name in names:
        try: found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError: found[name] = "none"
    where = {name: getattr(__import__(name), "__file__", "") for name in ("deepspeed", "transformers") if found[name] != "none"}
    keep(python=platform.python_version(), versions=found, where=where, cuda=torch.version.cuda, cores=os.cpu_count(), memory_gb=psutil.virtual_memory().total / 1e9,
         disk_free_gb=shutil.disk_usage(tempfile.gettempdir()).free / 1e9, shm_gb=shutil.disk_usage("/dev/shm").total / 1e9 if Path("/dev/shm").is_dir() else None)
    device = "cuda" if cuda() else "cpu"
    if cuda(): keep(gpu=torch.cuda.get_device_name(), capability=torch.cuda.get_device_capability(), datasheet_tflops=(datasheet_rate(torch.cuda.get_device_name()) or 0) / 1e12,
                    nvidia_smi=subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,POWER,TEMPERATURE,PERFORMANCE"], capture_output=True, text=True).stdout[:20_000])
    size = 256 if args.toy else None
    rates = {str(t).removeprefix("torch."): matmul_rate(device, t, size) / 1e12 for t in (torch.bfloat16, torch.float32)}
    keep(matmul_tflops=rates)
    keep(copy_gb_per_s=copies(device, 1 << (20 if args.toy else 32)))
    libraries = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "deepspeed"))
    keep(headline=f"{torch.cuda.get_device_name() if cuda() else 'CPU'}, {libraries}, " + ", ".join(f"{name} {rate:.1f} TFLOP/s" for name, rate in rates.items()))
    return [f"{name} is not installed" for name in ("deepspeed",) if found[name] == "none"]


def copies(device: str, size: int) -> dict[str, float]: # GB/s, bytes read and written counted where both are in one memory
    "Within the device, to it and from it."
    import torch
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"within": 2 * size / min(timed(lambda: b.copy_(a), 5)) / 1e6}
    if device == "cuda":
        host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True)
        part = a[:size // 4]
        found |= {"to": len(part) / min(timed(lambda: part.copy_(host), 3)) / 1e6, "from": len(part) / min(timed(lambda: host.copy_(part), 3)) / 1e6}
    return found


HEADS = {"1B": (32, 4, 64), "7B": (32, 32, 128), "shared keys": (32, 8, 128)}


def row_lengths(tokens: int) -> list[int]:
    "Of the mixture's records, as many as make a row."
    from llava_nb.sampler import mix665k_sample
    drawn, found = mix665k_sample()["tokens"][:4096], []
    for n in drawn.tolist():
        if sum(found) + n > tokens: break
        found.append(n)
    return found + [tokens - sum(found)] * (sum(found) < tokens)


def kernels(args, keep: Keep) -> list[str]:
    "Each attention and each loss, its proof and its time."
    import torch
    from llava_nb.attention import BACKENDS, objection
    device, dtype = ("cuda", torch.bfloat16) if cuda() else ("cpu", torch.float32)
    lengths = row_lengths(256 if args.toy else 8192) if not args.toy else [100, 156]
    keep(tokens=sum(lengths), loss=loss_kernels(args, device, dtype))
    found, wrong, shapes = {}, [], {"toy": (4, 2, 16)} if args.toy else HEADS
    last = [b for b in BACKENDS if b != "flex"], ["flex"]      # which compiles for every shape, so that the others are kept
    for shape, backend in [(s, b) for group in last for s in shapes for b in group]:
        found[f"{shape}, {backend}"] = told = attention_kernel(backend, shapes[shape], lengths, device, dtype)
        keep(attention=found)
        if told["objection"] and (backend == "sdpa" or "differs" in told["objection"]): wrong.append(f"{shape}, {backend}: {told['objection']}")
    keep(windows={f"{shape}, {b}": objection(b, device, dtype, heads, 50) for b in BACKENDS for shape, heads in shapes.items() if not found[f"{shape}, {b}"]["objection"]})
    best = {shape: min((t["forward"]["ms"] + t["backward"]["ms"], key.split(", ")[1]) for key, t in found.items() if key.startswith(f"{shape},") and "forward" in t) for shape in dict.fromkeys(key.split(", ")[0] for key in found)}
    refused = {key.split(", ")[1]: t["objection"] for key, t in found.items() if t["objection"]}
    keep(headline=", ".join(f"{s} {b} {ms:.1f} ms" for s, (ms, b) in best.items()) + "".join(f"; not {b}: {why[:80]}" for b, why in refused.items()))
    return wrong


def attention_kernel(backend: str, heads: tuple, lengths: list[int], device: str, dtype) -> dict:
    import torch
    from llava_nb.attention import BACKENDS, objection
    begun = time.perf_counter()
    told = {"objection": objection(backend, device, dtype, heads), "proof_s": time.perf_counter() - begun}
    if told["objection"]: return told
    places = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    q, k, v = (torch.randn(1, n, sum(lengths), heads[2], device=device, dtype=dtype, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = heads[0] // heads[1], True, True
    call = lambda: BACKENDS[backend](module, q, k, v, position_ids=places, scaling=heads[2] ** -.5)      # noqa: E731
    begun = time.perf_counter()
    grad = torch.randn_like(call())
    told["first_s"] = time.perf_counter() - begun      # with compilation
    with torch.no_grad(): forward = timed(call, 10)
    both = timed(lambda: torch.autograd.grad(call(), (q, k, v), grad), 10)
    operations = 2 * heads[0] * heads[2] * sum(n * n for n in lengths)
    backward = [max(b - statistics.median(forward), 1e-6) for b in both]
    return told | {"forward": spread(forward) | {"tflops": operations / statistics.median(forward) / 1e9}, "backward": spread(backward) | {"tflops": 2.5 * operations / statistics.median(backward) / 1e9}}


def loss_kernels(args, device: str, dtype) -> dict:
    import loss
    import torch
    from llava_nb.cross_entropy import LOSS_KERNELS, loss_objection
    sizes = argparse.Namespace(positions=64, rows=500, width=32, repeats=2) if args.toy else argparse.Namespace(positions=4096, rows=32_000, width=4096, repeats=10)
    found = {}
    for kernel in (*LOSS_KERNELS, *(["torch"] if hasattr(torch.nn.functional, "linear_cross_entropy") else []), "all logits"):
        told = {"objection": loss_objection(kernel, device, dtype) if kernel in LOSS_KERNELS else ""}
        if not told["objection"]:
            if cuda(): torch.cuda.reset_peak_memory_stats()
            measured = loss.measure(kernel, sizes)
            told |= spread([1e3 * s for s in measured["seconds"]]) | {"mb": measured["bytes"] / 1e6, "loss": measured["loss"]}
        found[kernel] = told
    return found


def tests(args, keep: Keep) -> list[str]:
    "Those marked `gpu`, in one process."
    with folder() as name:
        where = Path(name)
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu.py", f"--junitxml={where / 'found.xml'}"]
        done = subprocess.run(words, cwd=ROOT, text=True)
        if not (where / "found.xml").is_file(): return [f"pytest ended with exit code {done.returncode}"]
        cases = [(c.get("name"), float(c.get("time")), {part.tag: (part.get("message") or "")[:400] for part in c}) for c in xml.parse(where / "found.xml").iter("testcase")]
    bad = {name: said.get("failure", said.get("error")) for name, _, said in cases if {"failure", "error"} & said.keys()}
    skipped = sum("skipped" in said for *_, said in cases)
    keep(cases=[{"name": name, "seconds": s, **said} for name, s, said in cases], headline=f"{len(cases) - skipped - len(bad)} passed, {len(bad)} failed, {skipped} skipped")
    return [f"{name}: {why.splitlines()[0][:160] if why else 'failed'}" for name, why in bad.items()] or ([] if done.returncode in (0, 5) else [f"pytest ended with exit code {done.returncode}"])


def tiny(args, keep: Keep) -> list[str]:
    "Six steps of a tiny model by every engine and recomputation; their losses beside those of this machine's CPU."
    import runs
    cases = {"CPU": ({}, 0), "no engine": ({}, FLOAT32), "ZeRO-2": ({"zero": 2}, FLOAT32), "ZeRO-3": ({"zero": 3}, FLOAT32)}
    if cuda(): cases |= {f"{name}, bf16": (changes | {"bf16": True}, BF16) for name, changes in (("no engine", {}), ("ZeRO-2", {"zero": 2}), ("ZeRO-3", {"zero": 3}))}
    if cuda(): cases |= {f"ZeRO-2, bf16, recompute {how}": ({"zero": 2, "bf16": True, "recompute": how}, BF16) for how in ("cheap", "full")}
    with folder() as name:
        where = Path(name)
        world = runs.make_world(where)
        own = {"model": args.model} if args.model else {}
        files = {name: runs.config(world, name.replace(", ", "-").replace(" ", "_"), max_steps=6, save_strategy="no", **own, **changes)[0] for name, (changes, _) in cases.items()}
        found = all_at_once({name: (lambda f=file, n=name: train(f, cpu=n == "CPU", launcher=n == "ZeRO-3")) for name, file in files.items()})
    expected, apart, wrong = found["CPU"].losses, {}, []
    for name, t in found.items():
        apart[name] = max((abs(a - b) for a, b in zip(t.losses, expected)), default=None)
        if t.code or len(t.losses) != 6: wrong.append(f"{name}: exit code {t.code}, {len(t.losses)} of 6 steps: {t.said.strip().splitlines()[-1][:200] if t.said.strip() else ''}")
        elif len(expected) == 6 and apart[name] > cases[name][1]: wrong.append(f"{name}: a loss is {apart[name]:.1e} from the CPU's, more than {cases[name][1]:g}")
    keep(runs={name: {"losses": t.losses, "farthest": apart[name], "may be": cases[name][1], "seconds": t.seconds, "code": t.code, "said": t.said[-3_000:] if t.code else ""} for name, t in found.items()},
         headline=", ".join(f"{name} {apart[name]:.0e}" for name in found if name != "CPU" and apart[name] is not None) + " from the CPU's losses")
    return wrong


def resume(args, keep: Keep) -> list[str]:
    "A run that is killed with -9 and goes on, beside one that nothing happens to: with deterministic algorithms the same to the bit."
    import runs
    cases = {"as it comes": {}, "deterministic": {"full_determinism": True}}
    if cuda(): cases = {f"{name}{engine}": c | changes for name, c in cases.items() for engine, changes in (("", {"bf16": True}), (", ZeRO-2", {"bf16": True, "zero": 2}))}
    if args.toy: cases = {"as it comes": {}}
    with folder() as name:
        where = Path(name)
        worlds = {}
        for dropout in (.1,) if args.toy else (0.0, .1):
            (where / str(dropout)).mkdir()
            worlds[dropout] = runs.make_world(where / str(dropout), dropout)
        jobs = {f"{name}, dropout {dropout}": (lambda w=world, n=name, c=changes: interrupted(w, n, c, args)) for dropout, world in worlds.items() for name, changes in cases.items()}
        found = all_at_once(jobs)
    keep(runs=found, headline=", ".join(f"{name} {t['losses apart']:.0e}" for name, t in found.items() if "losses apart" in t) + " between the losses")
    return [f"{name}: {t['wrong']}" for name, t in found.items() if t["wrong"]]


def interrupted(world: Path, name: str, changes: dict, args) -> dict:
    import runs
    own = {"max_steps": 8, "save_steps": 2, **({"model": args.model} if args.model else {}), **changes}
    label = name.replace(", ", "-").replace(" ", "_")
    whole, killed = (runs.config(world, f"{label}-{kind}", **own)[0] for kind in ("whole", "killed"))
    try:
        process = runs.started(killed, 0, 4)
        process.kill()
        process.wait()
        process.stdout.close()
    except AssertionError: return {"wrong": train(whole).said.strip()[-300:] or "no step was logged"}
    runs_of = train(whole), train(killed)
    if any(t.code for t in runs_of): return {"wrong": f"exit codes {[t.code for t in runs_of]}: {next(t for t in runs_of if t.code).said.strip()[-300:]}"}
    a, b = (t.losses for t in runs_of)
    losses, weights = max(abs(x - y) for x, y in zip(a, b)), runs.farthest(*(runs.weights(Path(json.loads(f.read_text())["output_dir"])) for f in (whole, killed)))
    exact = args.toy or "full_determinism" in changes
    may = 0.0 if exact else BF16
    wrong = "" if len(a) == len(b) == 8 and losses <= may and (not exact or weights == 0) else f"{len(b)} of 8 losses, {losses:.1e} apart, weights {weights:.1e}"
    return {"wrong": wrong, "losses": a, "resumed": b, "losses apart": losses, "weights apart": weights}


def by_bench(*flags: str) -> Callable:
    "A stage that runs bench/gpu.py."
    def work(args, keep: Keep) -> list[str]:
        own = list(flags)
        if args.toy:
            own[own.index("--shape") + 1] = "toy"
            for name, value in (("--steps", "2"), ("--minutes", "1"), ("--max-tokens", "512")):
                if name in own: own[own.index(name) + 1] = value
        with folder() as name:
            where = Path(name)
            done = subprocess.run([sys.executable, "bench/gpu.py", *own, "--json", str(where / "found.json")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout)
            if done.returncode: return [f"exit code {done.returncode}: {done.stdout.strip().splitlines()[-1][:300]}"]
            found = json.loads((where / "found.json").read_text())
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in found["table"].splitlines()]
        told = [dict(zip(rows[0], row)) for row in rows[2:]]
        keep(**found, headline="; ".join(f"{t['']} {t['real tokens/s']} tokens/s, MFU {', '.join(v for k, v in t.items() if k.startswith('strict'))}, {t['peak memory']}" for t in told))
        return [f"out of memory: {line}" for line in done.stdout.splitlines() if "out of memory" in line]
    return work


def records_of(where: Path, n: int, toy: bool) -> None:
    "Records of the mixture's lengths, a picture of its own for each that has one."
    import gpu
    from llava_nb.masking import tiny_tokenizer
    from llava_nb.sampler import mix665k_sample
    drawn, shot, found = mix665k_sample(), gpu.picture(where), []
    a_word = len(tiny_tokenizer()(" ".join(f"word{k % 50}" for k in range(1000))).input_ids) / 1000
    for k in range(n):
        tokens, learned, shown = (drawn[name][k] for name in ("tokens", "supervised", "image"))
        asked, answered = (max(1, int(t / a_word / (20 if toy else 1))) for t in (tokens - learned - (576 if shown else 0) - 40, learned))
        record = {"id": str(k), "conversations": [{"from": "human", "value": "<image>\n" * bool(shown) + " ".join(f"word{j % 50}" for j in range(asked))}, {"from": "gpt", "value": " ".join(f"word{(j + k) % 50}" for j in range(answered))}]}
        if shown:
            os.link(shot, where / f"{k}.jpg")
            record["image"] = f"{k}.jpg"
        found.append(record)
    (where / "records.json").write_text(json.dumps(found))


def model_of(shape: str, where: Path) -> None:
    "A llava-hf folder with random weights, made on the device."
    import gpu
    import torch
    from llava_nb.checkpoint import save_llava
    from llava_nb.llava import build_llava
    from llava_nb.masking import tiny_tokenizer
    from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil
    config, tokenizer = gpu.configuration(gpu.SHAPES[shape]), tiny_tokenizer()
    dtype, side = torch.bfloat16 if cuda() else torch.float32, config.vision_config.image_size
    torch.manual_seed(0)
    with gpu.DEVICE: text, tower = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype), AutoModel.from_config(config.vision_config, dtype=dtype)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    save_llava(build_llava(text, tower, tokenizer), where / "model", tokenizer, processor)


# The result of 7B is 14 GB on the disk, and nobody wants it.
UNSAVED = ("import sys, llava_nb.train as train; sys.argv[0] = 'train.py'; "
           "train.trainer.LlavaTrainer.export = lambda self: self.state.save_to_json(self.args.output_dir + '/trainer_state.json'); train.program()")


def by_train(shape: str, steps: int, **changes) -> Callable:
    "A stage that runs train.py and reads its own meter."
    def work(args, keep: Keep) -> list[str]:
        made = "toy" if args.toy else shape
        n = 3 if args.toy else steps
        with folder() as name:
            where = Path(name)
            records_of(where, 16 * (n + 2), args.toy)
            begun = time.monotonic()
            if not args.model: model_of(made, where)
            keep(model_made_s=time.monotonic() - begun)
            settings = {"model": args.model or str(where / "model"), "data_path": str(where / "records.json"), "image_folder": str(where), "output_dir": str(where / "run"), "template": "v1", "image_aspect_ratio": "pad",
                        "model_max_length": 2048, "stage": 2, "max_steps": n, "per_device_train_batch_size": 16, "learning_rate": 1e-5, "save_strategy": "no", "report_to": "none",
                        "dataloader_num_workers": 0 if args.toy else 8, "disable_tqdm": True, "max_tokens": 2048 if args.toy else 16_384, "bf16": cuda(), **changes}
            if args.toy: settings |= {"max_tokens": 2048}
            (where / "run.json").write_text(json.dumps(settings))
            t = train(where / "run.json", program=["-c", UNSAVED])
        print(t.said)
        steady = t.history[len(t.history) // 4:]
        read = {k: statistics.median(h[k] for h in steady) for k in (steady[0] if steady else {}) if isinstance(steady[0][k], (int, float)) and all(k in h for h in steady)}
        lines = [line for line in t.said.splitlines() if line.startswith(("attention", "preflight", "ranks"))]
        keep(settings=settings, seconds=t.seconds, code=t.code, history=t.history, median=read, lines=lines, headline=f"{read.get('tokens_per_second', 0):,.0f} tokens/s, MFU "
             + ", ".join(f"{v:.1%}" for k, v in read.items() if k.startswith("mfu_")) + f", waiting {read.get('data_wait', 0):.1%}, {read.get('peak_memory_gb', 0):.1f} GB, {len(t.history)} steps")
        return [] if t.code == 0 and len(t.history) == n else [f"exit code {t.code}, {len(t.history)} of {n} steps: {t.said.strip().splitlines()[-1][:300] if t.said.strip() else ''}"]
    return work


STAGES = {
    "machine": Stage(1, 45, 120, machine), "kernels": Stage(1, 120, 240, kernels), "tests": Stage(1, 100, 300, tests), "tiny": Stage(1, 90, 400, tiny), "resume": Stage(1, 90, 400, resume),
    "train1b": Stage(1, 100, 300, by_train("1b", 25, zero=2)), "bench1b": Stage(1, 110, 240, by_bench("--shape", "1b", "--steps", "24", "--minutes", "1.4")),
    "bench7b": Stage(2, 150, 240, by_bench("--shape", "7b", "--variants", "ours", "--recompute", "full", "cheap", "--max-tokens", "8192", "--steps", "12", "--minutes", "2")),
    "train7b": Stage(2, 150, 300, by_train("7b", 8, zero=3, recompute="full", max_tokens=8192)),
    "padded7b": Stage(2, 120, 240, by_bench("--shape", "7b", "--variants", "ours", "padded", "stock", "--recompute", "full", "--max-tokens", "8192", "--steps", "8", "--minutes", "1.6")),
}

if __name__ == "__main__": sys.exit(main())
