"""Segment many volumes with one model: ``python jobs/batch.py --input 'scans/*.zarr' --output seg --model pores``.

Takes what `volseg batch` takes; exit code 3 where some volumes failed. Finds its cluster by RAY_ADDRESS.
"""

import sys

from volseg.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["batch", *sys.argv[1:]]))
