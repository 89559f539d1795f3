"""Runs a script on the twin of a CUDA device, and prints to stderr what it would cost a real one.

    python tests/cuda/run_twin.py script.py [arguments]      prints counts by line at the end
    python tests/cuda/run_twin.py -m tadperf distill ...     the same for a module, here the command line

A script asks for device "cuda", or for nothing, because CUDA is then available. It can use the counts itself:

    from counters import counters
    counters.reset()
    ...
    print(counters.report())     # launches, blocking copies and waits by line of tadperf; nodes of recorded graphs

TWIN_TOP is the number of lines of each kind, 12 by default. The values of all results are those of the CPU up to the
order of sums, so a script may compare them. See twin.py for what the twin checks and for what it cannot see.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import stub


def main() -> None:
    """Runs the script or the module in this process."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    stub.load()
    import twin
    from counters import counters

    twin.start()
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        print(counters.report(int(os.environ.get("TWIN_TOP", "12"))), file=sys.stderr)
    # Not through the end of Python: PyTorch sometimes aborts there, because a thread of the fake device still runs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
