import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

sys.path.insert(0, str(Path(__file__).parent))
