"""Train on the cluster that runs this job: ``ray job submit --working-dir . -- python jobs/train.py SPEC.yaml``.

Takes what `volseg train` takes; exit codes are the same.
"""

import sys

from volseg.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
