import os

import torch

# Triton's kernels run in its interpreter here. What decides is the environment at the time when triton is first imported, by whomever.
os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
