"""Test set-up: tests import each other's support modules by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
