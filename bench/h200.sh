#!/usr/bin/env bash
# All that a machine with one GPU should say in a few minutes: kernels, tests, training, speed. Every stage has its own time limit
# and leaves its JSON at once; a stage that fails stops nothing and is named in the summary. The stages are in bench/stages.py.
#
#   python bench/wheels.py                where there is a network: what the machine lacks, into .whl/ (28 MB)
#   bash bench/h200.sh 1                  first command, about 7 minutes: machine, kernels, tests, small runs, 1B
#   bash bench/h200.sh 2                  second command, about 6 minutes: 7B
#   bash bench/h200.sh kernels train1b    these stages alone
#   bash bench/h200.sh --toy              all of it with toy shapes, on a CPU too
#   bash bench/h200.sh --help
#
# OUT (default runs/h200) gets eight files a part at most, no folders. The wheels of WHEELS (default .whl) are installed
# into SITE (default /tmp/llava_nb_site), nowhere else. PYTHON (default python3) is the one that has torch.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export OUT="${OUT:-runs/h200}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
PYTHON="${PYTHON:-python3}" SITE="${SITE:-/tmp/llava_nb_site}" WHEELS="${WHEELS:-.whl}"
if compgen -G "$WHEELS/*.whl" >/dev/null && [ ! -e "$SITE/installed" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl && touch "$SITE/installed" ||
        echo "h200: the wheels of $WHEELS could not be installed; going on with what is there" >&2
fi
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PATH="$SITE/bin:$PATH"
exec "$PYTHON" bench/h200.py "$@"
