"""Settings that must be made before torch is imported."""

import os

# The suite runs on all cores at once; threads of torch that spin while they wait would fight over them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
