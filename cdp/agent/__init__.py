"""The agent on the protected machine: capture, seal, push; seed and resync; orders of a takeover.

In the order of the data flow: ``capture`` (block layer -> raw spool), ``seal`` with ``coalesce`` (raw spool ->
segments), ``copy`` with ``dirty`` and ``rounds`` (seed and resync), ``pipeline`` (the beat), ``spool`` and ``push``.
Around it: ``main``, ``config``, ``state``, ``control`` with ``verbs``, ``fence``, ``quiesce``, ``metrics``, ``enrol``.
"""

import os

# Threads of numpy's algebra library, which we do not use, cost memory on a machine that is not ours.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
