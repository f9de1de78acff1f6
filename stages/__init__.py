"""The nodes of the workflow, one module each, in the order in which the data flows.

download, inspect_format, plan, quantize_experts, validate_gemm, assemble_release, verify_release, evaluate,
serve_bench, report. Each is a plain function plus a `main()`, so that it runs alone, under pytest and in the DAG.
Imports run one way: Snakefile -> stages.<node> -> stages.{checkpoint,dialects,schemes,serving} -> kernels.
"""
