"""`python -m tadperf`."""

from __future__ import annotations

from tadperf.cli.app import main

if __name__ == "__main__":
    main()
