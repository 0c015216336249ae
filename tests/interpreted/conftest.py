"""Triton kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`.

The switch is read when Triton is imported, so these tests have a run of their own.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
