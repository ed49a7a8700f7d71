"""The stages of bench/h200.py. Each is called with the arguments and `keep(name=value)`, which adds to its JSON at
once, and returns what went wrong, a line each. Heavy imports are inside: a stage that cannot import says so alone."""

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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
FLOAT32, BF16 = 1e-4, 2e-2  # how far a tiny run's losses may be from the CPU's; tf32 is off
Keep = Callable[..., None]


# What several stages use


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="h200-", ignore_cleanup_errors=True)


def last_line(said: str) -> str:
    "The last line of an output that says something, cut."
    return next((line.strip()[:300] for line in reversed(said.splitlines()) if line.strip()), "")


def timed(do: Callable, repeats: int, warm: int = 2) -> list[float]:  # ms of each
    "By the wall, the device waited for before and after."
    import torch

    wait, found = torch.cuda.synchronize if cuda() else lambda: None, []
    for n in range(warm + repeats):
        wait()
        begun = time.perf_counter()
        do()
        wait()
        if n >= warm:
            found.append(1e3 * (time.perf_counter() - begun))
    return found


def spread(ms: list[float]) -> dict:
    return {"ms": statistics.median(ms), "least": min(ms), "most": max(ms)}


@dataclass
class Trained:
    "A run of train.py to its end."

    code: int
    said: str  # the end of it
    seconds: float
    history: list[dict]  # one a logged step

    @property
    def losses(self) -> list[float]:
        return [h["loss"] for h in self.history]

    def check_attention_backend(self, steps: int) -> str:  # "": it did them all
        if self.code == 0 and len(self.history) == steps:
            return ""
        return f"exit code {self.code}, {len(self.history)} of {steps} steps: {last_line(self.said)}"


def train(file: Path, *, cpu: bool = False, launcher: bool = False, program: list[str] | None = None) -> Trained:
    "Start train.py as a user would, and read what it has left."
    import runs

    how = runs.command(file, 0)
    start = program or [str(ROOT / "llava_nb" / "train.py")]
    through, on = ["launch", "--ranks", "1"] * launcher, ["--use_cpu", "True"] * cpu
    how["args"] = [sys.executable, *start, *through, str(file), *on]
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    how["env"] |= {"PYTHONPATH": places, "PATH": os.environ["PATH"]}
    how["env"]["LLAVA_NB_CACHE"] = str(file.parent / f"cache-{file.stem}")
    if cpu:
        how["env"] |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    begun = time.monotonic()
    done = subprocess.run(**how, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    state = Path(json.loads(file.read_text())["output_dir"]) / "trainer_state.json"
    history = [h for h in json.loads(state.read_text())["log_history"] if "loss" in h] if state.is_file() else []
    return Trained(done.returncode, done.stdout[-6_000:], round(time.monotonic() - begun, 1), history)


def all_at_once(jobs: dict[str, Callable]) -> dict:
    "Processes side by side: starting takes most of a small run's time."
    with concurrent.futures.ThreadPoolExecutor(min(len(jobs), max(2, (os.cpu_count() or 2) // 2))) as pool:
        return dict(zip(jobs, pool.map(lambda job: job(), jobs.values())))


# machine

LIBRARIES = (
    "torch",
    "transformers",
    "deepspeed",
    "liger-kernel",
    "triton",
    "accelerate",
    "tokenizers",
    "safetensors",
    "pillow",
    "numpy",
    "pyarrow",
    "flash-attn",
    "pydantic",
)


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def machine(args, keep: Keep) -> list[str]:
    "What it is, and how fast."
    import torch

    from llava_nb.fast.meter import matmul_rate

    found = {name: version(name) for name in LIBRARIES}
    where = {name: __import__(name).__file__ for name in ("deepspeed", "transformers") if found[name] != "none"}
    keep(python=platform.python_version(), versions=found, where=where, cuda=torch.version.cuda, cores=os.cpu_count())
    shm = shutil.disk_usage("/dev/shm").total / 1e9 if Path("/dev/shm").is_dir() else None
    disk = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    keep(memory_gb=psutil.virtual_memory().total / 1e9, disk_free_gb=disk, shm_gb=shm)
    device, name = ("cuda", torch.cuda.get_device_name()) if cuda() else ("cpu", "CPU")
    if cuda():
        keep(gpu=name, capability=torch.cuda.get_device_capability(), nvidia_smi=readings())
    size = 256 if args.toy else None
    kinds = {"bf16": torch.bfloat16, "float32": torch.float32}
    rates = {kind: matmul_rate(device, dtype, size) / 1e12 for kind, dtype in kinds.items()}
    keep(matmul_tflops=rates, copy_gb_per_s=copies(device, 1 << (20 if args.toy else 32)))
    libraries = ", ".join(f"{library} {found[library]}" for library in ("torch", "transformers", "deepspeed"))
    keep(headline=f"{name}, {libraries}, " + ", ".join(f"{kind} {rate:.1f} TFLOP/s" for kind, rate in rates.items()))
    return [] if found["deepspeed"] != "none" else ["deepspeed is not installed"]


def readings() -> str:
    words = ["nvidia-smi", "-q", "-d", "CLOCK,POWER,TEMPERATURE,PERFORMANCE"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout[:20_000]
    except OSError as e:
        return str(e)


def copies(device: str, size: int) -> dict[str, float]:  # GB/s
    "Within the device, bytes read and written counted; to it and from it."
    import torch

    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {"within": 2 * size / min(timed(lambda: b.copy_(a), 5)) / 1e6}
    if device == "cuda":
        host, part = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True), a[: size // 4]
        found["to"] = len(part) / min(timed(lambda: part.copy_(host), 3)) / 1e6
        found["from"] = len(part) / min(timed(lambda: host.copy_(part), 3)) / 1e6
    return found


# kernels

HEADS = {"1B": (32, 4, 64), "7B": (32, 32, 128), "shared keys": (32, 8, 128)}


def row_lengths(tokens: int) -> list[int]:
    "Of the mixture's records, as many as make a row."
    from llava_nb.sampler import mix665k_sample

    found = []
    for n in mix665k_sample()["tokens"][:4096].tolist():
        if sum(found) + n > tokens:
            break
        found.append(n)
    return found + [tokens - sum(found)] * (sum(found) < tokens)


def kernels(args, keep: Keep) -> list[str]:
    "Each attention and each loss, its proof and its time."
    import torch

    from llava_nb.fast.attention import BACKENDS, check_attention_backend

    device, dtype = ("cuda", torch.bfloat16) if cuda() else ("cpu", torch.float32)
    lengths, shapes = ([100, 156], {"toy": (4, 2, 16)}) if args.toy else (row_lengths(8192), HEADS)
    keep(tokens=sum(lengths), loss=loss_kernels(args, device, dtype))
    found, wrong = {}, []
    order = [b for b in BACKENDS if b != "flex"], ["flex"]  # which compiles for every shape: last
    for shape, backend in [(s, b) for some in order for s in shapes for b in some]:
        found[f"{shape}, {backend}"] = told = attention_kernel(backend, shapes[shape], lengths, device, dtype)
        keep(attention=found, headline=kernels_line(found))
        if "differs" in told["objection"]:
            wrong.append(f"{shape}, {backend}: {told['objection']}")
    run = [(s, b) for s in shapes for b in BACKENDS if not found[f"{s}, {b}"]["objection"]]
    windows = {f"{s}, {b}": check_attention_backend(b, device, dtype, shapes[s], 50) for s, b in run}
    keep(windows=windows)
    return wrong + [f"{key}, window: {why}" for key, why in windows.items() if why]


def kernels_line(found: dict) -> str:
    "The fastest for each shape, and those that were refused."
    took = {key: t["forward"]["ms"] + t["backward"]["ms"] for key, t in found.items() if "forward" in t}
    best = {}
    for key in sorted(took, key=took.get):
        best.setdefault(key.split(", ")[0], f"{key} {took[key]:.1f} ms")
    refused = {key.split(", ")[1]: t["objection"] for key, t in found.items() if t["objection"]}
    return "; ".join([*best.values(), *(f"not {b}: {why[:80]}" for b, why in refused.items())])


def attention_kernel(backend: str, heads: tuple, lengths: list[int], device: str, dtype) -> dict:
    import torch

    from llava_nb.fast.attention import BACKENDS, check_attention_backend

    begun = time.perf_counter()
    told = {"objection": check_attention_backend(backend, device, dtype, heads), "proof_s": time.perf_counter() - begun}
    if told["objection"]:
        return told
    places, total = torch.cat([torch.arange(n) for n in lengths])[None].to(device), sum(lengths)
    made = {"device": device, "dtype": dtype, "requires_grad": True}
    q, k, v = (torch.randn(1, n, total, heads[2], **made) for n in (heads[0], heads[1], heads[1]))
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.training = heads[0] // heads[1], True, True

    def call():
        return BACKENDS[backend](module, q, k, v, position_ids=places, scaling=heads[2] ** -0.5)

    begun = time.perf_counter()
    grad = torch.randn_like(call())
    told["first_s"] = time.perf_counter() - begun  # with compilation
    with torch.no_grad():
        forward = timed(call, 10)
    both, middle = timed(lambda: torch.autograd.grad(call(), (q, k, v), grad), 10), statistics.median(forward)
    backward = [max(b - middle, 1e-6) for b in both]
    operations = 2 * heads[0] * heads[2] * sum(n * n for n in lengths) / 1e9
    rates = {"forward": operations / middle, "backward": 2.5 * operations / statistics.median(backward)}
    ways = {"forward": forward, "backward": backward}
    return told | {way: spread(ms) | {"tflops": rates[way]} for way, ms in ways.items()}


def loss_kernels(args, device: str, dtype) -> dict:
    import loss
    import torch

    from llava_nb.fast.cross_entropy import LOSS_KERNELS, check_loss_kernel

    names, sizes = ("positions", "rows", "width", "repeats"), (64, 500, 32, 2) if args.toy else (4096, 32_000, 4096, 10)
    torch_has = hasattr(torch.nn.functional, "linear_cross_entropy")
    found = {}
    for kernel in (*LOSS_KERNELS, *["torch"] * torch_has, "all logits"):
        found[kernel] = {"objection": check_loss_kernel(kernel, device, dtype) if kernel in LOSS_KERNELS else ""}
        if found[kernel]["objection"]:
            continue
        if cuda():
            torch.cuda.reset_peak_memory_stats()
        read = loss.measure(kernel, argparse.Namespace(**dict(zip(names, sizes))))
        found[kernel] |= spread([1e3 * s for s in read["seconds"]])
        found[kernel] |= {"mb": read["bytes"] / 1e6, "loss": read["loss"]}
    return found


# tests


def by_pytest(chosen: str) -> Callable:
    "A stage that runs tests marked `gpu`, in one process."

    def work(args, keep: Keep) -> list[str]:
        with folder() as name:
            report = Path(name) / "found.xml"
            words = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen, f"--junitxml={report}"]
            code = subprocess.run([sys.executable, "-m", "pytest", *words, "tests/test_gpu.py"], cwd=ROOT).returncode
            if not report.is_file():
                return [f"pytest ended with exit code {code}"]
            cases = [case(c) for c in xml.parse(report).iter("testcase")]
        bad, skipped = [c for c in cases if c["bad"]], sum(c["skipped"] for c in cases)
        keep(cases=cases, headline=f"{len(cases) - skipped - len(bad)} passed, {len(bad)} failed, {skipped} skipped")
        if code not in (0, 1):
            return [f"pytest ended with exit code {code}"]
        return [f"{c['name']}: {c['bad'][:160]}" for c in bad]

    return work


def case(found: xml.Element) -> dict:
    "One test of a report; `bad` is the first line of what failed."
    said = {part.tag: part.get("message") or part.tag for part in found}
    bad = (said.get("failure") or said.get("error") or "").splitlines()[:1]
    name, seconds = found.get("name"), float(found.get("time"))
    return {"name": name, "seconds": seconds, "bad": "".join(bad)[:400], "skipped": "skipped" in said}


# tiny and resume


def label(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def engines() -> dict[str, tuple[dict, float]]:
    "Settings by name, and how far their losses may be from the CPU's."
    found = {"CPU": ({}, 0.0), "no engine": ({}, FLOAT32)} | {f"ZeRO-{k}": ({"zero": k}, FLOAT32) for k in (2, 3)}
    if not cuda():
        return found
    found |= {f"{name}, bf16": (changes | {"bf16": True}, BF16) for name, (changes, _) in list(found.items())[1:]}
    again = {"zero": 2, "bf16": True}
    return found | {f"ZeRO-2, bf16, recompute {how}": (again | {"recompute": how}, BF16) for how in ("cheap", "full")}


def tiny(args, keep: Keep) -> list[str]:
    "Six steps of a tiny model by every engine and recomputation; their losses beside those of this machine's CPU."
    import runs

    cases, own = engines(), {"model": args.model} if args.model else {}
    with folder() as name:
        world, jobs = runs.make_world(Path(name)), {}
        for case, (changes, _) in cases.items():
            file, _ = runs.config(world, label(case), max_steps=6, save_strategy="no", **own, **changes)
            jobs[case] = lambda f=file, c=case: train(f, cpu=c == "CPU", launcher=c == "ZeRO-3")
        found = all_at_once(jobs)
    expected, told = found["CPU"].losses, {}
    for case, t in found.items():
        apart = max((abs(a - b) for a, b in zip(t.losses, expected)), default=None)
        most, wrong = cases[case][1], t.check_attention_backend(6)
        if not wrong and apart is not None and apart > most:
            wrong = f"a loss is {apart:.1e} from the CPU's, more than {most:g}"
        told[case] = {"losses": t.losses, "farthest": apart, "may be": most, "seconds": t.seconds, "wrong": wrong}
        if told[case]["wrong"]:
            told[case]["said"] = t.said
    far = [f"{case} {t['farthest']:.0e}" for case, t in told.items() if case != "CPU" and t["farthest"] is not None]
    keep(runs=told, headline=", ".join(far) + " from the CPU's losses")
    return [f"{case}: {t['wrong']}" for case, t in told.items() if t["wrong"]]


def resume(args, keep: Keep) -> list[str]:
    "Runs killed with -9 that go on, beside undisturbed ones: with deterministic algorithms the same to the bit."
    import runs

    kinds = {"as it comes": {}} if args.toy else {"as it comes": {}, "deterministic": {"full_determinism": True}}
    engines = {"": {"bf16": True}, ", ZeRO-2": {"bf16": True, "zero": 2}} if cuda() else {"": {}}
    with folder() as name:
        jobs = {}
        for dropout in (0.1,) if args.toy else (0.0, 0.1):
            where = Path(name) / str(dropout)
            where.mkdir()
            world = runs.make_world(where, dropout)
            for kind, engine in ((k, e) for k in kinds for e in engines):
                settings = kinds[kind] | engines[engine] | ({"model": args.model} if args.model else {})
                case = f"{kind}{engine}, dropout {dropout}"
                jobs[case] = lambda w=world, c=case, s=settings: interrupted(w, c, s, args.toy)
        found = all_at_once(jobs)
    far = [f"{case} {t['losses apart']:.0e}" for case, t in found.items() if "losses apart" in t]
    keep(runs=found, headline=", ".join(far) + " between the losses")
    return [f"{case}: {t['wrong']}" for case, t in found.items() if t["wrong"]]


def interrupted(world: Path, case: str, settings: dict, exact: bool) -> dict:
    "One run in peace, one killed after its fourth step and started again; `exact`: the same to the bit."
    import runs

    settings = settings | {"max_steps": 8, "save_steps": 2}
    both = [runs.config(world, f"{label(case)}-{kind}", **settings)[0] for kind in ("whole", "killed")]
    try:
        process = runs.started(both[1], 0, 4)
    except AssertionError:
        return {"wrong": train(both[1]).check_attention_backend(8) or "no step was logged"}
    process.kill()
    process.wait()
    process.stdout.close()
    whole, killed = map(train, both)
    wrong = whole.check_attention_backend(8) or killed.check_attention_backend(8)
    if wrong:
        return {"wrong": wrong, "said": killed.said}
    losses = max(abs(a - b) for a, b in zip(whole.losses, killed.losses))
    weights = runs.farthest(*(runs.weights(Path(json.loads(f.read_text())["output_dir"])) for f in both))
    exact = exact or "full_determinism" in settings
    if losses > (0 if exact else BF16) or exact and weights:
        wrong = f"losses {losses:.1e}, weights {weights:.1e} apart"
    apart = {"losses apart": losses, "weights apart": weights}
    return {"wrong": wrong, "losses": whole.losses, "resumed": killed.losses} | apart


# By bench/gpu.py and by train.py


def by_bench(*flags: str) -> Callable:
    "A stage that runs bench/gpu.py."
    toy = {"--shape": "toy", "--steps": "2", "--minutes": "1", "--max-tokens": "512"}

    def work(args, keep: Keep) -> list[str]:
        own = [toy.get(before, word) if args.toy else word for before, word in zip(("", *flags), flags)]
        with folder() as name:
            file = Path(name) / "found.json"
            words = [sys.executable, "bench/gpu.py", *own, "--json", str(file), "--trace", f"{name}/trace.json.gz"]
            done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout)
            wrong = [f"exit code {done.returncode}: {last_line(done.stdout)}"] if done.returncode else []
            if not file.is_file():
                return wrong
            found = json.loads(file.read_text())
        rows = [[c.strip() for c in row.strip("|").split("|")] for row in found["table"].splitlines()]
        told = [dict(zip(rows[0], row)) for row in rows[2:]]
        rates = [", ".join(v for k, v in t.items() if k.startswith("strict")) for t in told]
        lines = [f"{t['']} {t['real tokens/s']} tokens/s, MFU {r}, {t['peak memory']}" for t, r in zip(told, rates)]
        keep(**found, headline="; ".join(lines))
        return wrong + [row for row in done.stdout.splitlines() if "out of memory" in row]

    return work


def make_records(where: Path, n: int, shorter: int) -> None:
    "Records of the mixture's lengths, a picture of its own for each that has one."
    import gpu

    from llava_nb.masking import tiny_tokenizer
    from llava_nb.sampler import mix665k_sample

    def words(count: float, k: int) -> str:
        return " ".join(f"word{(j + k) % 50}" for j in range(max(1, int(count / shorter))))

    drawn, shot, found = mix665k_sample(), gpu.picture(where), []
    tokens_a_word = len(tiny_tokenizer()(words(1000 * shorter, 0)).input_ids) / 1000
    for k in range(n):
        tokens, learned, shown = (drawn[name][k] for name in ("tokens", "supervised", "image"))
        asked = words((tokens - learned - 576 * shown - 40) / tokens_a_word, 0)
        turns = [{"from": "human", "value": "<image>\n" * bool(shown) + asked}]
        turns.append({"from": "gpt", "value": words(learned / tokens_a_word, k)})
        found.append({"id": str(k), "conversations": turns} | ({"image": f"{k}.jpg"} if shown else {}))
        if shown:
            os.link(shot, where / f"{k}.jpg")
    (where / "records.json").write_text(json.dumps(found))


def make_model(shape: str, where: Path) -> None:
    "A llava-hf folder with random weights, made on the device."
    import gpu
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil

    from llava_nb.checkpoint import save_llava
    from llava_nb.llava import build_llava
    from llava_nb.masking import tiny_tokenizer

    config, tokenizer = gpu.configuration(gpu.SHAPES[shape]), tiny_tokenizer()
    dtype, side = torch.bfloat16 if cuda() else torch.float32, config.vision_config.image_size
    torch.manual_seed(0)
    with gpu.DEVICE:
        text = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        tower = AutoModel.from_config(config.vision_config, dtype=dtype)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    save_llava(build_llava(text, tower, tokenizer), where, tokenizer, processor)


# The result of 7B is 14 GB on the disk, and nobody wants it.
UNSAVED = """import sys
from llava_nb.run.command_line import program
from llava_nb.safe.reliable_trainer import ReliableTrainer
sys.argv[0] = 'train.py'
ReliableTrainer.export = lambda self: self.state.save_to_json(self.args.output_dir + '/trainer_state.json')
program()
"""


def settings_of(where: Path, toy: bool) -> dict:
    "Of a run over `make_records`, stage 2."
    return {
        "model": str(where / "model"),
        "data_path": str(where / "records.json"),
        "image_folder": str(where),
        "output_dir": str(where / "run"),
        "template": "v1",
        "image_aspect_ratio": "pad",
        "model_max_length": 2048,
        "stage": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0 if toy else 8,
        "disable_tqdm": True,
        "bf16": cuda(),
    }


def by_train(shape: str, steps: int, **changes) -> Callable:
    "A stage that runs train.py and reads its own meter."

    def work(args, keep: Keep) -> list[str]:
        n, made = (3, "toy") if args.toy else (steps, shape)
        with folder() as name:
            where = Path(name)
            settings = settings_of(where, args.toy) | {"max_steps": n} | changes
            if args.toy:
                settings["max_tokens"] = 2048
            if args.model:
                settings["model"] = args.model
            begun = time.monotonic()
            make_records(where, 16 * (n + 2), 20 if args.toy else 1)
            if not args.model:
                make_model(made, where / "model")
            keep(settings=settings, made_s=time.monotonic() - begun)
            (where / "run.json").write_text(json.dumps(settings))
            t = train(where / "run.json", program=["-c", UNSAVED])
        print(t.said)
        read = medians(t.history[len(t.history) // 4 :])
        keep(seconds=t.seconds, code=t.code, history=t.history, median=read, headline=meter_line(read, len(t.history)))
        return list(filter(None, [t.check_attention_backend(n)]))

    return work


def medians(history: list[dict]) -> dict[str, float]:
    "Of every number that all steps have."
    numbers = [{k: v for k, v in h.items() if isinstance(v, int | float)} for h in history]
    names = set.intersection(*map(set, numbers)) if numbers else ()
    return {k: statistics.median(h[k] for h in numbers) for k in sorted(names)}


def meter_line(read: dict[str, float], steps: int) -> str:
    "What a run's meter read, in the middle of its later steps."
    rates = ", ".join(f"{v:.1%}" for k, v in read.items() if k.startswith("mfu_"))
    tokens, waited, memory = (read.get(k, 0) for k in ("tokens_per_second", "data_wait", "peak_memory_gb"))
    return f"{tokens:,.0f} tokens/s, MFU {rates}, waiting {waited:.1%}, {memory:.1f} GB, {steps} steps"
