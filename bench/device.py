"""What nvidia-smi reads while something runs: power, clock, memory. Nothing of it is set."""

import shutil
import statistics
import subprocess

FIELDS = {
    "power.draw": "power_w",
    "clocks.sm": "sm_mhz",
    "memory.used": "memory_mib",
    "utilization.gpu": "busy_percent",
    "temperature.gpu": "celsius",
}


class Sampled:
    """Inside `with`, the first GPU is read twice a second; then `found` has the median and the largest of each reading.

    It is empty without nvidia-smi."""

    def __init__(self):
        self.found: dict[str, float] = {}

    def __enter__(self) -> "Sampled":
        words = [
            "nvidia-smi",
            f"--query-gpu={','.join(FIELDS)}",
            "--format=csv,noheader,nounits",
            "-i",
            "0",
            "-lms",
            "500",
        ]
        self.process = (
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            if shutil.which("nvidia-smi")
            else None
        )
        return self

    def __exit__(self, *error) -> None:
        if self.process is None:
            return
        self.process.terminate()
        columns = zip(
            *(
                map(_number, line.split(","))
                for line in self.process.communicate()[0].splitlines()
                if line.count(",") == len(FIELDS) - 1
            )
        )
        for name, column in zip(FIELDS.values(), columns):
            read = [x for x in column if x is not None]
            if read:
                self.found |= {name: statistics.median(read), f"{name}_max": max(read)}


def _number(word: str) -> float | None:  # None: "[N/A]", or cut
    try:
        return float(word)
    except ValueError:
        return None
