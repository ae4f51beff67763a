#!/usr/bin/env bash
# A row whose coefficients are 1e-9 or less is no row any more: MathOpt answers OPTIMAL all the same.
#
# With OR-tools, memory is naturally said as a share of the budget: bytes are the variables, 1 / budget is
# their coefficient, 5e-10 for 2 GB.  Three values of at most 10 GB each, together at most the budget, as
# many bytes as possible: the optimum is the budget.  GLOP finds it.  HiGHS drops the coefficients and keeps
# 30 GB in 2 GB; CP-SAT lets no variable above 1e7 and keeps 0.03 GB.  Both say OPTIMAL, neither warns, and
# the bounds of both are as wrong.  At 1.1e-9, the same rows are kept by all three.
# To do: scale so that coefficients that matter are near 1 (gigabytes, not bytes), and judge every answer by
# the rows as they were meant.
#
# Run on 2026-11-29, 2 cores, Linux, Python 3.11:
#
#     ortools 9.15.6755
#     budget 0.9 GB, GLOP  : OPTIMAL, 0.90 GB kept, at most 0.90
#     budget 0.9 GB, HIGHS : OPTIMAL, 0.90 GB kept, at most 0.90
#     budget 0.9 GB, CP_SAT: OPTIMAL, 0.90 GB kept, at most 0.90
#     budget 2.0 GB, GLOP  : OPTIMAL, 2.00 GB kept, at most 2.00
#     budget 2.0 GB, HIGHS : OPTIMAL, 30.00 GB kept, at most 30.00
#     budget 2.0 GB, CP_SAT: OPTIMAL, 0.03 GB kept, at most 0.03
#     as told

set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet ortools==9.15.6755 numpy==2.4.6
cat > "$folder/finding.py" <<'PYTHON'
import sys

import ortools
from ortools.math_opt.python import mathopt

GB = 10**9
SOLVERS = (mathopt.SolverType.GLOP, mathopt.SolverType.HIGHS, mathopt.SolverType.CP_SAT)


def kept(budget, solver):
    """Bytes that ``solver`` keeps, and its bound on them, where all three say OPTIMAL."""
    model = mathopt.Model()
    values = [model.add_variable(lb=0, ub=10 * GB) for _ in range(3)]
    model.add_linear_constraint(sum(value / budget for value in values) <= 1)
    model.maximize(sum(values))
    result = mathopt.solve(model, solver)
    assert result.termination.reason == mathopt.TerminationReason.OPTIMAL
    return result.objective_value(), result.dual_bound()


print("ortools", ortools.__version__)
seen = {}
for budget in (0.9 * GB, 2 * GB):
    for solver in SOLVERS:
        value, bound = kept(budget, solver)
        seen[budget, solver.name] = value / budget
        kept_gb, bound_gb = value / GB, bound / GB
        answer = f"{solver.name:6}: OPTIMAL, {kept_gb:.2f} GB kept, at most {bound_gb:.2f}"
        print(f"budget {budget / GB:.1f} GB, {answer}")
told = (
    all(abs(seen[0.9 * GB, solver.name] - 1) < 1e-6 for solver in SOLVERS)
    and abs(seen[2 * GB, "GLOP"] - 1) < 1e-6
    and seen[2 * GB, "HIGHS"] > 10
    and seen[2 * GB, "CP_SAT"] < 0.1
)
print("as told" if told else "NOT as told: something changed")
sys.exit(not told)
PYTHON
cd "$folder"
venv/bin/python finding.py
