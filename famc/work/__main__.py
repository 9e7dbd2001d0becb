"""`python -m famc.work JOB.json`: run one job. The same function serves the warm pool of a local build."""

from __future__ import annotations

import sys

from famc.work.runner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
