"""Goals of the operators on an H200. Imports nothing, so that a page of results can be written at once."""

# (operator, shape) -> (figure, bound). A share must reach its bound, a time must stay below it.
BARS = {
    ("per_sample", "1000000x100"): ("share_of_copy", 0.9),
    ("per_sample", "1280000x1000"): ("share_of_copy", 0.9),
    ("trajectory_distance", "64x320010"): ("share_of_copy", 0.9),
    ("mixture", "50000x10"): ("median_ms", 1.0),
    ("mixture", "1280000x1000"): ("median_ms", 5.0),
}
