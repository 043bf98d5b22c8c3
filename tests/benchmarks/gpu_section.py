"""Sections for the tests of benchmarks/lib/gpu_sections.py: one ends well, one dies, one hangs with a child of its own."""

import json
import subprocess
import sys
import time


def main() -> None:
    how, rows = sys.argv[1], sys.argv[sys.argv.index("--rows") + 1]
    with open(rows, "w") as file:
        file.write('{"number": 1}\n{"number": 2}\n{"numb')
    print(f"this is {how}", flush=True)
    if how == "good":
        print(json.dumps({"what": "good", "machine": {"lamp": "on"}, "figures": {"bright": 2.0}, "rows": [{"number": 3}]}))
    if how == "dies":
        raise SystemExit("no more")
    if how == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
