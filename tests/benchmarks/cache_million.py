"""Time and memory of opening a store of 1,000,000 records: `python -m tests.benchmarks.cache_million`.

A process of its own opens it; its memory is what that adds to the same process before (resident, its share of mapped
files included). The targets are 1 s and 100 MB.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

OPEN = """
import sys, time
from pathlib import Path
import numpy as np
from common.cache.reader import CacheReader

def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1e3

CacheReader(sys.argv[1]).close()  # compiles, imports
before = resident("VmRSS"), resident("RssAnon")
start_s = time.perf_counter()
reader = CacheReader(sys.argv[2])
opened_s = time.perf_counter() - start_s
after = resident("VmRSS"), resident("RssAnon")
rows = np.random.default_rng(0).choice(reader.rows(), 100_000)
assert (reader.table.image_id[rows] == rows).all()
print(f"{len(reader):,} records, {len(reader.finished_shards):,} shards: opened in {opened_s * 1e3:.0f} ms;"
      f" {after[0] - before[0]:.0f} MB more memory, of which {after[1] - before[1]:.0f} MB are not shared")
"""


def main() -> None:
    from tests.benchmarks.bench_cache import KINDS, MILLION, make_empty_store

    with tempfile.TemporaryDirectory(prefix="bench-cache-") as folder:
        for kind in KINDS:
            small, large = Path(folder) / "small.zarr", Path(folder) / f"{kind.name.replace(' ', '')}.zarr"
            if not small.exists():
                make_empty_store(small, *kind.inputs(1000))
            make_empty_store(large, *kind.inputs(MILLION))
            subprocess.run([sys.executable, "-c", OPEN, str(small), str(large)], check=True)


if __name__ == "__main__":
    main()
