"""The rules by which a block's exponent is chosen; their formulas are in the package's docstring."""

RULES = ("mse", "ocp_floor", "even", "rceil")
RULE_NUMBER = {rule: number for number, rule in enumerate(RULES)}  # as the compiled kernels know them
