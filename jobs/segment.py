"""Segment on the cluster that runs this job: ``ray job submit --working-dir . -- python jobs/segment.py SPEC.yaml``.

Takes a spec file and what `volseg segment` takes; exit codes are the same.
"""

import sys

from volseg.cli.main import main

if __name__ == "__main__":
    words = sys.argv[1:]
    # The file may stand first here, as for the other jobs.
    first = ["--spec"] if words and words[0].endswith((".yaml", ".yml")) else []
    sys.exit(main(["segment", *first, *words]))
