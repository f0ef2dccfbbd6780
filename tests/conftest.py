import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before anything imports Triton: where there is a GPU, its kernels are the real ones

sys.path.insert(0, str(Path(__file__).parent))
