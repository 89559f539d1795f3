"""The loops of training and matching on the twin: python tests/cuda/run_twin.py tests/cuda/loops.py"""

from __future__ import annotations

import json

import matching_iterations
import training_steps

if __name__ == "__main__":
    print(json.dumps({"training": training_steps.measure(), "matching": matching_iterations.measure()}))
