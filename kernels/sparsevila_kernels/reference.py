"""What each kernel computes, in plain PyTorch and written from the definition: the judge of both of its paths.

Knows: arithmetic in the dtype that it is asked for (fp64 by default). Does not know speed, memory or how the kernels go about it.
"""

from __future__ import annotations
