"""Triton's kernels run in its interpreter here: what decides is the environment at the time when a kernel is first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
