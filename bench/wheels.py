"""Gathers the wheels that `bench/h200.sh` installs on a GPU machine that reaches no registry.

    python bench/wheels.py                into .whl/: DeepSpeed (built here), transformers, liger-kernel, what they need
    python bench/wheels.py --python 3.11  for another Python

The machine has Python 3.12 and torch with CUDA; `PRESENT` lists what else it need not be brought. Versions are those
of constraints.txt. The folder is closed when every requirement of the kit and of a wheel is met by a wheel or by
`PRESENT`; it stays under 60 MB.
"""

import argparse
import configparser
import os
import re
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60_000_000  # bytes
WANTED = ("deepspeed", "transformers", "liger-kernel")  # at the versions of constraints.txt, whatever is present
# Version as read there; None: not read, and recent enough. A small package whose version was not read is brought.
PRESENT = {
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "accelerate": "1.15.0",
    "huggingface-hub": "1.33.0",
    "tokenizers": "0.23.2",
    "safetensors": "0.8.0",
    "sentencepiece": "0.2.2",
    "numpy": "2.5.2",
    "pyarrow": None,
    "protobuf": None,
    "fsspec": None,
    "filelock": None,
    "matplotlib": None,
    "tensorboard": None,
    "pyyaml": None,
    "typer": None,
    "einops": None,
    "msgpack": None,
    "ninja": None,
    "py-cpuinfo": None,
    "pytest": None,
    "hypothesis": None,
    "jinja2": None,
}


def pinned() -> dict[str, str]:  # version by name
    "The versions of constraints.txt that a Python of today gets."
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {
        canonicalize_name(r.name): str(next(iter(r.specifier)).version)
        for r in found
        if not r.marker or r.marker.evaluate()
    }


def kit() -> list[Requirement]:
    "What the kit itself asks for."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    return [Requirement(word) for word in settings["DEFAULT"]["requirements"].split()]


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        return HeaderParser().parsestr(z.read(name).decode())


def carried(folder: Path) -> dict[str, tuple[Path, str, list[Requirement]]]:  # by name: file, version, what it requires
    found = {}
    for wheel in sorted(folder.glob("*.whl")):
        about = metadata(wheel)
        name = canonicalize_name(about["Name"])
        if name in found:
            raise ValueError(
                f"{wheel}: {found[name][0].name} is there too, and two versions of one package stop an installation; "
                "remove one"
            )
        found[name] = wheel, about["Version"], [Requirement(r) for r in about.get_all("Requires-Dist", [])]
    return found


def unmet(folder: Path, python: str = "3.12") -> list[tuple[str, Requirement]]:  # who asks, for what
    "Requirements that neither a wheel of the folder nor the machine meets."
    have, found = carried(folder), []
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }
    asked = [("llava_nb", r) for r in kit()] + [(name, r) for name, (_, _, requires) in have.items() for r in requires]
    for who, r in asked:
        if r.marker and not r.marker.evaluate(machine):
            continue
        name = canonicalize_name(r.name)
        version = have[name][1] if name in have else PRESENT.get(name, "")
        if version is not None and not (version and r.specifier.contains(version, prereleases=True)):
            found.append((who, r))
    return found


def pip(*words: str, **env: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench/wheels.py: pip {' '.join(words)}: {done.stderr[-2000:]}")


def fetch(folder: Path, wanted: str, python: str) -> None:  # a requirement
    "One wheel, without what it needs. DeepSpeed has none, so it is built, without its compiled operations."
    if wanted.startswith("deepspeed"):
        return pip(
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(folder),
            wanted,
            DS_BUILD_OPS="0",
            DS_ACCELERATOR="cpu",
        )
    platforms = [
        w for n in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1") for w in ("--platform", f"manylinux{n}_x86_64")
    ]
    pip(
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python,
        "--implementation",
        "cp",
        *platforms,
        "-d",
        str(folder),
        wanted,
    )


def gather(folder: Path, python: str = "3.12") -> None:
    "Gather the wheels anew, until nothing is missing."
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pins = pinned()
    for name in WANTED:
        fetch(folder, f"{name}=={pins[name]}", python)
    while missing := unmet(folder, python):
        who, asked = missing[0]
        name = canonicalize_name(asked.name)
        if name in carried(folder):
            raise SystemExit(
                f"bench/wheels.py: {who} needs {asked}, and {carried(folder)[name][0].name} is gathered; "
                "change constraints.txt or PRESENT"
            )
        fetch(folder, f"{name}=={pins[name]}" if name in pins else f"{asked.name}{asked.specifier}", python)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--into", type=Path, default=ROOT / ".whl", help="a folder that git ignores; its wheels are removed first"
    )
    p.add_argument("--python", default="3.12", help="version there")
    args = p.parse_args()
    gather(args.into, args.python)
    have = carried(args.into)
    total = sum(wheel.stat().st_size for wheel, *_ in have.values())
    for name, (wheel, version, _) in have.items():
        print(f"{wheel.stat().st_size / 1e6:6.2f} MB  {name} {version}")
    print(
        f"{total / 1e6:6.2f} MB  {len(have)} wheels in {args.into}, every requirement met"
        + (f"; over the limit of {LIMIT / 1e6:.0f} MB" if total > LIMIT else "")
    )
    return int(total > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
