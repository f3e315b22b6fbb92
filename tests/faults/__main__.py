import sys
import time

from tests.faults.plans import draw
from tests.faults.run import run

size = sys.argv[1]
first, count = int(sys.argv[2]), int(sys.argv[3])
trace = len(sys.argv) > 4
bad = rounds = 0
began = time.process_time()
for seed in range(first, first + count):
    result = run(draw(seed, size), trace=trace)
    rounds += result.rounds
    if result.violation is not None:
        bad += 1
        print(seed, repr(result.violation)[:200], flush=True)
        if trace:
            import traceback
            print("\n".join(result.trace[-150:]))
            traceback.print_exception(result.violation)
spent = time.process_time() - began
print(f"{count} runs, {bad} bad, {rounds} rounds, {spent:.1f} s, {rounds / spent * 3600:.0f} rounds/h, {count / spent * 3600:.0f} federations/h")
