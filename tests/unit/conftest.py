"""Property tests that say the same on every machine, and keep nothing on disk.

`make fuzz` instead tries what was never tried before, for as long as it is told.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "unit",
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fuzz", settings.get_profile("unit"), derandomize=False)
settings.load_profile("fuzz" if os.environ.get("FUZZ_SECONDS") else "unit")
