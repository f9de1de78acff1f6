"""The nodes of the workflow, one module each, in the order in which the data flows.

download, inspect_format, plan, quantize_experts, validate_gemm, assemble_release, verify_release, evaluate,
serve_bench, report. Each is a plain function plus a `main()`, so that it runs alone, under pytest and in the DAG.
They share settings, provenance, errors, receipts and plots; workflow and current are what the Snakefile asks before it runs them.
Imports run one way, from the Snakefile through these to the rooms beside them and to kernels: tests/test_imports.py has the order.
"""

import atexit
import gc
import os
import sys


def _say_in_one_line(kind, error, trace) -> None:
    """For Ctrl-C while modules are imported; later, `exit_with_one_line` says it."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted; run the same command again to go on", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _leave_uncollected() -> None:
    """Spares the interpreter's last look through all that numba made, 0.2 s. Triton's modules would report that they were never freed."""
    if "triton" not in sys.modules:
        gc.freeze()


if sys.argv[:1] == ["-m"]:  # a stage is being started; `exit_with_one_line` turns collection on again
    sys.excepthook = _say_in_one_line
    atexit.register(_leave_uncollected)
    gc.disable()  # torch and numba make objects by the hundred thousand on import that all live on: a fifth of the start
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which no stage multiplies with; its threads would wait for work, spinning
