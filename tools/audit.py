"""Known holes in the installed libraries (pip-audit) and doubtful calls in the package (bandit): `make audit`.

Exit codes: 0 nothing found, 1 findings, 3 the advisory service could not be asked (bandit found nothing)."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def advisories() -> tuple[list[str], int, int, str]:
    """Known holes, libraries looked up, libraries not looked up, and what went wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--local", "--format", "json", "--progress-spinner", "off"],
        capture_output=True,
        text=True,
    )
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return [], 0, 0, (done.stderr.strip().splitlines() or ["no answer"])[-1]
    holes = [
        f"{d['name']} {d['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'no version'}"
        for d in found
        for v in d.get("vulns", [])
    ]
    skipped = [d for d in found if "skip_reason" in d]
    return holes, len(found) - len(skipped), len(skipped), skipped[0]["skip_reason"] if skipped else ""


def main() -> int:
    code = subprocess.run(
        [sys.executable, "-m", "bandit", "-q", "-c", str(ROOT / "pyproject.toml"), "-r", str(ROOT / "llava_nb")]
    ).returncode
    print("bandit: " + ("findings, see above" if code else "nothing found"))
    holes, asked, skipped, why = advisories()
    for hole in holes:
        print(f"pip-audit: {hole}")
    if not asked:
        print(f"pip-audit: NOT DONE, the advisory service told nothing of any library ({why})")
    else:
        print(
            f"pip-audit: {asked} libraries looked up, {len(holes)} known holes"
            + (f"; {skipped} not looked up ({why}, and so on)" if skipped else "")
        )
    return 1 if code or holes else 0 if asked else 3


if __name__ == "__main__":
    sys.exit(main())
