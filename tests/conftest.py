"""For all tests: what fails here fails everywhere and again, whoever else has the machine.

Properties are tried on the same examples each time. `HYPOTHESIS_PROFILE=default` looks for others.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "shared machine",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "shared machine"))
